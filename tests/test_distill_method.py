"""Distillation: tiles against whole logits, the method against transformers, however a step is split; a whole run."""

from __future__ import annotations

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

from ft import NF4, Data, Distill, LoRA, Model, Recipe, dist
from ft.data.pack import collate
from ft.data.tokenizer import byte_tokenizer
from ft.dist import World
from ft.errors import RecipeError
from ft.io.weights import ModelFolder
from ft.models.build import Built, build, plan_config
from ft.models.compare import Head, compared, logits
from ft.models.reference import Second, build_second, reference_states
from ft.recipe import Parallel, dump, restore
from ft.train import optim, step
from ft.types import Example

V = 261
ROWS = [evolve(e, unit=None, source=f"rows:{i}") for i, e in enumerate(PAIRS[:6])]
ADAPTER = LoRA(r=4, alpha=8.0)
FAMILIES: dict[str, tuple[str, dict[str, Any]]] = {
    "student": ("llama", {}),
    "scaled": ("granite", {"logits_scaling": 4.0}),
    "teacher": ("qwen3", {"hidden_size": 32}),
    "capped": ("gemma3_text", {"final_logit_softcapping": 0.5}),
}


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, ModelFolder]:
    """Models of one vocabulary, of several families and widths, saved by transformers."""
    root = tmp_path_factory.mktemp("models")
    for seed, (name, (family, over)) in enumerate(FAMILIES.items()):
        tiny_models.build(family, seed=seed, vocab_size=V, **over).save_pretrained(root / name)
        byte_tokenizer().save_pretrained(root / name)
    return {name: ModelFolder(path=root / name, id=str(root / name)) for name in FAMILIES}


@pytest.fixture(scope="module")
def world() -> Iterator[World]:
    torch.set_num_threads(1)
    with dist.launched() as made:
        yield made


def quiet(line: str) -> None:
    pass


def student(
    folders: dict[str, ModelFolder],
    world: World,
    name: str,
    adapter: LoRA | None,
    teacher: str,
    quant: NF4 | None = None,
) -> Built:
    """A student whose reference is ``teacher``; adapters are such that they change it."""
    model = Model(id=folders[name].id, dtype="float32")
    config = plan_config(model, folders[name], vocab=V)
    built = build(model, adapter, config, folders[name], world=world, parallel=Parallel(), seed=0, say=quiet)
    for i, (key, p) in enumerate(optim.trained(built.policy.scorer.model).items()):
        if "lora_B" in key:
            dist.copy_into(p, torch.randn(p.shape, generator=torch.Generator().manual_seed(i)) * 0.05)
    other = Model(id=folders[teacher].id, dtype="float32", quant=quant)
    config = plan_config(other, folders[teacher], vocab=V)
    second = Second(model=other, config=config, folder=folders[teacher], seed=0)
    reference = build_second(second, world=world, parallel=Parallel(), say=quiet)
    return evolve(built, policy=evolve(built.policy, reference=reference))


# Tiles ----------------------------------------------------------------------------------------------------------------


def drawn(*shape: int, seed: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def squared(own_NV: Tensor, other_NV: Tensor) -> Tensor:
    return (own_NV.softmax(-1) - other_NV.softmax(-1)).pow(2).sum()


@pytest.mark.parametrize("options", [{}, {"softcap": 2.0, "scale": 3.0}])
@pytest.mark.parametrize("rows", [1, 3, 100])
@pytest.mark.parametrize("sizes", [(11, 11), (13, 11), (11, 13)])
def test_tiles_give_value_and_gradient_of_whole_logits(
    options: dict[str, float], rows: int, sizes: tuple[int, int]
) -> None:
    N, D, r, (own_V, other_V) = 7, 5, 2, sizes
    leaves = [drawn(N, D, seed=0), drawn(own_V, D, seed=1), drawn(own_V, seed=2), drawn(r, D, seed=3)]
    leaves = [t.requires_grad_() for t in (*leaves, drawn(own_V, r, seed=4))]
    hidden_ND, weight_VD, bias_V, A_rD, B_Vr = leaves
    own: Any = Head(weight_VD=weight_VD, bias_V=bias_V, lora=(A_rD, B_Vr, 0.5), **options)
    other_NE, other = drawn(N, 3, seed=5), Head(weight_VD=drawn(other_V, 3, seed=6))
    x_NV = options.get("scale", 1.0) * (hidden_ND @ (weight_VD + 0.5 * B_Vr @ A_rD).T + bias_V)
    cap = options.get("softcap")
    own_NV = cap * torch.tanh(x_NV / cap) if cap else x_NV
    least = min(sizes)
    expected = squared(own_NV[:, :least], (other_NE @ other.weight_VD.T)[:, :least])
    found = compared(squared, hidden_ND, own, other_NE, other, tile=rows * least)
    torch.testing.assert_close(found, expected)
    for mine, theirs in zip(
        torch.autograd.grad(3 * found, leaves), torch.autograd.grad(3 * expected, leaves), strict=True
    ):
        torch.testing.assert_close(mine, theirs)
    with torch.no_grad():
        assert float(compared(squared, hidden_ND, own, other_NE, other)) == pytest.approx(float(expected))


def test_a_frozen_head_gets_no_gradient_and_no_rows_give_a_zero_with_a_graph() -> None:
    hidden_ND = drawn(0, 5, seed=0).requires_grad_()
    head = Head(weight_VD=drawn(11, 5, seed=1))
    found = compared(squared, hidden_ND, head, drawn(0, 3, seed=2), Head(weight_VD=drawn(11, 3, seed=3)))
    found.backward()
    assert float(found.detach()) == 0 and hidden_ND.grad is not None and head.weight_VD.grad is None


def test_logits_of_16_bits_are_summed_in_32() -> None:
    head = Head(weight_VD=drawn(11, 5, seed=1).bfloat16(), scale=2.0)
    assert logits(drawn(3, 5, seed=0).bfloat16(), head).dtype == torch.float32


# Against transformers -------------------------------------------------------------------------------------------------


def divergence(student_LV: Tensor, teacher_LV: Tensor, beta: float, temperature: float) -> Tensor:
    """The generalised JSD summed over positions, by torch's own KL."""
    s, t = (student_LV / temperature).log_softmax(-1), (teacher_LV / temperature).log_softmax(-1)

    def kl(p: Tensor, q: Tensor) -> Tensor:
        return F.kl_div(q, p, log_target=True, reduction="sum")

    if beta in (0.0, 1.0):
        return kl(t, s) if beta == 0 else kl(s, t)
    m = ((1 - beta) * s.exp() + beta * t.exp()).log()
    return beta * kl(t, m) + (1 - beta) * kl(s, m)


def rows_of(model: Any, example: Example) -> tuple[Tensor, Tensor]:
    """Logits and targets of a row's trained positions, by transformers."""
    tokens_L, mask_L = torch.from_numpy(example.tokens_L).long(), torch.from_numpy(example.mask_L[1:])
    logits_LV = model(tokens_L[None, :-1], use_cache=False).logits[0]
    return logits_LV[mask_L], tokens_L[1:][mask_L]


@pytest.mark.parametrize(
    ("name", "teacher", "method"),
    [
        ("student", "teacher", Distill()),
        ("student", "capped", Distill(beta=0.0, temperature=2.0)),
        ("scaled", "teacher", Distill(beta=1.0, sft=0.5)),
        ("capped", "scaled", Distill(beta=0.2, temperature=0.7, sft=1.0)),
    ],
    ids=["jsd", "forward", "reverse", "capped"],
)
def test_value_and_gradient_are_those_of_the_logits_of_transformers(
    folders: dict[str, ModelFolder], world: World, name: str, teacher: str, method: Distill
) -> None:
    own, other = (
        AutoModelForCausalLM.from_pretrained(folders[n].path, attn_implementation="eager") for n in (name, teacher)
    )
    n = sum(int(e.mask_L.sum()) for e in ROWS)
    far, near, teacher_nll = torch.zeros(()), torch.zeros(()), torch.zeros(())
    for example in ROWS:
        (own_LV, target_L), (other_LV, _) = rows_of(own, example), rows_of(other, example)
        far = far + divergence(own_LV, other_LV.detach(), method.beta, method.temperature) / n
        near = near + F.cross_entropy(own_LV, target_L, reduction="sum") / n
        teacher_nll = teacher_nll + F.cross_entropy(other_LV, target_L, reduction="sum") / n
    (far + method.sft * near).backward()
    out, grads, _ = one_step(method, student(folders, world, name, None, teacher), world, examples=ROWS)
    assert float(far.detach()) > 1e-4
    torch.testing.assert_close(out.sums["distill"].float(), far.detach(), rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(out.sums["nll"].float(), near.detach(), rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(out.sums["teacher/nll"].float(), teacher_nll.detach(), rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(out.loss.float(), (far + method.sft * near).detach(), rtol=1e-5, atol=1e-6)
    expected = {k: p.grad for k, p in own.named_parameters() if p.grad is not None}
    assert grads.keys() == expected.keys()
    for key, grad in grads.items():
        torch.testing.assert_close(grad, expected[key], rtol=2e-4, atol=1e-6)


def test_a_student_of_its_own_base_learns_from_its_adapters_switched_off(
    folders: dict[str, ModelFolder], world: World
) -> None:
    built = student(folders, world, "student", ADAPTER, "teacher")
    same = student(folders, world, "student", ADAPTER, "student")  # the base, as a second model
    own = evolve(built, policy=evolve(built.policy, reference=None))
    method = Distill(sft=1.0)
    (a, grads, _), (b, more, _) = (one_step(method, x, world, examples=ROWS) for x in (own, same))
    assert float(a.sums["distill"]) > 1e-5
    torch.testing.assert_close(a.loss, b.loss, rtol=1e-6, atol=1e-7)
    for key, grad in grads.items():
        torch.testing.assert_close(grad, more[key], rtol=1e-4, atol=1e-7)
    with pytest.raises(RecipeError, match=r"(?s)reference\.model: there is no teacher.*reference=Reference"):
        one_step(Distill(), own, world, examples=ROWS)


def test_a_teacher_may_be_held_in_nf4(folders: dict[str, ModelFolder], world: World) -> None:
    exact, packed = (student(folders, world, "student", ADAPTER, "teacher", quant) for quant in (None, NF4()))
    a, b = (float(one_step(Distill(), x, world, examples=ROWS)[0].loss) for x in (exact, packed))
    assert a != b and b == pytest.approx(a, rel=0.1)


# However a step is split ----------------------------------------------------------------------------------------------

METHOD = Distill(beta=0.3, temperature=1.5, sft=0.5)
STUDENTS: dict[str, tuple[str, LoRA | None]] = {"lora": ("student", ADAPTER), "full": ("scaled", None)}


@pytest.mark.parametrize("kind", STUDENTS)
def test_micro_batches_change_nothing(folders: dict[str, ModelFolder], world: World, kind: str) -> None:
    built = student(folders, world, *STUDENTS[kind], "capped")
    (whole, grads, one), (split, more, many) = (
        one_step(METHOD, built, world, examples=ROWS, tokens=tokens) for tokens in (512, 16)
    )
    assert one == 1 and many >= 4
    torch.testing.assert_close(split.loss, whole.loss, rtol=1e-5, atol=1e-6)
    assert max(float(g.abs().max()) for g in grads.values()) > 1e-4
    for key, grad in grads.items():
        torch.testing.assert_close(more[key], grad, rtol=1e-4, atol=1e-6)


def test_an_idle_rank_has_a_zero_with_a_graph(folders: dict[str, ModelFolder], world: World) -> None:
    built = student(folders, world, "student", ADAPTER, "teacher")
    for method in (METHOD, Distill()):
        built.policy.scorer.zero_grad(set_to_none=True)
        counts = step.plan(ROWS, method, built.policy, world, tokens=512).counts
        filler = method.prepare(collate([]), built.policy)
        plan = step.Plan(batches=(filler,), counts=counts, forwarded=torch.zeros(()))
        out = step.run(plan, method, built.policy, world, backward=True)
        assert float(out.loss) == 0.0
        parameters = optim.trained(built.policy.scorer.model)
        assert all(p.grad is not None and not dist.whole(p.grad).any() for p in parameters.values())


def on_two_ranks(folder: Path, models: Path) -> None:
    torch.set_num_threads(1)
    folders = {name: ModelFolder(path=models / name, id=str(models / name)) for name in FAMILIES}
    with dist.launched() as world:
        for kind, tokens in (("lora", 512), ("lora", 16), ("full", 16)):
            built = student(folders, world, *STUDENTS[kind], "capped")
            out, grads, _ = one_step(METHOD, built, world, examples=ROWS, tokens=tokens)
            found = {"loss": out.loss, **{f"sums/{k}": v for k, v in out.sums.items()}, **grads}
            if world.first:
                save_file({k: v.float().contiguous() for k, v in found.items()}, folder / f"{kind}-{tokens}")


def test_ranks_change_nothing(folders: dict[str, ModelFolder], world: World, tmp_path: Path) -> None:
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    command = [sys.executable, *launcher, __file__, str(tmp_path), str(folders["student"].path.parent)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=200)
    assert done.returncode == 0, done.stderr[-4000:]
    for kind, tokens in (("lora", 512), ("lora", 16), ("full", 16)):
        built = student(folders, world, *STUDENTS[kind], "capped")
        out, grads, _ = one_step(METHOD, built, world, examples=ROWS)
        expected = {"loss": out.loss, **{f"sums/{k}": v for k, v in out.sums.items()}, **grads}
        found = load_file(tmp_path / f"{kind}-{tokens}")
        assert found.keys() == expected.keys()
        for key, value in expected.items():
            torch.testing.assert_close(found[key], value.float(), rtol=1e-4, atol=1e-5)


# Training -------------------------------------------------------------------------------------------------------------


def test_a_student_comes_to_say_what_its_teacher_says(folders: dict[str, ModelFolder], world: World) -> None:
    built = student(folders, world, "student", None, "teacher")
    optimizer = torch.optim.AdamW(optim.trained(built.policy.scorer.model).values(), lr=3e-3)
    outs = []
    for _ in range(25):
        outs.append(one_step(Distill(beta=0.0), built, world, examples=ROWS)[0])
        optimizer.step()
    assert float(outs[-1].loss) < 0.2 * float(outs[0].loss)
    assert built.policy.reference is not None
    _, hidden_ND = reference_states(built.policy, collate(ROWS))
    assert hidden_ND.shape == (sum(int(e.mask_L.sum()) for e in ROWS), 32) and not hidden_ND.requires_grad


def test_options_survive_json_and_wrong_ones_are_refused() -> None:
    recipe = Recipe(model=Model(id="a/b"), data=Data(train="a.jsonl"), method=METHOD)
    assert restore(dump(recipe)) == recipe
    for options in ({"beta": 1.1}, {"beta": -0.1}, {"temperature": 0.0}, {"sft": -1.0}):
        with pytest.raises(ValueError, match=f"'{next(iter(options))}' must be"):
            Distill(**options)


if __name__ == "__main__":
    on_two_ranks(Path(sys.argv[1]), Path(sys.argv[2]))
