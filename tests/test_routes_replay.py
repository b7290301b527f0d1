"""The sampler's experts on their way to training: through answers, examples and batches, however a step is split.

Wherever an answer has routes, its log-probs must be those of the sequence alone under ``routes.given``.
"""
# ruff: noqa: F811  (fixtures of another file)

from __future__ import annotations

import base64
import io
import json
import os
import subprocess
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from attrs import evolve
from fake_vllm import Fake
from safetensors.torch import load_file
from test_environment import prompt as asked
from test_environment import sampler as talking
from test_methods import one_step
from test_vllm import Tiny, fake, prompts, sampler, world  # noqa: F401  (fixtures)
from tiny_models import build as tiny

from ft import (
    GRPO,
    VLLM,
    Batching,
    Constant,
    Correction,
    Data,
    LoRA,
    Model,
    Recipe,
    RewardFunction,
    Sampling,
    Save,
    dist,
)
from ft.data.pack import collate
from ft.data.share import share_prompts
from ft.data.tokenizer import byte_tokenizer
from ft.dist import World
from ft.errors import ModelError, RecipeError, ServerError
from ft.io import checkpoint
from ft.methods import credit, replay
from ft.models import leak, routes
from ft.models.build import Built, build, plan_config, recompute
from ft.models.experts import use_ft_experts
from ft.models.policy import logprobs
from ft.models.reference import reference_logps
from ft.recipe import Parallel
from ft.rollout import routed
from ft.rollout.ahead import AheadSampler
from ft.rollout.client import Malformed
from ft.rollout.rewards import exact, matches
from ft.rollout.server import launch
from ft.train import kept, optim
from ft.train.loop import train
from ft.train.scoring import score
from ft.types import Example, Rollout

VOCAB = 96
SIZES = ((9, (5, 1, 7, 3)), (4, (6, 2)), (1, (8, 4)))  # tokens of prompts, and of the answers to each


def moe(world: World, family: str = "qwen3_moe", kind: Any = "packed") -> Built:
    """A tiny model with adapters that change it, some of them on its experts."""
    chosen, adapter = (
        Model(id="-", family=family, dtype="float32", tiny=True),
        LoRA(r=4, targets=("attention", "experts")),
    )
    made = build(
        chosen, adapter, plan_config(chosen, None, vocab=VOCAB), None, world=world, parallel=Parallel(), seed=0,
        say=lambda _: None,
    )  # fmt: skip
    for i, (name, p) in enumerate(sorted(optim.trained(made.policy.scorer.model).items())):
        if "lora_B" in name or name.endswith("_B"):
            dist.copy_into(p, torch.randn(p.shape, generator=torch.Generator().manual_seed(i)) * 0.2)
    layout, _ = leak.check(made.policy.scorer, requested=kind)
    return evolve(made, policy=evolve(made.policy, layout=layout))


def answers() -> list[list[Rollout]]:
    rng, found = np.random.default_rng(0), []
    for number, (size, lengths) in enumerate(SIZES):
        tokens_L = rng.integers(3, VOCAB, size).astype(np.int32)
        prompt = Example(tokens_L=tokens_L, mask_L=np.zeros(size, bool), source=f"p:{number}")
        found.append([
            Rollout(
                prompt=prompt, tokens_L=rng.integers(3, VOCAB, n).astype(np.int32), finish="stop", policy_step=0,
                logp_L=np.full(n, -np.log(VOCAB), np.float32), reward=float(k),
            )
            for k, n in enumerate(lengths)
        ])  # fmt: skip
    return found


def own(built: Built, rollout: Rollout) -> np.ndarray:
    """routes_LMK as a server tells them that runs this very model."""
    tokens_L = np.concatenate([rollout.prompt.tokens_L, rollout.tokens_L])
    batch = collate([Example(tokens_L=tokens_L, mask_L=np.ones(len(tokens_L), bool))])
    with torch.no_grad(), routes.chosen(built.policy.scorer.model) as found:
        logprobs(built.policy, batch)
    return torch.stack(found).transpose(0, 1).numpy().astype(np.int16)


def other(built: Built, rollout: Rollout) -> np.ndarray:
    """Each expert's neighbour, in the other order."""
    return (own(built, rollout) ^ 1)[..., ::-1].copy()


Choice = Callable[[Built, Rollout], "np.ndarray | None"]


def examples(built: Built, choice: Choice | None, *, tokens: int | None = 512) -> list[Example]:
    groups = answers()
    if choice is not None:
        groups = [[evolve(r, routes_LMK=choice(built, r)) for r in group] for group in groups]
    return credit.to_examples(groups, tokens=tokens)


def said(built: Built, rows: list[Example], *, share: bool = False) -> torch.Tensor:
    with torch.no_grad():
        return logprobs(built.policy, collate(share_prompts(rows) if share else rows)).logp_T


def grpo(**options: Any) -> GRPO:
    return GRPO(**{"rewards": exact, "sampling": Sampling(max_tokens=10), "correction": Correction(), **options})


# --- laid out --------------------------------------------------------------------------------------------------------


def numbered(*tokens: int, first: int | None, unit: int | None = None) -> Example:
    """One layer and one expert per token: ``first``, ``first`` + 1, ..., and -1 for the last."""
    routes = None if first is None else np.array([*range(first, first + len(tokens) - 1), -1], np.int16)[:, None, None]
    mask_L = np.arange(len(tokens)) == len(tokens) - 1
    return Example(tokens_L=np.array(tokens, np.int32), mask_L=mask_L, unit=unit, routes_LMK=routes)


def test_routes_belong_to_inputs_and_are_not_shifted():
    batch = collate([numbered(5, 6, 7, first=10), numbered(8, 9, first=None), numbered(1, 2, first=20)])
    assert batch.input_T.tolist() == [5, 6, 8, 1] and batch.target_T.tolist() == [6, 7, 9, 2]
    assert batch.routes_MTK is not None and batch.routes_MTK.dtype == torch.int16
    assert batch.routes_MTK.tolist() == [[[10], [11], [-1], [20]]]
    assert collate([numbered(8, 9, first=None)]).routes_MTK is None and collate([]).routes_MTK is None
    with pytest.raises(AssertionError, match="not its experts per token"):
        collate([evolve(numbered(5, 6, 7, first=10), routes_LMK=np.zeros((2, 1, 1)))])


def test_a_shared_prompt_goes_by_its_first_answers_routes():
    rows = [numbered(5, 6, 7, 1, first=10, unit=0), numbered(5, 6, 7, 2, 3, first=20, unit=0)]
    batch = collate(share_prompts(rows))
    assert batch.input_T.tolist() == [5, 6, 7, 7, 2]
    assert batch.routes_MTK is not None and batch.routes_MTK[0, :, 0].tolist() == [10, 11, 12, 22, 23]


def test_an_example_has_routes_of_all_its_tokens_but_the_last():
    rollout = evolve(answers()[1][1], routes_LMK=np.arange(10, dtype=np.int16).reshape(5, 1, 2))
    (example,) = credit.to_examples([[rollout]])
    assert example.routes_LMK is not None and example.routes_LMK.dtype == np.int16
    assert example.routes_LMK[:, 0].tolist() == [[0, 1], [2, 3], [4, 5], [6, 7], [8, 9], [-1, -1]]


# --- forwarded -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["packed", "padded"])
@pytest.mark.parametrize("family", ["qwen3_moe", "glm4_moe"])
def test_the_models_own_routes_change_no_bit_and_others_do(world: World, family: str, kind: Any):
    built = moe(world, family, kind)
    plain = one_step(grpo(), built, world, examples=examples(built, None, tokens=30), tokens=30)
    same = one_step(grpo(), built, world, examples=examples(built, own, tokens=30), tokens=30)
    changed = one_step(grpo(), built, world, examples=examples(built, other, tokens=30), tokens=30)
    assert plain[2] == same[2] > 1
    assert torch.equal(same[0].loss, plain[0].loss) and not torch.allclose(changed[0].loss, plain[0].loss, rtol=1e-3)
    assert plain[1].keys() == same[1].keys() and all(torch.equal(same[1][name], g) for name, g in plain[1].items())


@pytest.mark.parametrize("kind", ["packed", "padded", "shared"])
def test_an_answer_with_routes_is_scored_as_if_it_stood_alone_with_them(world: World, kind: Any):
    """Beside answers without, which stay as they are."""
    built = moe(world, kind="padded" if kind == "padded" else "packed")
    assert kind != "shared" or built.policy.layout.shared
    plain, routed_, net = examples(built, None), examples(built, other), built.policy.scorer.model
    some = [b if i % 3 else a for i, (a, b) in enumerate(zip(plain, routed_, strict=True))]
    if kind == "shared":  # what is forwarded once for all answers has one choice
        some = routed_
    found, alone = said(built, some, share=kind == "shared"), []
    for example in some:
        row = evolve(example, routes_LMK=None)
        if example.routes_LMK is None:
            alone.append(said(built, [row]))
            continue
        with routes.given(net, torch.from_numpy(example.routes_LMK[:-1]).transpose(0, 1)):
            alone.append(said(built, [row]))
        assert not torch.allclose(alone[-1], said(built, [row]), atol=1e-3)
    trained = torch.cat(alone)[torch.cat(alone) != 0]
    torch.testing.assert_close(found[found != 0], trained, rtol=1e-4, atol=1e-5)


def test_loss_and_gradient_with_routes_do_not_depend_on_splits(world: World):
    built, padded = moe(world), moe(world, kind="padded")
    whole = one_step(grpo(), built, world, examples=examples(built, other))
    parts = one_step(grpo(), built, world, examples=examples(built, other, tokens=30), tokens=30)
    rows = one_step(grpo(), padded, world, examples=examples(padded, other, tokens=30), tokens=60)
    recompute(built.policy.scorer.model)
    built.policy.scorer.train()
    again = one_step(grpo(), built, world, examples=examples(built, other))
    assert whole[2] == 1 < parts[2] and rows[2] > 1
    for out, grads, _ in (parts, rows, again):
        torch.testing.assert_close(out.loss, whole[0].loss, rtol=1e-4, atol=1e-6)
        for name, grad in whole[1].items():
            torch.testing.assert_close(grads[name], grad, rtol=1e-3, atol=1e-6)


RANKS = """
import sys
import numpy as np
import torch
from safetensors.torch import save_file
from test_routes_replay import *
from ft.rollout.shared import Answer, from_all_ranks
torch.set_num_threads(1)
with dist.launched() as world:
    built = moe(world)
    steps = [one_step(grpo(), built, world, examples=examples(built, other, tokens=n), tokens=n) for n in (30, 512)]
    told = np.arange(40, dtype=np.int16).reshape(5, 4, 2) + 300
    mine = [[Answer(np.array([7, 8]), np.zeros(2), True, told), Answer(np.array([9]), np.zeros(1), False)], []]
    theirs = [[], [Answer(np.array([5]), np.zeros(1), True, told[:2] - 299)] * 2]
    every = from_all_ranks(mine if world.first else theirs, 2, world)
    found = [a.routes_LMK for group in every for a in group]
    assert np.array_equal(found[0], told) and found[0].dtype == np.int16 and found[1] is None
    assert np.array_equal(found[2], told[:2] - 299) and np.array_equal(found[3], found[2])
    assert [a.tokens_L.tolist() for group in every for a in group] == [[7, 8], [9], [5], [5]]
    if world.first:
        for (out, grads, _), name in zip(steps, ("both", "idle"), strict=True):
            save_file({"loss": out.loss.detach(), **grads}, f"{sys.argv[1]}/{name}")
"""


def test_two_ranks_learn_with_routes_what_one_does(world: World, tmp_path: Path):
    """Also where one of them has nothing to do."""
    here, file = Path(__file__).parent, tmp_path / "ranks.py"
    file.write_text(RANKS)
    env = {**os.environ, "PYTHONPATH": os.pathsep.join([str(here.parent), str(here)]), "OMP_NUM_THREADS": "1"}
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    done = subprocess.run(
        [*launcher, str(file), str(tmp_path)], env=env, capture_output=True, text=True, timeout=99
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    built = moe(world)
    out, grads, _ = one_step(grpo(), built, world, examples=examples(built, other))
    for found in (load_file(tmp_path / name) for name in ("both", "idle")):
        torch.testing.assert_close(found.pop("loss"), out.loss, rtol=1e-4, atol=1e-6)
        assert found.keys() == grads.keys()
        for name, grad in grads.items():
            torch.testing.assert_close(found[name], grad, rtol=1e-3, atol=1e-6)


def test_old_log_probs_are_of_the_same_routes_and_the_reference_routes_itself(world: World):
    built = moe(world)
    plain, rows = examples(built, None, tokens=30), examples(built, other, tokens=30)
    scores = score(rows, built.policy, world, tokens=30, temperature=1.0)
    held = [evolve(e, old_logp_L=s.logp_L) for e, s in zip(rows, scores, strict=True)]
    out, _, _ = one_step(grpo(), built, world, examples=held, tokens=30)
    assert float(out.maxes["ratio_max"]) == float(out.maxes["ratio_inverse_max"]) == 1.0
    wrong, _, _ = one_step(grpo(), built, world, examples=[evolve(e, routes_LMK=None) for e in held], tokens=30)
    assert float(wrong.maxes["ratio_max"]) > 1.001, "the test can fail"
    assert torch.equal(reference_logps(built.policy, collate(rows)), reference_logps(built.policy, collate(plain)))
    assert not torch.allclose(said(built, rows), said(built, plain), atol=1e-3)


def test_experts_that_are_not_there_are_told_before_they_are_used(world: World):
    built = moe(world)
    rows = examples(built, lambda built, rollout: own(built, rollout) + 8)
    with pytest.raises(ModelError, match=r"layer 0, token 0: .*cannot have\n.*2 different ones of 0 to 7"):
        said(built, rows)
    with pytest.raises(ModelError, match=r"another number of experts per token"):
        said(built, examples(built, lambda built, rollout: own(built, rollout)[..., :1]))


# --- kept, and of several turns --------------------------------------------------------------------------------------


def test_held_groups_keep_their_routes_through_a_checkpoint(world: World, tmp_path: Path):
    group = answers()[0]
    group = [evolve(r, routes_LMK=None if k == 1 else other(moe(world), r)) for k, r in enumerate(group)]
    value = {"grpo": {"held": replay.holding([], [group], 0, replay.Replay())}}
    checkpoint.save(tmp_path, 1, kept.entries(value), {"progress": {}, **kept.document(value)})
    (held,) = kept.restored(checkpoint.load(tmp_path / "step-000001"))["grpo"]["held"]
    for before, after in zip(group, replay.rollouts_of(held["group"]), strict=True):
        np.testing.assert_array_equal(after.routes_LMK, before.routes_LMK)  # type: ignore[arg-type]
    del held["group"]["routes"]  # as runs before routes wrote them
    assert [r.routes_LMK for r in replay.rollouts_of(held["group"])] == [None] * 4


def test_each_turn_keeps_the_experts_with_which_it_was_sampled():
    """A later turn tells those of all tokens before it; what had its experts by then keeps them."""
    made = talking({"a": ["<calc>2*3</calc>", "6"]})
    inner: Any = made.sampler
    plain, turns = inner.rollout, []

    def telling(prompts: list[Example], n: int, step: int, *, greedy: bool = False) -> list[list[Rollout]]:
        turns.append(len(prompts[0].tokens_L))
        ((one,),) = plain(prompts, n, step, greedy=greedy)
        told = np.full((len(prompts[0].tokens_L) + len(one.tokens_L) - 1, 1, 1), len(turns), np.int16)
        return [[evolve(one, routes_LMK=told)]]

    class Telling:
        rollout = staticmethod(telling)

    ((found,),) = evolve(made, sampler=Telling()).rollout([asked("a?", "6")], 1, 5)
    assert found.routes_LMK is not None and len(found.routes_LMK) == 2 + len(found.tokens_L) - 1
    first = 2 + len("<calc>2*3</calc>")  # and not the end of the turn, which was not forwarded before the second
    assert found.routes_LMK[:, 0, 0].tolist() == [1] * first + [2] * (len(found.routes_LMK) - first)


# --- told by a server ------------------------------------------------------------------------------------------------


def npy(array: np.ndarray, **options: Any) -> str:
    file = io.BytesIO()
    np.save(file, array, **options)
    return base64.b64encode(file.getvalue()).decode()


MODEL = routed.Routed(layers=3, place_M=np.array([1, 2]), experts_M=np.array([8, 4]))
TOLD = np.tile(np.array([[0, 0], [7, 2], [3, 1]], np.uint8), (5, 1, 1))


def test_layers_with_experts_are_picked_from_all_of_the_decoders():
    for kind in (np.uint8, np.uint16, np.int32):
        found = routed.read(npy(TOLD.astype(kind)), MODEL, 5, "")
        assert found.dtype == np.int16 and found[0].tolist() == [[7, 2], [3, 1]] and found.shape == (5, 2, 2)
    found = routed.read(npy(np.asfortranarray(TOLD)), MODEL, 5, "")
    assert found[4].tolist() == [[7, 2], [3, 1]]


def bad(at: tuple[int, ...], value: int) -> np.ndarray:
    found = TOLD.astype(np.int32)
    found[at] = value
    return found


@pytest.mark.parametrize(
    ("told", "message"),
    [
        (npy(TOLD[:4]), r"uint8, \(4, 3, 2\), not as integers, \(5, 3, experts per token\)"),
        (npy(TOLD[:, 1:]), r"\(5, 2, 2\), not as"),
        (npy(TOLD[..., 0]), r"\(5, 3\), not as"),
        (npy(TOLD[..., :0]), r"\(5, 3, 0\), not as"),
        (npy(TOLD.astype(np.float32)), "experts as float32"),
        (npy(bad((3, 2, 1), 4)), r"\[3, 4\] of token 3 in layer 2, which has 4"),
        (npy(bad((3, 1, 0), -1)), r"\[-1, 2\] of token 3 in layer 1, which has 8"),
        (npy(bad((0, 1, 0), 70_000)), r"\[70000, 2\] of token 0"),
        (npy(TOLD * 0), r"\[0, 0\] of token 0 in layer 1"),  # nothing was written down
        (npy(np.array([{}]), allow_pickle=True), "no array: Object arrays cannot be loaded"),
        (npy(TOLD)[:-8], "no array"),
        (base64.b64encode(b"PK\x03\x04" + bytes(40)).decode(), "no array"),
        ("?", "no array"), ("", "no array"),
    ],
)  # fmt: skip
def test_what_else_a_server_may_send_is_malformed(told: str, message: str):
    with pytest.raises(Malformed, match=message):
        routed.read(told, MODEL, 5, "")


def test_a_huge_array_that_is_only_announced_is_malformed():
    raw = base64.b64decode(npy(np.zeros((1, 3, 2), np.uint8))).replace(b"(1, 3, 2)", b"(9999999999999, 3, 2)")
    with pytest.raises(Malformed, match="no array"):
        routed.read(base64.b64encode(raw).decode(), MODEL, 5, "")


@pytest.mark.parametrize(
    ("family", "places"), [("qwen3_moe", [0, 1]), ("deepseek_v3", [1]), ("nemotron_h", [1]), ("gpt_oss", [0, 1])]
)
def test_where_a_family_has_experts(family: str, places: list[int]):
    net = tiny(family)
    policy: Any = type("Policy", (), {"scorer": type("Scorer", (), {"model": net}), "config": net.config})
    found = routed.routed(policy)
    assert (found.layers, found.place_M.tolist()) == (net.config.num_hidden_layers, places)
    assert found.experts_M.tolist() == [8] * len(places)


def test_a_server_that_tells_nothing_is_said_and_so_is_a_model_without_experts(
    fake: Fake, world: World, tmp_path: Path
):
    made = sampler(world, tmp_path, url=fake.url, routed=MODEL, options={"canary": None})
    made.sync(0)
    with pytest.raises(
        ServerError, match=rf"(?s){fake.url}: .*does not tell.*--enable-return-routed-experts.*ft serve"
    ):
        made.rollout(prompts(), 2, 0)
    fake.routes = lambda tokens: npy(TOLD)
    with pytest.raises(ServerError, match=r"(?s)what was not asked for.*\(5, 3, 2\), not as integers, \(7, 3"):
        made.rollout(prompts(), 2, 0)
    fake.routes = lambda tokens: npy(np.tile(TOLD[:1], (len(tokens), 1, 1)))
    ((one, _), _) = made.rollout(prompts(), 2, 0)
    assert one.routes_LMK is not None and one.routes_LMK.shape == (3 + 5 - 1, 2, 2)
    ahead = AheadSampler(sampler=made, world=world)
    ahead.begin(0, prompts(), 2, 0)
    np.testing.assert_array_equal(ahead.take(0)[1][1].routes_LMK, one.routes_LMK)  # type: ignore[arg-type]
    ahead.close()
    with pytest.raises(RecipeError, match=r"(?s)sampler.routes.*no routed experts.*LlamaForCausalLM"):
        routed.routed(Tiny().policy)


def test_a_server_of_ours_is_started_with_it():
    recipe = Recipe(model=Model(id="m"), data=Data(train="x"), method=grpo(), sampler=VLLM(python=sys.executable))
    flag = "--enable-return-routed-experts"
    assert flag not in launch(recipe, VLLM(python=sys.executable), Path(), Path()).arguments
    assert flag in launch(recipe, VLLM(python=sys.executable, routes=True), Path(), Path()).arguments


# --- a run -----------------------------------------------------------------------------------------------------------


# The stand-in says 14 to one of the prompts and not to the other, so that their answers are not scored alike.
LETTER = RewardFunction(function=matches, options={"pattern": r"(?s).*\x0e.*"})


def first_step(folder: Path, name: str, url: str, *, on: bool) -> dict[str, Any]:
    """The numbers of one step of GRPO on the model in ``folder``."""
    (folder / "rows.jsonl").write_text('{"prompt": "Say 1.", "answer": "1"}\n{"prompt": "Say 22.", "answer": "2"}\n')
    train(Recipe(
        model=Model(id=str(folder), dtype="float32", checkpointing=False), adapter=LoRA(r=2, targets=("attention",)),
        data=Data(train=str(folder / "rows.jsonl"), max_tokens=64, cache=None),
        method=grpo(rewards=LETTER, group=2, advantage="reinforce_pp", sampling=Sampling(max_tokens=8)),
        sampler=VLLM(url=url, canary=None, routes=on, concurrency=1),
        schedule=Constant(), batch=Batching(examples=2, tokens=512), save=Save(dir=folder / name), steps=1,
    ))  # fmt: skip
    lines = [json.loads(line) for line in (folder / name / "metrics.jsonl").read_text().splitlines()]
    return next(line for line in lines if "mismatch_kl" in line)


def test_a_run_trains_with_the_experts_that_its_server_tells(fake: Fake, tmp_path: Path):
    net = tiny("glm4_moe", vocab_size=261, num_hidden_layers=3)
    net.save_pretrained(tmp_path)
    byte_tokenizer().save_pretrained(tmp_path)
    use_ft_experts(net)

    def told(tokens: list[int], flip: int) -> str:
        """Of the decoder's three layers, the first of which is dense."""
        with torch.no_grad(), routes.chosen(net) as found:
            net(input_ids=torch.tensor([tokens]))
        routes_LMK = torch.stack(found).transpose(0, 1).numpy().astype(np.uint8) ^ flip
        return npy(np.concatenate([0 * routes_LMK[:, :1], routes_LMK], 1))

    names = ("entropy", "mismatch_kl", "loss", "grad_norm")
    plain = first_step(tmp_path, "plain", fake.url, on=False)
    assert plain["loss"] != 0 and plain["grad_norm"] > 0
    fake.routes = partial(told, flip=0)
    same = first_step(tmp_path, "same", fake.url, on=True)
    assert [same[name] for name in names] == [plain[name] for name in names]
    fake.routes = partial(told, flip=1)
    changed = first_step(tmp_path, "changed", fake.url, on=True)
    assert all(changed[name] != plain[name] for name in names)
    fake.seen.clear()
    tiny("llama", vocab_size=261).save_pretrained(tmp_path)
    with pytest.raises(RecipeError, match="no routed experts"):
        first_step(tmp_path, "dense", fake.url, on=True)
    assert not fake.seen
