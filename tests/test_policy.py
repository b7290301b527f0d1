"""Log-probs by the policy: against the model's own logits, with adapters, idle ranks and FSDP."""

from __future__ import annotations

import math
import socket
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.multiprocessing as mp
from safetensors.torch import load_file, save_file
from tiny_models import FAMILIES, build
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from ft.data.pack import collate
from ft.errors import ModelError
from ft.models import leak
from ft.models.documents import BY_DOCUMENT
from ft.models.layout import Layout, alone
from ft.models.policy import Policy, Scorer, forwarded, head_options, logprobs
from ft.types import Batch, Example

PACKED = Layout(kind="packed", attention=BY_DOCUMENT)
PADDED = Layout(kind="padded", attention=BY_DOCUMENT)


def example(length: int, seed: int, trained: float = 0.67) -> Example:
    rng = np.random.default_rng(seed)
    return Example(
        tokens_L=rng.integers(3, 128, length + 1).astype(np.int32), mask_L=rng.random(length + 1) < trained
    )  # fmt: skip


def batch(*lengths: int, trained: float = 0.67) -> Batch:
    return collate([example(length, seed, trained) for seed, length in enumerate(lengths)])


def policy(model: PreTrainedModel, layout: Layout = PACKED, **options: Any) -> Policy:
    return Policy(scorer=Scorer(model), config=model.config, layout=layout, **options)


def own_logits(model: PreTrainedModel, made: Batch) -> Tensor:
    """[T, V] of a batch of one sequence, by the model's own forward."""
    assert len(made.lengths) == 1
    model.set_attn_implementation("eager")
    return model(made.input_T[None]).logits[0]


HEADS: dict[str, dict[str, Any]] = {
    "gemma2": {"head_dim": 16, "query_pre_attn_scalar": 16, "sliding_window": 16, "final_logit_softcapping": 0.5},
    "gemma3_text": {"head_dim": 16, "query_pre_attn_scalar": 16, "sliding_window": 16, "final_logit_softcapping": 0.5},
    "gemma4_text": {"head_dim": 16, "global_head_dim": 16, "vocab_size_per_layer_input": 128,
                    "hidden_size_per_layer_input": 8, "final_logit_softcapping": 0.5, "num_kv_shared_layers": 0},
    "cohere": {"logit_scale": 0.25},
    "cohere2": {"logit_scale": 0.25, "head_dim": 16, "sliding_window": 16},
    "granite": {"logits_scaling": 8.0},
    "granitemoe": {"logits_scaling": 8.0, "num_local_experts": 4, "num_experts_per_tok": 2},
    "hyperclovax": {"logits_scaling": 0.5},
    "falcon_h1": {"lm_head_multiplier": 0.5, "head_dim": 16, "mamba_d_ssm": 64, "mamba_n_heads": 4,
                  "mamba_d_head": 16, "mamba_d_state": 16, "mamba_n_groups": 1, "mamba_chunk_size": 16},
    "phi": {},  # a head with a bias
}  # fmt: skip


def with_head(family: str) -> PreTrainedModel:
    torch.manual_seed(0)
    config = AutoConfig.for_model(
        family, vocab_size=128, hidden_size=64, intermediate_size=96, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, **HEADS[family],
    )  # fmt: skip
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
    with torch.no_grad():  # larger logits, so that a cap bends them
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter), alpha=0.1)
    return model


@pytest.mark.parametrize("family", HEADS)
def test_heads_that_scale_or_cap_agree_with_their_own_logits(family: str) -> None:
    model = with_head(family)
    made = batch(20)
    found = logprobs(policy(model), made)
    own_TV = own_logits(model, made).float().log_softmax(-1)
    expected_T = own_TV.gather(1, made.target_T[:, None])[:, 0] * made.mask_T
    torch.testing.assert_close(found.logp_T, expected_T, atol=1e-5, rtol=1e-5)
    options = head_options(model.config)
    assert (options["scale"] != 1.0 or options["softcap"] is not None) == (family != "phi")
    leak.check(Scorer(model))  # raises where the head differs


@pytest.mark.parametrize("family", FAMILIES)
def test_log_probs_are_those_of_the_models_own_logits(family: str) -> None:
    model = build(family)
    made = batch(20)
    scorer = Scorer(model)
    found = scorer(made, alone(scorer.own_attention))["logp_T"]
    own_TV = own_logits(model, made).float().log_softmax(-1)
    expected_T = own_TV.gather(1, made.target_T[:, None])[:, 0] * made.mask_T
    torch.testing.assert_close(found, expected_T, atol=1e-5, rtol=0)
    assert found.dtype == torch.float32


def test_temperature_and_entropy() -> None:
    model = build("llama")
    made = batch(9)
    found = logprobs(policy(model), made, temperature=0.5, entropy=True)
    own_TV = (own_logits(model, made) / 0.5).log_softmax(-1)
    assert found.entropy_T is not None and not found.entropy_T.requires_grad
    torch.testing.assert_close(found.logp_T, own_TV.gather(1, made.target_T[:, None])[:, 0] * made.mask_T)
    torch.testing.assert_close(found.entropy_T, -(own_TV.exp() * own_TV).sum(-1).detach() * made.mask_T)
    assert logprobs(policy(model), made).entropy_T is None


@pytest.mark.parametrize("layout", (PACKED, PADDED), ids=("packed", "padded"))
def test_hidden_states_in_the_order_of_the_batch(layout: Layout) -> None:
    model = build("llama")
    made = batch(4, 7)
    hidden_TD = logprobs(policy(model, layout), made, hidden=True).hidden_TD
    assert hidden_TD is not None
    model.set_attn_implementation("eager")
    second = model.get_decoder()(made.input_T[4:][None]).last_hidden_state[0]
    torch.testing.assert_close(hidden_TD[4:], second, atol=1e-5, rtol=0)


@pytest.mark.parametrize("layout", (PACKED, PADDED), ids=("packed", "padded"))
@pytest.mark.parametrize("family", ("qwen3_5_moe_text", "mixtral", "gpt_oss", "qwen2"))
@pytest.mark.parametrize("idle", ("filler", "untrained"))
def test_idle_micro_batches_give_zero_gradients_to_all_that_is_trained(family: str, layout: Layout, idle: str) -> None:
    """A rank without work must run the same collectives: the graph stays attached, its gradients are exact zeros."""
    model = build(family)
    if layout is PACKED:
        layout = leak.check(Scorer(model))[0]

    def gradients(made: Batch) -> dict[str, Tensor]:
        model.zero_grad()
        logp_T = logprobs(policy(model, layout), made).logp_T
        logp_T.sum().backward()
        return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}

    busy = gradients(batch(7, 5))
    quiet = gradients(collate([]) if idle == "filler" else batch(7, 5, trained=0.0))
    assert set(quiet) == set(busy)
    assert all(not grad.any() for grad in quiet.values())
    assert any(grad.any() for grad in busy.values())


def test_trained_and_tied_heads_get_their_gradient() -> None:
    model: Any = build("qwen2")
    assert model.get_output_embeddings().weight is model.get_input_embeddings().weight
    made = batch(12)
    weight = model.get_output_embeddings().weight
    (found,) = torch.autograd.grad(logprobs(policy(model), made).logp_T.sum(), [weight])
    own_TV = own_logits(model, made).log_softmax(-1)
    own = (own_TV.gather(1, made.target_T[:, None])[:, 0] * made.mask_T).sum()
    (expected,) = torch.autograd.grad(own, [weight])
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)


def test_lora_on_the_head_and_inside() -> None:
    from peft import LoraConfig, inject_adapter_in_model

    model = build("llama")
    config = LoraConfig(r=4, lora_alpha=12, target_modules=["q_proj", "lm_head"], init_lora_weights=False)
    inject_adapter_in_model(config, model)
    made = batch(12)
    lora = {name: p for name, p in model.named_parameters() if "lora_" in name}
    assert any("lm_head" in name for name in lora)
    logp_T = logprobs(policy(model), made).logp_T
    found = torch.autograd.grad(logp_T.sum(), list(lora.values()))
    own_TV = own_logits(model, made).log_softmax(-1)
    own_T = own_TV.gather(1, made.target_T[:, None])[:, 0] * made.mask_T
    torch.testing.assert_close(logp_T, own_T, atol=1e-5, rtol=0)
    for grad, expected in zip(found, torch.autograd.grad(own_T.sum(), list(lora.values())), strict=True):
        assert expected.any()
        torch.testing.assert_close(grad, expected, atol=1e-5, rtol=1e-4)


def test_dropout_on_an_adapted_head_is_refused() -> None:
    from peft import LoraConfig, inject_adapter_in_model

    model = build("llama").train()
    inject_adapter_in_model(LoraConfig(r=4, lora_dropout=0.1, target_modules=["lm_head"]), model)
    with pytest.raises(ModelError, match=r"adapter\.dropout"):
        logprobs(policy(model), batch(4))


@pytest.mark.parametrize("layout", (PACKED, PADDED), ids=("packed", "padded"))
@pytest.mark.parametrize("family", ("mixtral", "qwen3_moe", "olmoe", "gpt_oss"))
def test_balance_loss_is_the_familys_own_over_real_tokens(family: str, layout: Layout) -> None:
    model = build(family)
    made = batch(9, 4, 6)
    found = logprobs(policy(model, layout, aux=0.5), made).aux
    model.set_attn_implementation("eager")
    rows, mask = torch.zeros(3, 9, dtype=torch.int64), torch.zeros(3, 9, dtype=torch.int64)
    for row, (start, length) in enumerate(zip((0, 9, 13), (9, 4, 6), strict=True)):
        rows[row, :length], mask[row, :length] = made.input_T[start : start + length], 1
    expected = model(rows, attention_mask=mask, output_router_logits=True).aux_loss
    assert found is not None and found.requires_grad
    torch.testing.assert_close(found, 0.5 * expected)
    idle = logprobs(policy(model, layout, aux=0.5), collate([])).aux
    assert idle is not None and idle.item() == 0.0 and idle.requires_grad
    assert logprobs(policy(model, layout), made).aux is None


def test_balance_loss_of_a_family_without_one_is_refused() -> None:
    with pytest.raises(ModelError, match="no load-balancing loss"):
        logprobs(policy(build("llama"), aux=0.1), batch(4))


def test_forwarded_counts_padding() -> None:
    model = build("llama")
    assert forwarded(policy(model, PACKED), batch(9, 4, 6)) == 19
    assert forwarded(policy(model, PADDED), batch(9, 4, 6)) == 27
    assert forwarded(policy(model, PADDED), collate([])) == collate([]).input_T.shape[0]


# FSDP: two ranks, of which the second has no work.

FSDP_FAMILY = "qwen3_5_moe_text"


def _rank(rank: int, port: int, folder: str) -> None:
    import torch.distributed as c10d
    from torch.distributed.fsdp import fully_shard
    from torch.distributed.tensor import DTensor

    torch.set_num_threads(1)
    c10d.init_process_group("gloo", init_method=f"tcp://127.0.0.1:{port}", rank=rank, world_size=2)
    scorer: Any = Scorer(build(FSDP_FAMILY))
    for module in (*scorer.model.get_decoder().layers, scorer):
        sharded = fully_shard(module)
        sharded.set_gradient_divide_factor(1.0)
        sharded.set_force_sum_reduction_for_comms(True)
    chosen, _ = leak.check(scorer)
    assert all(parameter.grad is None for parameter in scorer.parameters())
    mine = Policy(scorer=scorer, config=scorer.model.config, layout=chosen)
    logp_T = logprobs(mine, batch(7, 12) if rank == 0 else collate([])).logp_T
    logp_T.sum().backward()
    grads = {}
    for name, parameter in scorer.model.named_parameters():
        assert isinstance(parameter.grad, DTensor), name
        grads[name] = parameter.grad.full_tensor()
    assert chosen.split
    if rank == 0:
        save_file({"logp": logp_T.detach(), **grads}, Path(folder) / "out.safetensors")
    c10d.destroy_process_group()


def test_two_sharded_ranks_of_which_one_is_idle(tmp_path: Path) -> None:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    mp.spawn(_rank, (port, str(tmp_path)), nprocs=2)
    found = load_file(tmp_path / "out.safetensors")
    model = build(FSDP_FAMILY)
    layout = Layout(kind="packed", attention=BY_DOCUMENT, split=True)
    logp_T = logprobs(policy(model, layout), batch(7, 12)).logp_T
    logp_T.sum().backward()
    torch.testing.assert_close(found["logp"], logp_T.detach())
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None and math.isfinite(float(parameter.grad.sum()))
        torch.testing.assert_close(found[name], parameter.grad, atol=1e-5, rtol=1e-4)
