"""Packed and padded layouts, and the check that proves them on the model in use."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from tiny_models import FAMILIES, build
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM

from ft.data.pack import collate
from ft.errors import ModelError
from ft.models import documents, layout, leak
from ft.models.documents import BY_DOCUMENT, Documents, attention
from ft.models.layout import Layout, alone, arrange
from ft.models.policy import Scorer
from ft.types import Batch, Example

RAGGED = (37, 64, 2, 29, 5)
RECURRENT = ("qwen3_5_moe_text", "qwen3_5_text", "qwen3_next", "minimax", "nemotron_h")
MASKED = ("glm_moe_dsa",)  # its indexer reads the mask
# An indexer with few heads scores many keys exactly 0, and topk breaks such ties differently in longer rows.
OVER: dict[str, dict[str, Any]] = {"glm_moe_dsa": {"index_n_heads": 16}}


def example(length: int, seed: int) -> Example:
    """``length`` positions, about two thirds of them trained."""
    rng = np.random.default_rng(seed)
    mask_L = rng.random(length + 1) < 0.67
    mask_L[-1] = True
    return Example(tokens_L=rng.integers(3, 128, length + 1).astype(np.int32), mask_L=mask_L)


def batch(*lengths: int, filler: int = 0) -> Batch:
    made = collate([example(length, seed) for seed, length in enumerate(lengths)])
    if not filler:
        return made
    pad = {"input_T": 7, "target_T": 0, "pos_T": 0, "seq_T": len(lengths), "mask_T": False}
    grown = {n: torch.cat([v := getattr(made, n), torch.full((filler,), x, dtype=v.dtype)]) for n, x in pad.items()}
    grown["pos_T"][-filler:] = torch.arange(filler)
    kept = {n: getattr(made, n) for n in ("cu_S1", "trained_N", "lengths", "unit_S", "group_S")}
    return Batch(**grown, **kept)


def each_alone(scorer: Scorer, lengths: tuple[int, ...]) -> Tensor:
    """The oracle: every sequence by itself, through the model's own attention, masks and logits."""
    plain = alone(scorer.own_attention)
    batches = [collate([example(length, seed)]) for seed, length in enumerate(lengths)]
    return torch.cat([scorer(b, plain, own_logits=True)["logp_T"] for b in batches])


@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_packs_and_each_sequence_is_as_if_alone(family: str) -> None:
    model = build(family, **OVER.get(family, {}))
    scorer = Scorer(model)
    chosen, report = leak.check(scorer)
    assert chosen.kind == "packed"
    assert chosen.split == (family in RECURRENT)
    assert (chosen.masks != "none") == (family in MASKED)
    assert (chosen.attention == BY_DOCUMENT) == (family not in MASKED)
    assert report.lines()[0].startswith("layout: packed")

    mine = [p for p in model.parameters() if p.requires_grad]
    oracle_T = each_alone(scorer, RAGGED)
    weight_T = torch.randn(oracle_T.shape, generator=torch.Generator().manual_seed(0))
    expected = torch.autograd.grad((oracle_T * weight_T).sum(), mine, allow_unused=True)
    padded = Layout(kind="padded", attention="sdpa" if family in MASKED else BY_DOCUMENT)
    for tried in (chosen, padded):
        logp_T = scorer(batch(*RAGGED, filler=3), tried)["logp_T"]
        torch.testing.assert_close(logp_T[:-3], oracle_T, atol=1e-5, rtol=0)
        assert not logp_T[-3:].any()
        grads = torch.autograd.grad((logp_T[:-3] * weight_T).sum(), mine, allow_unused=True)
        for grad, wanted in zip(grads, expected, strict=True):
            assert (grad is None) == (wanted is None)
            if grad is not None and wanted is not None:
                torch.testing.assert_close(grad, wanted, atol=1e-5 + 1e-5 * float(wanted.abs().max()), rtol=0)


@pytest.mark.parametrize("family", (*RECURRENT, "gpt_oss", "afmoe"))
def test_check_sees_the_leak_of_position_ids_alone(family: str) -> None:
    """What these families do with packed position ids and nothing else."""
    model = build(family)
    scorer = Scorer(model)
    naive = Layout(kind="packed", attention=scorer.own_attention)
    with pytest.raises(ModelError, match="keep packed sequences apart") as refused:
        leak.check(scorer, requested="packed", tried=[naive])
    assert "FAILS" in str(refused.value) and "model.layout=padded" in str(refused.value)
    chosen, report = leak.check(scorer, tried=[naive, Layout(kind="padded", attention=BY_DOCUMENT)])
    assert chosen.kind == "padded"
    assert report.findings[0].leak > 1e-3 and report.findings[1].leak == 0
    assert "rows are padded" in report.lines()[1]


def test_check_sees_what_has_no_gradient() -> None:
    """The mean of the row, added without its gradient."""
    scorer = Scorer(build("llama"))
    trunk: Any = documents.trunk(scorer.model)
    trunk.norm.register_forward_hook(lambda module, args, out: out + out.detach().mean(1, keepdim=True))
    with pytest.raises(ModelError) as refused:
        leak.check(scorer, requested="packed")
    assert "gradient into other sequences 0.0e+00" in str(refused.value)


def test_check_sees_a_head_that_is_not_ours() -> None:
    scorer = Scorer(build("llama"))
    scorer.options = {"scale": 1.5, "softcap": None}
    with pytest.raises(ModelError, match="no layout gives"):
        leak.check(scorer)


def test_auto_pads_a_family_that_drops_keywords() -> None:
    """Jamba hands no keywords to its Mamba layers, so nothing can tell them where documents end."""
    torch.manual_seed(0)
    config = AutoConfig.for_model(
        "jamba", vocab_size=128, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=1, attn_layer_period=2, attn_layer_offset=1, num_experts=2, mamba_d_state=8,
        use_mamba_kernels=False,
    )  # fmt: skip
    scorer = Scorer(AutoModelForCausalLM.from_config(config))
    chosen, report = leak.check(scorer)
    assert chosen == Layout(kind="padded", attention=BY_DOCUMENT)
    assert "rows are padded" in report.lines()[1]
    logp_T = scorer.eval()(batch(*RAGGED), chosen)["logp_T"]
    torch.testing.assert_close(logp_T, each_alone(scorer, RAGGED), atol=1e-5, rtol=0)


@pytest.mark.parametrize("attention", ("sdpa", "eager"))
@pytest.mark.parametrize("family", ("llama", "gemma3_text", "qwen3_5_moe_text"))
def test_an_attention_that_was_asked_for_is_kept(family: str, attention: str) -> None:
    scorer = Scorer(build(family))
    chosen, _ = leak.check(scorer, attention=attention)
    assert (chosen.kind, chosen.attention) == ("packed", attention) and chosen.masks != "none"
    oracle_T = each_alone(scorer, RAGGED)
    logp_T = scorer(batch(*RAGGED), chosen)["logp_T"]
    torch.testing.assert_close(logp_T, oracle_T, atol=1e-5, rtol=0)


def test_windows_wider_than_the_check_are_covered() -> None:
    """A family that hands its window to nobody would be caught: windows are shrunk during the check."""
    model = build("gemma3_text", sliding_window=100)
    scorer = Scorer(model)
    attentions: list[Any] = [m for m in model.modules() if getattr(m, "sliding_window", None) == 100]
    assert leak.check(scorer)[0].attention == BY_DOCUMENT
    assert all(m.sliding_window == 100 for m in attentions) and model.config.sliding_window == 100
    for module in attentions:
        module.sliding_window = None
    assert leak.check(scorer)[0].attention == "sdpa"


def test_check_leaves_the_model_as_it_was() -> None:
    model = build("mixtral").train()
    scorer = Scorer(model)
    leak.check(scorer)
    assert all(module.training for module in scorer.modules() if module is not scorer)
    assert all(parameter.grad is None for parameter in model.parameters())
    assert not model.get_input_embeddings()._forward_hooks


@pytest.mark.parametrize("dtype", (torch.bfloat16, torch.float16))
@pytest.mark.parametrize("family", ("qwen3_5_moe_text", "mixtral", "gpt_oss"))
def test_check_passes_in_half_precision(family: str, dtype: torch.dtype) -> None:
    model: Any = build(family)
    chosen, report = leak.check(Scorer(model.to(dtype)))
    assert chosen.kind == "packed" and report.findings[-1].leak == 0


@pytest.mark.parametrize("family", ("qwen3_5_moe_text", "minimax", "qwen3_moe"))
def test_recomputed_layers_give_the_same_gradients(family: str) -> None:
    """Activation checkpointing runs the mixers again, with the documents of their own forward."""
    model: Any = build(family)
    scorer = Scorer(model)
    chosen, _ = leak.check(scorer)
    first, second = batch(*RAGGED), batch(11, 40)

    def gradients() -> list[Tensor]:
        loss = scorer(first, chosen)["logp_T"].sum() + scorer(second, chosen)["logp_T"].sum()
        return [g for g in torch.autograd.grad(loss, list(model.parameters()), allow_unused=True) if g is not None]

    expected = gradients()
    enable = getattr(model, "activation_checkpointing_enable", model.gradient_checkpointing_enable)
    enable({"use_reentrant": False})
    scorer.train()
    for grad, wanted in zip(gradients(), expected, strict=True):
        torch.testing.assert_close(grad, wanted)


def test_attention_outside_of_a_scorer_is_refused_and_can_be_switched_back() -> None:
    scorer = Scorer(build("llama"))
    scorer(batch(4), Layout(kind="packed", attention=BY_DOCUMENT))
    prompt = torch.tensor([[5, 6, 7]])
    with pytest.raises(ModelError, match="use_attention"):
        scorer.model(prompt)
    scorer.use_attention(scorer.own_attention)
    assert scorer.model.config._attn_implementation == "sdpa"
    assert scorer.model(prompt).logits.shape == (1, 3, 128)


# By hand.


def attend(value_TD: Tensor, docs: Documents, **options: Any) -> Tensor:
    """Attention with all scores equal: each position gets the mean of the values that it sees."""
    value = value_TD[None, None]
    zeros = torch.zeros(1, 1, value_TD.shape[0], 2)
    return attention(torch.nn.Module(), zeros, zeros, value, None, documents=docs, **options)[0][0, :, 0]


def test_attention_by_document_averages_its_own_past() -> None:
    values = torch.tensor([[2.0], [4.0], [6.0], [10.0], [30.0]])
    found = attend(values.expand(5, 2), Documents(lengths=(3, 2)))
    assert found[:, 0].tolist() == [2.0, 3.0, 4.0, 10.0, 20.0]
    window = attend(values.expand(5, 2), Documents(lengths=(3, 2)), sliding_window=2)
    assert window[:, 0].tolist() == [2.0, 3.0, 5.0, 10.0, 20.0]
    # a sink of logit 0 counts as one more key of value 0
    sinks = attend(values.expand(5, 2), Documents(lengths=(3, 2)), s_aux=torch.zeros(1))
    torch.testing.assert_close(sinks[:, 0], torch.tensor([1.0, 2.0, 3.0, 5.0, 40 / 3]))


def test_softcap_by_hand() -> None:
    query, key = torch.tensor([[[[1.0], [1.0]]]]), torch.tensor([[[[0.0], [4.0]]]])
    value = torch.tensor([[[[0.0], [1.0]]]])
    found, _ = attention(
        torch.nn.Module(), query, key, value, None, documents=Documents(), scaling=1.0, softcap=2.0
    )  # fmt: skip
    # scores of the second position: 0 and 2 tanh(4 / 2)
    assert found[0, 1, 0, 0].item() == pytest.approx(float(torch.sigmoid(2 * torch.tanh(torch.tensor(2.0)))))


def test_mixers_see_groups_of_documents_of_like_length() -> None:
    docs = documents.documents((5, 2, 4), split=True, device=torch.device("cpu"))
    assert [rows.tolist() for rows in docs.rows] == [[[0, 1, 2, 3, 4], [7, 8, 9, 10, 10]], [[5, 6]]]
    assert docs.back_T is not None
    assert docs.back_T.tolist() == [0, 1, 2, 3, 4, 10, 11, 5, 6, 7, 8]


def test_padded_rows_by_hand() -> None:
    made = batch(3, 1, filler=2)
    rows = arrange(made, Layout(kind="padded", attention="sdpa"), AutoConfig.for_model("llama"), torch.float32)
    a, b, c, d = made.input_T[:4].tolist()
    assert rows.tokens_SL.tolist() == [[a, b, c], [d, 0, 0]]
    assert rows.place_T is not None and rows.place_T[:4].tolist() == [0, 1, 2, 3]
    assert rows.real_SL is not None and rows.real_SL.tolist() == [[True, True, True], [True, False, False]]
    assert layout.forwarded(made, Layout(kind="padded", attention="sdpa")) == 6
    assert layout.forwarded(made, Layout(kind="packed", attention="sdpa")) == 6
    assert layout.forwarded(batch(3, 1), Layout(kind="packed", attention="sdpa")) == 4


def test_masks_by_hand() -> None:
    config = AutoConfig.for_model("llama")
    config.sliding_window = 2
    by_kind = Layout(kind="packed", attention="sdpa", masks="by kind")
    found = arrange(batch(3, 2), by_kind, config, torch.float32).kwargs["attention_mask"]
    assert found["full_attention"][0, 0].int().tolist() == [
        [1, 0, 0, 0, 0], [1, 1, 0, 0, 0], [1, 1, 1, 0, 0], [0, 0, 0, 1, 0], [0, 0, 0, 1, 1],
    ]  # fmt: skip
    assert found["sliding_attention"][0, 0].int().tolist()[2] == [0, 1, 1, 0, 0]
    assert found["linear_attention"] is None
    eager = arrange(batch(2), Layout(kind="packed", attention="eager", masks="one"), config, torch.float32)
    lowest = torch.finfo(torch.float32).min
    assert eager.kwargs["attention_mask"][0, 0].tolist() == [[0.0, lowest], [0.0, 0.0]]


def test_precision_is_that_of_the_layers_not_of_the_masters() -> None:
    scorer = Scorer(build("llama"))
    assert leak._precision(scorer, torch.bfloat16) == torch.bfloat16
    assert leak._precision(scorer, torch.float32) == torch.float32
