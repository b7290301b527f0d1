"""References: a second model, copies that move, log-probs kept on disk; each against plain transformers or by hand."""

from __future__ import annotations

import math
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import tiny_models
import torch
import torch.nn.functional as F
from attrs import evolve
from safetensors.torch import load_file, save_file
from test_methods import PAIRS, one_step
from torch import Tensor
from transformers import AutoModelForCausalLM

from ft import DPO, NF4, LoRA, Model, dist
from ft.data.pack import collate
from ft.data.tokenizer import byte_tokenizer
from ft.dist import World, whole
from ft.errors import ModelError
from ft.io.weights import ModelFolder
from ft.models import lora
from ft.models.build import Built, build, plan_config
from ft.models.reference import (
    Second,
    base_factors,
    build_second,
    move,
    moving,
    policy_logps,
    reference_logps,
)
from ft.recipe import Parallel
from ft.train import optim, reference
from ft.types import Example

VOCAB = 128
ADAPTER = LoRA(r=4, alpha=8.0)
ONE = "attention", "mlp"


@pytest.fixture(scope="module")
def world() -> Iterator[World]:
    torch.set_num_threads(1)
    with dist.launched() as made:
        yield made


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, ModelFolder]:
    """Two models of one vocabulary and another family, saved by transformers."""
    found = {}
    for name, family, seed in (("student", "llama", 0), ("other", "qwen3", 1)):
        path = tmp_path_factory.mktemp("models") / name
        tiny_models.build(family, seed=seed, vocab_size=261).save_pretrained(path)
        byte_tokenizer().save_pretrained(path)
        found[name] = ModelFolder(path=path, id=str(path))
    return found


def second(folder: ModelFolder, **over: Any) -> Second:
    model = Model(id=folder.id, **{"dtype": "float32", **over})
    return Second(model=model, config=plan_config(model, folder, vocab=261), folder=folder, seed=0)


def policy_of(folder: ModelFolder, adapter: LoRA | None, world: World, **over: Any) -> Built:
    """The student; adapters that change it, where it has any."""
    model = Model(id=folder.id, **{"dtype": "float32", **over})
    config = plan_config(model, folder, vocab=261)
    built = build(model, adapter, config, folder, world=world, parallel=Parallel(), seed=0, say=quiet)
    for i, (name, p) in enumerate(optim.trained(built.policy.scorer.model).items()):
        if "lora_B" in name:
            dist.copy_into(p, torch.randn(p.shape, generator=torch.Generator().manual_seed(i)) * 0.2)
    return built


def quiet(line: str) -> None:
    pass


def referred(built: Built, reference: Any) -> Built:
    return evolve(built, policy=evolve(built.policy, reference=reference))


def total(model: Any, example: Example) -> Tensor:
    """Sum of the trained tokens' log-probs, by transformers' own logits."""
    tokens_L = torch.from_numpy(example.tokens_L).long()
    logp_LV = model(tokens_L[None, :-1], use_cache=False).logits[0].float().log_softmax(-1)
    return logp_LV.gather(1, tokens_L[1:, None])[:, 0][torch.from_numpy(example.mask_L[1:])].sum()


# A second model -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("adapter", [ADAPTER, None], ids=["lora", "full"])
def test_dpo_with_a_second_model_is_the_formula_on_two_models_of_transformers(
    world: World, folders: dict[str, ModelFolder], adapter: LoRA | None
) -> None:
    built = policy_of(folders["student"], adapter, world)
    other = build_second(second(folders["other"]), world=world, parallel=Parallel(), say=quiet)
    assert not optim.trained(other.scorer) and not other.scorer.training
    plain: Any = AutoModelForCausalLM.from_pretrained(folders["other"].path, attn_implementation="eager")
    with torch.no_grad():
        ref = torch.stack([total(plain, e) for e in PAIRS])
        logp_T = policy_logps(built.policy, collate(PAIRS))
    own = torch.stack([x.sum() for x in logp_T.split([len(e) - 1 for e in PAIRS])])
    h = 0.3 * (own - ref)
    expected = -F.logsigmoid(h[::2] - h[1::2]).mean()
    out, grads, _ = one_step(DPO(beta=0.3), referred(built, other), world)
    torch.testing.assert_close(out.loss.float(), expected, rtol=1e-5, atol=1e-6)
    assert float(out.sums["rewards/chosen"]) == pytest.approx(float(h[::2].mean()), abs=1e-4)
    assert all(p.grad is None for p in other.scorer.parameters())
    split, split_grads, batches = one_step(DPO(beta=0.3), referred(built, other), world, tokens=40)
    assert batches > 1
    torch.testing.assert_close(split.loss, out.loss, rtol=1e-5, atol=1e-6)
    for name, grad in grads.items():
        torch.testing.assert_close(split_grads[name], grad, rtol=1e-4, atol=1e-6)


def test_a_second_model_may_be_held_in_nf4(world: World, folders: dict[str, ModelFolder]) -> None:
    exact, packed = (
        build_second(second(folders["other"], quant=quant), world=world, parallel=Parallel(), say=quiet)
        for quant in (None, NF4())
    )
    a_T, b_T = (policy_logps(policy, collate(PAIRS)) for policy in (exact, packed))
    assert 1e-3 < (a_T - b_T).abs().max() < 0.5


def test_another_vocabulary_is_refused() -> None:
    own, other = byte_tokenizer(), byte_tokenizer()
    reference.same_vocabulary(own, other, "other")
    other.add_tokens(["<more>"])
    with pytest.raises(ModelError, match=r"(?s)other: .*1 tokens differ.*'<more>' is absent here and 261 there"):
        reference.same_vocabulary(own, other, "other")


# Full fine-tuning -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_full_fine_tuning_begins_at_log_2_and_moves(world: World, folders: dict[str, ModelFolder], dtype: str) -> None:
    built = policy_of(folders["student"], None, world, dtype=dtype)
    copy = build_second(second(folders["student"], dtype=dtype), world=world, parallel=Parallel(), say=quiet)
    assert {p.dtype for p in copy.scorer.parameters()} == {getattr(torch, dtype)}
    built = referred(built, copy)
    before = {name: p.clone() for name, p in copy.scorer.named_parameters()}
    optimizer = torch.optim.AdamW(optim.trained(built.policy.scorer.model).values(), lr=1e-3)
    losses = []
    for _ in range(3):
        out, _, _ = one_step(DPO(), built, world)
        losses.append(float(out.loss))
        optimizer.step()
    assert losses[0] == pytest.approx(math.log(2), abs=1e-7) and losses[2] < losses[1] < 0.69
    assert all(torch.equal(p, before[name]) for name, p in copy.scorer.named_parameters())


# A reference that moves -----------------------------------------------------------------------------------------------


def test_adapters_that_move_become_the_policy_and_leave_it_as_it_was(
    world: World, folders: dict[str, ModelFolder]
) -> None:
    built = policy_of(folders["student"], ADAPTER, world)
    policy, batch = built.policy, collate(PAIRS)
    follower = evolve(policy, reference=base_factors(policy))
    torch.testing.assert_close(reference_logps(follower, batch), reference_logps(policy, batch), rtol=0, atol=0)
    own = lora.adapter_state(policy.scorer.model)
    now_T = policy_logps(policy, batch)
    assert (now_T - reference_logps(follower, batch)).abs().max() > 0.01
    move(follower, 1.0)
    torch.testing.assert_close(reference_logps(follower, batch), now_T, rtol=0, atol=0)
    assert all(torch.equal(t, own[name]) for name, t in lora.adapter_state(policy.scorer.model).items())
    for p in lora.factors(policy.scorer.model).values():
        dist.copy_into(p.detach(), torch.zeros(p.shape))
    torch.testing.assert_close(reference_logps(follower, batch), now_T, rtol=0, atol=0)
    torch.testing.assert_close(policy_logps(follower, batch), reference_logps(policy, batch), rtol=0, atol=0)


def test_a_copy_of_all_weights_moves_by_its_part(world: World, folders: dict[str, ModelFolder]) -> None:
    built = policy_of(folders["student"], None, world, dtype="bfloat16")
    kept = evolve(second(folders["student"], dtype="bfloat16"), moves=True)
    policy = evolve(built.policy, reference=build_second(kept, world=world, parallel=Parallel(), say=quiet))
    start = {name: whole(t).clone() for name, t in moving(policy).items()}
    assert {t.dtype for t in start.values()} == {torch.float32}, "small steps would be lost in 16 bits"
    with torch.no_grad():
        for p in built.policy.scorer.parameters():
            p.add_(0.01)
    batch = collate(PAIRS)
    assert (policy_logps(policy, batch) - reference_logps(policy, batch)).abs().max() > 0
    move(policy, 0.25)
    for name, t in moving(policy).items():
        torch.testing.assert_close(whole(t), start[name] + 0.0025, rtol=0, atol=1e-6)
    move(policy, 1.0)
    torch.testing.assert_close(reference_logps(policy, batch), policy_logps(policy, batch), rtol=0, atol=0)


# Ranks ----------------------------------------------------------------------------------------------------------------


def moved_step(world: World, adapter: LoRA | None, tokens: int, folders: dict[str, ModelFolder]) -> dict[str, Tensor]:
    """A step against a second model, and one against a reference that has followed the policy half way."""
    built = policy_of(folders["student"], adapter, world)
    other = build_second(second(folders["other"]), world=world, parallel=Parallel(), say=quiet)
    first, grads, _ = one_step(DPO(), referred(built, other), world, tokens=tokens)
    if adapter is None:
        start = build_second(
            evolve(second(folders["student"]), moves=True), world=world, parallel=Parallel(), say=quiet
        )
        built = referred(built, start)
    else:
        built = referred(built, base_factors(built.policy))
    with torch.no_grad():
        for p in optim.trained(built.policy.scorer.model).values():
            dist.local_rows(p)[0].add_(0.01)
    move(built.policy, 0.5 if adapter is None else 1.0)
    with torch.no_grad():
        for p in optim.trained(built.policy.scorer.model).values():
            dist.local_rows(p)[0].mul_(1.1)
    second_step, more, _ = one_step(DPO(), built, world, tokens=tokens)
    return {"first": first.loss, "second": second_step.loss, **grads, **{f"second/{k}": v for k, v in more.items()}}


def on_two_ranks(folder: Path, models: Path) -> None:
    torch.set_num_threads(1)
    folders = {name: ModelFolder(path=models / name, id=str(models / name)) for name in ("student", "other")}
    with dist.launched() as world:
        for name, adapter in (("lora", ADAPTER), ("full", None)):
            found = moved_step(world, adapter, 40, folders)
            if world.first:
                save_file({k: v.detach().float().contiguous() for k, v in found.items()}, folder / name)


def test_references_are_the_same_on_two_ranks(world: World, folders: dict[str, ModelFolder], tmp_path: Path) -> None:
    models = tmp_path / "models"
    models.mkdir()
    for name, folder in folders.items():
        (models / name).symlink_to(folder.path)
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    done = subprocess.run(
        [sys.executable, *launcher, __file__, str(tmp_path), str(models)], capture_output=True, text=True, timeout=200
    )
    assert done.returncode == 0, done.stderr[-4000:]
    for name, adapter in (("lora", ADAPTER), ("full", None)):
        expected, found = moved_step(world, adapter, 512, folders), load_file(tmp_path / name)
        assert found.keys() == expected.keys() and abs(float(found["second"]) - math.log(2)) > 1e-4
        for key_, value in expected.items():
            torch.testing.assert_close(found[key_], value.detach().float(), rtol=1e-4, atol=1e-5)


if __name__ == "__main__":
    on_two_ranks(Path(sys.argv[1]), Path(sys.argv[2]))
