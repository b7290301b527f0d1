"""Estimates before loading: exact for what stays, of the right size for what passes, and a refusal that helps."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from attrs import evolve
from tiny_models import FAMILIES, config

from ft.errors import CapacityError
from ft.methods.reward import Reward
from ft.methods.sft import SFT
from ft.methods.stepwise import Stepwise
from ft.models import head, load, lora, memory, quant
from ft.models.build import structure
from ft.models.memory import Estimate, estimate, fits, size
from ft.recipe import NF4, AdamW, Batching, Data, LoRA, Model, Recipe
from ft.recipe.parts import Parallel
from ft.types import asked

ROWS = Data(train=("rows.jsonl",))
LORA = LoRA(targets=("attention",))


def recipe(adapter: LoRA | None = None, **over: Any) -> Recipe:
    model = Model(id="x", quant=over.pop("quant", None), checkpointing=over.pop("checkpointing", True))
    return Recipe(model=model, data=ROWS, method=SFT(), adapter=adapter, **over)


def held(family: str, quant_: NF4 | None, dtype: str = "bfloat16") -> tuple[Any, int]:
    """A loaded model and the bytes of all its tensors, a tied one once."""
    net = load.skeleton(config(family), Model(id="x", dtype=dtype))  # type: ignore[arg-type]
    if quant_ is not None:
        quant.apply(net, quant.plan(net, quant_), quant_)
    load.fill_random(net, 0)
    tensors = {id(t): t for t in [*net.parameters(), *net.buffers()]}
    return net, sum(t.numel() * t.element_size() for t in tensors.values())


@pytest.mark.parametrize("how", [None, NF4()], ids=["bf16", "nf4"])
@pytest.mark.parametrize("family", FAMILIES)
def test_weights_are_counted_exactly(family: str, how: NF4 | None) -> None:
    need = estimate(recipe(LORA, quant=how), config(family))
    assert need.weights == held(family, how)[1] == sum(need.by_dtype.values())


@pytest.mark.parametrize("family", ["llama", "qwen3_5_moe_text", "gpt_oss", "nemotron_h"])
def test_adapters_are_counted_exactly(family: str) -> None:
    adapter = LoRA(r=4, targets=("all-linear",))
    net = load.skeleton(config(family), Model(id="x"))
    elements = memory.adapter_elements(net, adapter)
    lora.attach(net, adapter)
    assert elements == sum(p.numel() for p in net.parameters() if p.requires_grad)


def test_adapters_by_hand() -> None:
    """llama of width 64, 2 layers: q 64 x 64, k and v 64 x 32 each, o 64 x 64; rank 8; float32."""
    need = estimate(recipe(LoRA(r=8, targets=("attention",))), config("llama"))
    elements = 2 * 8 * (128 + 96 + 96 + 128)
    assert need.adapters == need.gradients == 4 * elements
    assert need.optimizer == 8 * elements
    eight = estimate(recipe(LoRA(r=8, targets=("attention",)), optim=AdamW(bits=8)), config("llama"))
    assert eight.optimizer == 2 * elements


def test_full_fine_tuning_holds_float32_masters() -> None:
    need = estimate(recipe(), config("llama"))
    net, held_bytes = held("llama", None, dtype="float32")
    trained = sum(p.numel() for p in net.parameters())
    assert need.weights == held_bytes and need.adapters == 0
    assert need.gradients == 4 * trained and need.optimizer == 8 * trained


@pytest.mark.parametrize("adapter", [None, LORA], ids=["full", "lora"])
@pytest.mark.parametrize("method", [Reward(), Stepwise()], ids=["reward", "stepwise"])
def test_a_head_that_scores_stands_in_the_place_of_the_vocabulary_s(method: Any, adapter: LoRA | None) -> None:
    """Counted against the model that a run builds: a head of a few rows of D, trained, and no tile of logits."""
    asks = asked(method)
    of = evolve(recipe(adapter), method=method)
    planned = head.planned(config("llama", tie_word_embeddings=False), asks)
    need = estimate(of, planned)
    net = structure(of.model, adapter, planned, asks).net
    trained = sum(p.numel() for p in net.parameters() if p.requires_grad)
    assert need.gradients == 4 * trained and need.optimizer == 8 * trained
    assert need.adapters == (0 if adapter is None else 4 * (trained - 64 * asks.classes - has_bias(net)))
    assert need.weights + need.adapters == sum(row.bytes for row in quant.table(net))
    language = estimate(recipe(adapter), planned)
    assert language.logits - need.logits == memory.TILE
    assert language.weights > need.weights


def has_bias(net: Any) -> int:
    """Weights of the head's bias."""
    return sum(p.numel() for p in head.parts(net).values() if p.ndim == 1)


def test_ranks_share_what_is_sharded() -> None:
    one, four = (estimate(recipe(LORA), config("llama"), world=n) for n in (1, 4))
    assert four.weights == -(-one.weights // 4) and four.optimizer == -(-one.optimizer // 4)
    assert four.activations == one.activations and one.gathered == 0 < four.gathered
    copies = estimate(recipe(LORA, parallel=Parallel(replicate=4)), config("llama"), world=4)
    assert copies.weights == one.weights


def test_quantising_and_checkpointing_save_memory() -> None:
    plain = estimate(recipe(LORA), config("qwen3_5_moe_text"))
    small = estimate(recipe(LORA, quant=NF4()), config("qwen3_5_moe_text"))
    assert small.weights < 0.45 * plain.weights  # 4.13 bits instead of 16, but for embeddings and head
    assert small.activations == plain.activations
    kept = estimate(recipe(LORA, checkpointing=False), config("llama", num_hidden_layers=12))
    recomputed = estimate(recipe(LORA), config("llama", num_hidden_layers=12))
    assert kept.activations > 4 * recomputed.activations
    assert estimate(recipe(LORA, batch=Batching(tokens=16384)), config("llama")).activations == 2 * plain_tokens()


def plain_tokens() -> int:
    return estimate(recipe(LORA, batch=Batching(tokens=8192)), config("llama")).activations


def test_the_estimate_of_activations_is_of_the_right_size() -> None:
    """What autograd keeps of a forward without checkpointing, counted by its own hooks."""
    net = load.skeleton(config("llama", num_hidden_layers=4), Model(id="x", dtype="float32"))
    load.fill_random(net, 0)
    own = {p.untyped_storage().data_ptr() for p in net.parameters()}
    kept: dict[int, int] = {}

    def keep(t: torch.Tensor) -> torch.Tensor:
        if (place := t.untyped_storage().data_ptr()) not in own:
            kept[place] = t.untyped_storage().nbytes()
        return t

    T = 256
    hidden: Any = net.get_submodule("model")
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda t: t):
        out = hidden(input_ids=torch.ones(1, T, dtype=torch.long)).last_hidden_state
    whole = recipe(checkpointing=False, batch=Batching(tokens=T))
    guess, _ = memory.passing(net, evolve(whole, model=evolve(whole.model, dtype="float32")))
    assert out.shape == (1, T, 64)
    assert 0.6 < guess / sum(kept.values()) < 1.6


# --- what there is, and the refusal ---------------------------------------------------------------------------------


NEED = Estimate(weights=10 * 2**30, adapters=0, gradients=2**30, optimizer=2**30, gathered=0, activations=2 * 2**30,
                logits=0, loading=2**30, by_dtype={"bfloat16": 10 * 2**30})  # fmt: skip


def test_peak_is_the_larger_of_loading_and_a_step() -> None:
    assert NEED.peak == 14 * 2**30
    assert evolve(NEED, loading=9 * 2**30).peak == 19 * 2**30


def test_refusal_says_what_is_needed_what_is_there_and_how_to_rehearse() -> None:
    fits(NEED, have=16 * 2**30)
    with pytest.raises(CapacityError) as e:
        fits(NEED, have=8 * 2**30, rehearsal="ft run recipes/x.py --tiny")
    text = str(e.value)
    assert "15.1 GB free" in text and "got: 8.0 GB" in text  # 14 GB, a twentieth more, and the process itself
    assert "weights 10.0 GB" in text and "ft run recipes/x.py --tiny" in text
    with pytest.raises(CapacityError, match=r"2 ranks of 14\.0 GB"):
        fits(NEED, have=16 * 2**30, ranks=2)


def test_free_memory_of_a_container(tmp_path: Path) -> None:
    assert memory._cgroup(tmp_path) is None
    (tmp_path / "memory.max").write_text("1000\n")
    (tmp_path / "memory.current").write_text("700\n")
    (tmp_path / "memory.stat").write_text("anon 500\ninactive_file 150\n")
    assert memory._cgroup(tmp_path) == 450
    (tmp_path / "memory.max").write_text("max\n")
    assert memory._cgroup(tmp_path) is None
    (tmp_path / "meminfo").write_text("MemTotal: 9 kB\nMemAvailable:     2048 kB\n")
    assert memory._meminfo(tmp_path / "meminfo") == 2 * 2**20
    assert 0 < memory.available("cpu") < 2**50


def test_size() -> None:
    assert [size(n) for n in (512, 1536, 5 * 2**20, 70 * 2**30, 3 * 2**40)] == [
        "512 B", "1.5 KB", "5.0 MB", "70.0 GB", "3.0 TB",
    ]  # fmt: skip
