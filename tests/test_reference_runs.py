"""Whole runs with a reference: kept log-probs, full fine-tuning, one that moves and is taken up again."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from attrs import evolve
from safetensors.torch import load_file

from ft import BCO, DPO, GRPO, KTO, SFT, AdamW, Batching, Constant, Data, Distill, LoRA, Model, Recipe, Reference, Save
from ft.errors import CheckpointError, MissingFileError, RecipeError
from ft.models import memory
from ft.models import reference as references
from ft.models.build import plan_config
from ft.models.reference import Second
from ft.recipe import rehearse
from ft.train import known, reference
from ft.train.known import Known, key
from ft.train.loop import train
from ft.types import Context, Example, Given

TINY = Model(id="nowhere/llama", family="llama", tiny=True, dtype="float32")
OTHER = Reference(model=Model(id="nowhere/qwen3", family="qwen3", tiny=True, dtype="float32"))
ADAPTER = LoRA(r=4, targets=("attention",))


def length(rollout: Any) -> float:
    return float(len(rollout.tokens_L))


SAMPLES = GRPO(rewards=length, kl=0.1)


@pytest.fixture(autouse=True)
def calm() -> None:
    torch.set_num_threads(1)


def pairs(path: Path, count: int = 6, word: str = "word") -> Path:
    rows = [
        {
            "prompt": [{"role": "user", "content": f"say {i}"}],
            "chosen": [{"role": "assistant", "content": f"{word} " * (i % 3 + 1)}],
            "rejected": [{"role": "assistant", "content": "nothing"}],
        }
        for i in range(count)
    ]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def recipe(folder: Path, name: str, **changes: Any) -> Recipe:
    rows = folder / "pairs.jsonl"
    base = Recipe(
        model=TINY,
        adapter=ADAPTER,
        data=Data(train=str(rows if rows.exists() else pairs(rows)), cache=folder / "cache"),
        method=DPO(),
        optim=AdamW(lr=1e-2),
        schedule=Constant(),
        batch=Batching(examples=3, tokens=128),
        save=Save(dir=folder / name, every=2),
        steps=4,
    )
    return evolve(base, **changes)


def losses(folder: Path) -> list[float]:
    rows = map(json.loads, (folder / "metrics.jsonl").read_text().splitlines())
    return [row["loss"] for row in rows if "loss" in row]


def weights(run: Path, step: int) -> dict[str, torch.Tensor]:
    return {
        f"{path.stem}/{name}": tensor
        for path in sorted((run / f"step-{step:06d}").glob("*.safetensors"))
        for name, tensor in load_file(path).items()
    }


def same(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(t, b[name]) for name, t in a.items())


# Kept log-probs -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", [DPO(), KTO(), BCO()], ids=["dpo", "kto", "bco"])
def test_kept_log_probs_give_the_same_run_and_build_the_reference_once(
    tmp_path: Path, method: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    built: list[Second] = []
    real = references.build_second

    def counting(second: Second, **options: Any) -> Any:
        built.append(second)
        return real(second, **options)

    monkeypatch.setattr(reference, "build_second", counting)
    kept = evolve(OTHER, cached=True)
    for name, ref in (("live", OTHER), ("cold", kept), ("warm", kept)):
        made = recipe(tmp_path, name, reference=ref, method=method)
        held_out = str(tmp_path / "pairs.jsonl")
        train(evolve(made, data=evolve(made.data, eval=held_out)))
    assert len(built) == 2, "once live, once to fill the cache"
    live, cold, warm = (losses(tmp_path / name) for name in ("live", "cold", "warm"))
    assert len(live) == 4 and cold == pytest.approx(live, abs=2e-6) and warm == cold
    assert same(weights(tmp_path / "cold", 4), weights(tmp_path / "warm", 4))
    changed = recipe(tmp_path, "changed", reference=kept, method=method)
    pairs(tmp_path / "pairs.jsonl", word="other")
    train(changed)
    assert len(built) == 3, "other rows are computed anew"
    train(evolve(changed, save=Save(dir=tmp_path / "again"), seed=1))
    assert len(built) == 4, "another model (of another seed) too"


def test_kept_log_probs_of_full_fine_tuning_are_those_of_the_start(tmp_path: Path) -> None:
    kept = recipe(tmp_path, "kept", adapter=None, reference=Reference(cached=True))
    train(kept)
    train(evolve(kept, save=Save(dir=tmp_path / "live", every=2), reference=Reference()))
    first, live = losses(tmp_path / "kept"), losses(tmp_path / "live")
    assert first[0] == pytest.approx(np.log(2), abs=1e-6) and live[0] == pytest.approx(np.log(2), abs=1e-7)
    assert first == pytest.approx(live, abs=1e-5) and live[3] < 0.69
    train(evolve(kept, steps=6), resume=True)
    train(evolve(kept, steps=6, save=Save(dir=tmp_path / "through", every=2)))
    assert same(weights(tmp_path / "kept", 6), weights(tmp_path / "through", 6))


def example(*tokens: int, trained: int = 1) -> Example:
    mask_L = np.arange(len(tokens)) >= len(tokens) - trained
    return Example(tokens_L=np.array(tokens, np.int32), mask_L=mask_L, source="row")


def test_values_are_laid_where_the_mask_is_and_found_by_content() -> None:
    row = example(5, 6, 7, 8, trained=2)
    values = {key(row): np.array([-1.0, -2.0], np.float32)}
    method = Known(method=SFT(), values=values)
    (found,) = method.examples(0, Context(data=Given(examples=[row]), examples=1, seed=0))
    assert found.ref_logp_L is not None and found.ref_logp_L.tolist() == [0.0, 0.0, -1.0, -2.0]
    for other in (example(5, 6, 7, 9, trained=2), example(5, 6, 7, 8, trained=1)):
        with pytest.raises(RecipeError, match=r"(?s)reference\.cached: .*not computed.*got: row"):
            method.examples(0, Context(data=Given(examples=[other]), examples=1, seed=0))


def test_a_damaged_file_is_announced_and_computed_anew(tmp_path: Path) -> None:
    made = recipe(tmp_path, "run", reference=Reference(cached=True))
    train(made)
    (path,) = (tmp_path / "cache" / "reference").rglob("*.safetensors")
    said: list[str] = []
    assert len(known.read(path.parent, said.append)) == 12 and not said, "two answers of six pairs"
    path.write_bytes(path.read_bytes()[:-1] + b"x")
    assert known.read(path.parent, said.append) == {} and "damaged" in said[0]


# A reference that moves -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("adapter", "mix"), [(ADAPTER, 1.0), (None, 1.0), (None, 0.5)], ids=["lora", "full", "full, soft"]
)
def test_a_moving_reference_is_kept_and_taken_up_again(tmp_path: Path, adapter: LoRA | None, mix: float) -> None:
    moves = recipe(tmp_path, "through", adapter=adapter, reference=Reference(every=2, mix=mix), steps=6)
    train(moves)
    again = evolve(moves, save=evolve(moves.save, dir=tmp_path / "halves"))
    train(evolve(again, steps=4))
    train(again, resume=True)
    through = weights(tmp_path / "through", 6)
    assert same(through, weights(tmp_path / "halves", 6))
    through_losses = losses(tmp_path / "through")
    assert losses(tmp_path / "halves") == through_losses
    if mix == 1:  # right after an update, policy and reference are one
        assert [through_losses[i] for i in (0, 2, 4)] == pytest.approx([np.log(2)] * 3, abs=1e-6)
        stem = "adapter_model" if adapter else "model"
        kept = {n.partition("/")[2]: t for n, t in through.items() if n.startswith("reference/")}
        own = {n.partition("/")[2]: t for n, t in through.items() if n.startswith(f"{stem}/")}
        assert len(kept) > 5 and all(torch.equal(t, own[name]) for name, t in kept.items())
    assert all(abs(loss - np.log(2)) > 1e-3 for loss in through_losses[1::2]), "between updates they are two"


def test_a_reference_that_does_not_move_is_in_no_checkpoint(tmp_path: Path) -> None:
    train(recipe(tmp_path, "run", adapter=None, steps=2))
    assert not any(name.startswith("reference/") for name in weights(tmp_path / "run", 2))
    moves = recipe(tmp_path, "run", adapter=None, steps=4, reference=Reference(every=2))
    with pytest.raises(CheckpointError, match=r"reference\.every: 0 -> 2"):
        train(moves, resume=True)


# What is refused ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"method": SFT(), "reference": OTHER}, "reference: SFT has no reference"),
        ({"method": SFT(), "reference": Reference(cached=True)}, "reference: SFT has no reference"),
        ({"method": SAMPLES, "reference": Reference(cached=True)}, r"reference\.cached: GRPO samples its answers"),
        ({"reference": Reference(every=2, mix=0.5)}, r"reference\.mix: adapters cannot be mixed"),
        (
            {"method": Distill(), "reference": evolve(OTHER, cached=True)},
            r"reference\.cached: Distill learns from whole",
        ),
        (
            {"method": Distill(), "reference": Reference(every=1)},
            r"reference\.every: Distill cannot learn from adapters",
        ),
    ],
)
def test_what_cannot_be_honoured_is_refused(tmp_path: Path, changes: dict[str, Any], message: str) -> None:
    with pytest.raises(RecipeError, match=message):
        reference.check(recipe(tmp_path, "run", **changes))


def test_options_that_exclude_each_other_are_refused() -> None:
    refused: list[tuple[dict[str, Any], str]] = [
        ({"cached": True, "every": 1}, "'every' must be 0 with cached=True"),
        ({"every": 1, "model": TINY}, "'every' must be 0 with a second model"),
        ({"mix": 0.5}, "'mix' must be left at 1 with every=0"),
        ({"every": 1, "mix": 0.0}, "'mix' must be > 0"),
    ]
    for options, message in refused:
        with pytest.raises(ValueError, match=message):
            Reference(**options)


def test_a_second_model_that_is_not_there_is_named_by_its_place(tmp_path: Path) -> None:
    absent = Reference(model=Model(id=str(tmp_path / "absent")))
    with pytest.raises(MissingFileError, match=r"reference\.model\.id: there is no model folder"):
        reference.find(recipe(tmp_path, "run", reference=absent), None, None, None)


def test_a_rehearsal_has_a_look_alike_of_the_second_model(tmp_path: Path) -> None:
    real = recipe(tmp_path, "run", reference=Reference(model=Model(id="a/b", family="qwen3")))
    second = rehearse(real).reference.model
    assert second is not None and second.tiny and second.dtype == "float32" and second.family == "qwen3"


# Memory ---------------------------------------------------------------------------------------------------------------


def test_the_estimate_counts_the_reference(tmp_path: Path) -> None:
    config = plan_config(TINY, None, vocab=261)
    full = recipe(tmp_path, "run", adapter=None)
    alone = memory.estimate(full, config)
    second = Second(model=TINY, config=config, folder=None, seed=0)
    with_copy = memory.estimate(full, config, second=second)
    assert alone.reference == 0 and with_copy.reference == alone.weights
    assert with_copy.peak == alone.peak + alone.weights
    half = evolve(second, model=evolve(TINY, dtype="bfloat16"))
    assert memory.estimate(full, config, second=half).reference < 0.55 * alone.weights
    assert memory.estimate(full, config, second=evolve(half, moves=True)).reference == alone.weights
    kept = evolve(full, reference=evolve(OTHER, cached=True))
    assert memory.estimate(kept, config, second=second).reference == 0
    moving = recipe(tmp_path, "run", reference=Reference(every=1))
    assert memory.estimate(moving, config).reference == memory.estimate(moving, config).adapters > 0
