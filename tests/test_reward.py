"""Models that score, by hand on a tiny model: values, gradients, splits, what is saved; and judged steps as rows."""

from __future__ import annotations

import itertools
import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from attrs import evolve, frozen
from peft import PeftModel
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoModelForTokenClassification,
    AutoTokenizer,
)

from ft import NF4, AdamW, Batching, Data, LoRA, Model, Recipe, Reward, Save, Stepwise, dist
from ft.data.dataset import prepare
from ft.data.pack import collate
from ft.data.tokenizer import byte_tokenizer
from ft.dist import World, whole
from ft.errors import ModelError, RecipeError
from ft.io.weights import resolve
from ft.methods.reward import at_last_token
from ft.models import head, leak, tiny
from ft.models.build import Built, build, plan_config, structure
from ft.models.layout import Layout
from ft.models.policy import logprobs
from ft.recipe import Parallel, dump, restore
from ft.train import optim, step
from ft.train.loop import train
from ft.types import Asks, Context, Counts, Example, Given, Method, asked

VOCAB = 96
METHODS: dict[str, Any] = {
    "reward": Reward(),
    "reward-margin": Reward(centring=0.01, margin=True),
    "steps": Stepwise(),
    "steps-soft": Stepwise(scores=1),
}
RANKED = {name: METHODS[name] for name in ("reward-margin", "steps")}
AUTO = {"score": AutoModelForSequenceClassification, "steps": AutoModelForTokenClassification}
head.register("qwen3_5_moe_text")  # transformers has no scoring model of this family


@pytest.fixture
def world() -> Iterator[World]:
    torch.set_num_threads(1)
    with dist.launched() as made:
        yield made


def model(world: World, method: Method, adapter: LoRA | None = None, family: str = "llama") -> Built:
    recipe, asks = Model(id="-", family=family, dtype="float32", tiny=True), asked(method)
    config = plan_config(recipe, None, vocab=VOCAB, asks=asks)
    return build(recipe, adapter, config, None, world=world, parallel=Parallel(), seed=0, say=lambda _: None, asks=asks)


def rows(method: Method) -> list[Example]:
    """Five pairs with margins, or five answers in steps, of random tokens."""
    rng, found = np.random.default_rng(0), []
    for i, (n, m) in enumerate(((3, 4), (9, 2), (1, 6), (5, 5), (7, 3))):
        prompt = rng.integers(0, VOCAB, 4).astype(np.int32)
        both = [np.append(prompt, rng.integers(0, VOCAB, k).astype(np.int32)) for k in (n, m)]
        if isinstance(method, Reward):
            found += [Example(tokens_L=t, mask_L=t > 0, source=f"rows:{i}", unit=i, margin=0.3 * i) for t in both]
            continue
        mask_L = np.zeros(len(both[0]), bool)
        mask_L[[len(prompt), -1]] = True  # one step of one token, and one of the others; or the same one
        label_L = np.where(mask_L, rng.integers(0, 2, len(mask_L)), 0.0).astype(np.float32)
        if method == METHODS["steps-soft"]:
            label_L *= 0.75
        found.append(Example(tokens_L=both[0], mask_L=mask_L, source=f"rows:{i}", label_L=label_L))
    return found


def one_step(method: Method, built: Built, world: World, *, tokens: int = 512) -> tuple[Any, dict[str, Tensor], int]:
    """Loss and sums of a step, every gradient, and the number of its micro-batches."""
    scorer = built.policy.scorer
    scorer.zero_grad(set_to_none=True)
    examples = method.examples(0, Context(data=Given(examples=rows(method)), examples=5, seed=0))
    plan = step.plan(examples, method, evolve(built.policy, aux=0.0), world, tokens=tokens)
    out = step.reduce(step.run(plan, method, evolve(built.policy, aux=0.0), world, backward=True), world)
    grads = {n: whole(p.grad).clone() for n, p in optim.trained(scorer.model).items() if p.grad is not None}
    return out, grads, len(plan.batches)


# By transformers, one sequence at a time ------------------------------------------------------------------------------


def oracle(built: Built, kind: str) -> Any:
    """The same weights in the class that transformers gives, in eval mode."""
    plain = AUTO[kind].from_config(built.policy.config, dtype=torch.float32, attn_implementation="eager")
    missing = plain.load_state_dict({n: whole(p).detach() for n, p in built.policy.scorer.model.state_dict().items()})
    assert not missing.missing_keys and not missing.unexpected_keys
    return plain.eval()


def by_hand(plain: Any, method: Any) -> Tensor:
    """The method's loss from the logits of transformers."""
    if isinstance(method, Reward):
        r = [plain(torch.from_numpy(e.tokens_L).long()[None]).logits[0, 0] for e in rows(method)]
        margins = [e.margin or 0.0 for e in rows(method)[::2]] if method.margin else [0.0] * 5
        terms = [
            -F.logsigmoid(w - l - m) + method.centring * (w + l) ** 2
            for w, l, m in zip(r[::2], r[1::2], margins, strict=True)
        ]
        return torch.stack(terms).mean()
    found = []
    for e in rows(method):
        at = torch.from_numpy(np.flatnonzero(e.mask_L))
        logits_NC = plain(torch.from_numpy(e.tokens_L).long()[None]).logits[0, at]
        label_N = torch.from_numpy(e.label_L)[at]
        if method.scores == 2:
            found.append(F.cross_entropy(logits_NC, label_N.long(), reduction="none"))
        else:
            found.append(F.binary_cross_entropy_with_logits(logits_NC[:, 0], label_N, reduction="none"))
    return torch.cat(found).mean()


@pytest.mark.parametrize(
    ("name", "family"),
    [*itertools.product(METHODS, ("llama",)), ("reward", "qwen3_5_moe_text"), ("steps", "qwen3_moe")],
)
def test_value_and_gradient_are_those_of_transformers(world: World, name: str, family: str) -> None:
    method = METHODS[name]
    built = model(world, method, family=family)
    plain = oracle(built, method.asks.head)
    loss = by_hand(plain, method)
    loss.backward()
    out, grads, _ = one_step(method, built, world)
    torch.testing.assert_close(out.loss.float(), loss.detach(), rtol=1e-5, atol=1e-6)
    expected = {n: p.grad for n, p in plain.named_parameters() if p.grad is not None}
    assert {n for n, g in grads.items() if g.any()} == {n for n, g in expected.items() if g.any()}
    assert any(n.startswith("score.") for n in grads)
    for n, grad in grads.items():
        torch.testing.assert_close(grad, expected.get(n, torch.zeros_like(grad)), rtol=1e-3, atol=1e-6)
    assert (built.policy.aux > 0) == (family != "llama"), "the router's balance loss is not forgotten"


def test_numbers_of_the_rewards(world: World) -> None:
    built = model(world, Reward())
    plain = oracle(built, "score")
    with torch.no_grad():
        r = [float(plain(torch.from_numpy(e.tokens_L).long()[None]).logits) for e in rows(Reward())]
    sums = {name: float(value) for name, value in one_step(Reward(), built, world)[0].sums.items()}
    assert sums["rewards/chosen"] == pytest.approx(np.mean(r[::2]), abs=1e-6)
    assert sums["rewards/rejected"] == pytest.approx(np.mean(r[1::2]), abs=1e-6)
    assert sums["rewards/margins"] == pytest.approx(np.mean(r[::2]) - np.mean(r[1::2]), abs=1e-6)
    assert sums["rewards/accuracies"] == pytest.approx(np.mean(np.array(r[::2]) > np.array(r[1::2])))


def test_a_score_stands_before_the_padding_as_transformers_reads_it(world: World) -> None:
    built, pad = model(world, Reward()), 7
    built.policy.config.pad_token_id = pad
    plain = oracle(built, "score")
    texts = [[1, 2, 3, pad], [4, pad, 5], [6, pad, pad]]
    padded = torch.tensor([t + [pad] * (5 - len(t)) for t in texts])
    expected_S = plain(padded, attention_mask=torch.ones_like(padded)).logits[:, 0]
    examples = [Example(tokens_L=np.array(t, np.int32), mask_L=np.ones(len(t), bool)) for t in texts]
    marked = [at_last_token(e, pad) for e in examples]
    assert [len(e) - 1 for e in marked] == [3, 3, 1]
    found = logprobs(built.policy, collate(marked))
    assert found.score_TC is not None and not found.logp_T.any()
    torch.testing.assert_close(found.score_TC[[2, 5, 6], 0], expected_S, rtol=1e-5, atol=1e-6)
    assert at_last_token(examples[0], None).tokens_L.tolist() == [1, 2, 3, pad, pad]


# However a step is split ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", METHODS)
def test_loss_gradient_and_numbers_do_not_depend_on_the_micro_batches(world: World, name: str) -> None:
    built = model(world, METHODS[name])
    out, grads, batches = one_step(METHODS[name], built, world)
    split, split_grads, more = one_step(METHODS[name], built, world, tokens=22)
    assert batches == 1 and more > 2
    torch.testing.assert_close(split.loss, out.loss, rtol=1e-5, atol=1e-6)
    for key, value in out.sums.items():
        torch.testing.assert_close(split.sums[key], value, rtol=1e-5, atol=1e-5)
    for key, grad in grads.items():
        torch.testing.assert_close(split_grads[key], grad, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("name", METHODS)
def test_an_idle_rank_has_a_zero_with_a_graph(world: World, name: str) -> None:
    built, method = model(world, METHODS[name], LoRA(r=2)), METHODS[name]
    plan = step.Plan(batches=(collate([]),), counts=Counts(tokens=3, units=3), forwarded=torch.zeros(()))
    out = step.run(plan, method, built.policy, world, backward=True)
    assert float(out.loss) == 0.0 and all(float(value) == 0.0 for value in out.sums.values())
    parameters = optim.trained(built.policy.scorer.model)
    assert all(p.grad is not None and not whole(p.grad).any() for p in parameters.values())


def on_three_ranks(folder: Path) -> None:
    """What each rank runs: a step of every method, in one micro-batch (two ranks are idle) and in several."""
    torch.set_num_threads(1)
    with dist.launched() as world:
        for (name, method), tokens in itertools.product(RANKED.items(), (512, 22)):
            adapter = LoRA(r=2) if tokens == 22 else None
            out, grads, _ = one_step(method, model(world, method, adapter), world, tokens=tokens)
            if world.first:
                found = {"loss": out.loss, **{f"sums/{k}": v for k, v in out.sums.items()}, **grads}
                save_file({k: v.float().contiguous() for k, v in found.items()}, folder / f"{name}-{tokens}")


def test_loss_gradient_and_numbers_do_not_depend_on_the_ranks(world: World, tmp_path: Path) -> None:
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node=3"]
    done = subprocess.run([sys.executable, *launcher, __file__, str(tmp_path)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-4000:]
    for (name, method), tokens in itertools.product(RANKED.items(), (512, 22)):
        built = model(world, method, LoRA(r=2) if tokens == 22 else None)
        out, grads, _ = one_step(method, built, world)
        expected = {"loss": out.loss, **{f"sums/{k}": v for k, v in out.sums.items()}, **grads}
        found = load_file(tmp_path / f"{name}-{tokens}")
        assert found.keys() == expected.keys()
        for key, value in expected.items():
            torch.testing.assert_close(found[key], value.float(), rtol=1e-4, atol=1e-5)


# Whole runs, and what they leave --------------------------------------------------------------------------------------


@frozen(kw_only=True)
class Interrupted(Reward):
    """Reward during which somebody presses Ctrl+C in step ``at``."""

    at: ClassVar[int | None] = None

    def examples(self, step: int, ctx: Context) -> Any:
        if step == Interrupted.at:
            Interrupted.at = None
            os.kill(os.getpid(), signal.SIGINT)
        return super().examples(step, ctx)


@pytest.fixture(scope="module")
def bases(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Folders of tiny language models, as a hub has them, by family."""
    torch.set_num_threads(1)
    return {family: base_folder(tmp_path_factory.mktemp("base"), family) for family in ("llama", "qwen3_5_moe_text")}


def base_folder(folder: Path, family: str) -> Path:
    tokenizer = byte_tokenizer()
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(tiny.config_by_family(family, len(tokenizer))).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture
def base(bases: dict[str, Path]) -> Path:
    return bases["llama"]


def pairs_file(folder: Path) -> str:
    lines = [
        {
            "prompt": [{"role": "user", "content": f"say {i}"}],
            "chosen": [{"role": "assistant", "content": "yes " * (i % 4 + 1)}],
            "rejected": [{"role": "assistant", "content": "no " * (i % 3 + 1)}],
        }
        for i in range(9)
    ]
    return written(folder / "pairs.jsonl", lines)


def steps_file(folder: Path) -> str:
    texts = ["one", "two", "three"]
    lines = [
        {"prompt": f"count {i}", "completions": texts[: i % 3 + 1], "labels": [True, False, True][: i % 3 + 1]}
        for i in range(9)
    ]
    return written(folder / "steps.jsonl", lines)


def written(path: Path, lines: list[dict[str, Any]]) -> str:
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return str(path)


def recipe(base: Path, folder: Path, method: Any, adapter: LoRA | None, **changes: Any) -> Recipe:
    data = pairs_file(folder) if isinstance(method, Reward) else steps_file(folder)
    made = Recipe(
        model=Model(id=str(base), dtype="float32"),
        adapter=adapter,
        data=Data(train=data, cache=None),
        method=method,
        optim=AdamW(lr=1e-2),
        batch=Batching(examples=3, tokens=512),
        save=Save(dir=folder / "run", every=2),
        steps=4,
    )
    return evolve(made, **changes)


ADAPTER = LoRA(r=2, targets=("all-linear",))


RUNS = {
    "reward": (Reward(), None, "llama"),
    "reward-lora": (Reward(), ADAPTER, "llama"),
    "steps": (Stepwise(), None, "llama"),
    "steps-lora": (Stepwise(), ADAPTER, "llama"),
    "moe-reward-lora": (Reward(), LoRA(r=2, targets=("attention", "experts")), "qwen3_5_moe_text"),
    "moe-steps": (Stepwise(), None, "qwen3_5_moe_text"),
}


@pytest.mark.parametrize("name", RUNS)
def test_what_a_run_leaves_loads_with_equal_scores(bases: dict[str, Path], tmp_path: Path, name: str) -> None:
    """In transformers and peft, and taken up again by ft: the head of the folder or the adapter is used."""
    method, adapter, family = RUNS[name]
    base = bases[family]
    made = recipe(base, tmp_path, method, adapter)
    train(made)
    final, auto = tmp_path / "run" / "final", AUTO[method.asks.head]
    tokenizer = AutoTokenizer.from_pretrained(final)
    loaded = auto.from_pretrained(base if adapter else final, num_labels=method.asks.classes)
    if adapter:
        loaded = PeftModel.from_pretrained(loaded, final)
        loaded.config.pad_token_id = tokenizer.pad_token_id
    loaded.eval()
    data = prepare(made.data.train, made.data, tokenizer, announce=lambda _: None)
    drawn = method.examples(0, Context(data=data, examples=9, seed=0, tokenizer=tokenizer))
    with torch.no_grad():
        if isinstance(method, Reward):  # a padded batch of whole rows
            ids = [e.tokens_L[:-1].tolist() for e in drawn]
            expected_N = loaded(**tokenizer.pad({"input_ids": ids}, return_tensors="pt", padding_side="right")).logits
        else:
            rows = [loaded(torch.from_numpy(e.tokens_L).long()[None, :-1]).logits[0, e.mask_L[1:]] for e in drawn]
            expected_N = torch.cat(rows)
        found_N = scores_of(made, base if adapter else final, adapter and evolve(adapter, init=final), drawn)
    assert expected_N.std() > 1e-3
    torch.testing.assert_close(found_N, expected_N, rtol=1e-5, atol=1e-5)


def scores_of(made: Recipe, own: Path, adapter: LoRA | None, drawn: list[Example]) -> Tensor:
    """What ft gives at the trained positions, from a folder and an adapter."""
    folder, asks = resolve(str(own), None), asked(made.method)
    config = plan_config(made.model, folder, vocab=261, asks=asks)
    with dist.launched() as world:
        built = build(
            made.model, adapter, config, folder,
            world=world, parallel=Parallel(), seed=5, say=lambda _: None, asks=asks,
        )  # fmt: skip
        batch = collate(drawn)
        score_TC = logprobs(built.policy, batch).score_TC
    assert score_TC is not None
    return score_TC[batch.trained_N]


def test_the_saved_folder_says_what_it_is(base: Path, tmp_path: Path) -> None:
    train(recipe(base, tmp_path, Reward(), ADAPTER, steps=1))
    config = json.loads((tmp_path / "run" / "final" / "adapter_config.json").read_text())
    assert (config["task_type"], config["modules_to_save"]) == ("SEQ_CLS", ["score"])
    assert "score" not in " ".join(config["target_modules"])
    names = load_file(tmp_path / "run" / "final" / "adapter_model.safetensors")
    assert names["base_model.model.score.weight"].dtype == torch.float32


@pytest.mark.parametrize("adapter", [None, ADAPTER], ids=["full", "lora"])
def test_stop_and_resume_is_bitwise_equal_to_not_stopping(base: Path, tmp_path: Path, adapter: LoRA | None) -> None:
    straight = recipe(base, tmp_path, Interrupted(), adapter, save=Save(dir=tmp_path / "a", every=2))
    train(straight)
    stopped = evolve(straight, save=Save(dir=tmp_path / "b", every=2))
    Interrupted.at = 2
    assert train(stopped).ended == "stopped"
    assert train(stopped, resume=True).ended == "done"
    for file in ("optimizer", "model" if adapter is None else "adapter_model"):
        a, b = (load_file(tmp_path / name / "step-000004" / f"{file}.safetensors") for name in "ab")
        assert a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)


def test_training_learns_both(base: Path, tmp_path: Path) -> None:
    for method, name in ((Reward(), "rewards/accuracies"), (Stepwise(), "accuracy")):
        folder = tmp_path / type(method).__name__
        folder.mkdir()
        train(recipe(base, folder, method, ADAPTER, steps=25))
        lines = [json.loads(line) for line in (folder / "run" / "metrics.jsonl").read_text().splitlines()]
        seen = [line[name] for line in lines if name in line]
        assert np.mean(seen[-3:]) == 1.0 and lines[-1].get("loss", 0) < 0.5


# The head -------------------------------------------------------------------------------------------------------------


def test_a_fresh_head_is_a_function_of_the_seed(world: World) -> None:
    built = model(world, Reward())
    net, values = built.policy.scorer.model, []
    for seed in (1, 1, 2):
        head.init(net, seed)
        values.append(whole(net.get_parameter("score.weight")).detach().clone())
    assert torch.equal(values[0], values[1]) and not torch.equal(values[0], values[2])
    assert float(values[0].std()) == pytest.approx(0.02, rel=0.3)


def test_the_head_is_trained_whole_and_never_adapted_or_quantised() -> None:
    recipe_model = Model(id="-", family="llama", tiny=True, quant=NF4())
    config = plan_config(recipe_model, None, vocab=VOCAB, asks=Asks(head="score"))
    made = structure(recipe_model, LoRA(targets=("all-linear",)), config, Asks(head="score"))
    weight = made.net.get_parameter("score.weight")
    assert weight.requires_grad and weight.dtype == torch.float32
    assert not any(item.path == "score" for item in made.items) and made.items
    with pytest.raises(RecipeError, match="head that scores is trained whole"):
        structure(recipe_model, LoRA(targets=("score",)), config, Asks(head="score"))


def test_a_family_whose_head_is_made_otherwise_is_refused() -> None:
    recipe_model = Model(id="-", family="roberta", tiny=True)
    config = plan_config(recipe_model, None, vocab=VOCAB, asks=Asks(head="score"))
    with pytest.raises(ModelError, match="head of RobertaForSequenceClassification is not one linear layer"):
        structure(recipe_model, None, config, Asks(head="score"))


def test_the_leak_check_holds_for_models_that_score(world: World) -> None:
    scorer = model(world, Reward(), family="gpt_oss").policy.scorer
    naive = Layout(kind="packed", attention=scorer.own_attention)
    with pytest.raises(ModelError, match="cannot keep packed sequences apart"):
        leak.check(scorer, requested="packed", tried=[naive])
    scorer = model(world, Reward()).policy.scorer
    trunk: Any = scorer.model.get_decoder()
    trunk.norm.register_forward_hook(lambda module, args, out: out + out.detach().mean(1, keepdim=True))
    with pytest.raises(ModelError, match=r"gradient into other sequences 0\.0e\+00"):
        leak.check(scorer, requested="packed")


def test_methods_survive_json() -> None:
    for method in METHODS.values():
        made = Recipe(model=Model(id="a/b"), data=Data(train="a.jsonl"), method=method)
        assert restore(dump(made)) == made


if __name__ == "__main__":
    on_three_ranks(Path(sys.argv[1]))
