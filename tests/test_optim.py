import pytest
import torch
from torch import nn

from ft.recipe import AdamW
from ft.train import optim, state


def two() -> dict[str, nn.Parameter]:
    return {"w": nn.Parameter(torch.ones(2, 2)), "b": nn.Parameter(torch.ones(2))}


def grads(parameters, value: float) -> None:
    for p in parameters.values():
        p.grad = torch.full_like(p, value)


def test_weight_decay_is_for_matrices_only():
    optimizer = optim.make(two(), AdamW(weight_decay=0.1))
    assert [(g["weight_decay"], len(g["params"])) for g in optimizer.param_groups] == [(0.1, 1), (0.0, 1)]


def test_the_norm_is_that_of_the_whole_gradient_and_clipping_scales_to_the_limit():
    parameters = two()
    grads(parameters, 2.0)
    norm = optim.grad_norm(list(parameters.values()))
    assert norm.item() == pytest.approx((6 * 4) ** 0.5)
    optim.clip(list(parameters.values()), norm, 1.0)
    assert optim.grad_norm(list(parameters.values())).item() == pytest.approx(1.0, rel=1e-4)


def test_a_bad_step_leaves_weights_moments_and_step_count_alone():
    parameters = two()
    optimizer = optim.make(parameters, AdamW(lr=0.1))
    grads(parameters, 1.0)
    optim.update(optimizer, torch.tensor(False))
    before = {k: v.clone() for k, v in state.optimizer_tensors(optimizer, parameters).items()}
    weights = parameters["w"].detach().clone()
    grads(parameters, float("nan"))
    optim.update(optimizer, torch.tensor(True))
    after = state.optimizer_tensors(optimizer, parameters)
    assert torch.equal(parameters["w"], weights)
    assert all(torch.equal(before[k], after[k]) for k in before)
    assert parameters["w"].grad is None


def test_a_restored_optimizer_goes_on_bitwise():
    def train(parameters, optimizer, steps):
        for step in steps:
            for i, p in enumerate(parameters.values()):
                p.grad = torch.sin(torch.arange(p.numel(), dtype=torch.float32) * (step + 1) + i).view_as(p)
            optim.update(optimizer, torch.tensor(False))

    straight = two()
    train(straight, optim.make(straight, AdamW(lr=0.1, weight_decay=0.1)), range(5))

    first = two()
    optimizer = optim.make(first, AdamW(lr=0.1, weight_decay=0.1))
    train(first, optimizer, range(3))
    saved = {k: v.clone() for k, v in state.optimizer_tensors(optimizer, first).items()}
    second = {k: nn.Parameter(p.detach().clone()) for k, p in first.items()}
    again = optim.make(second, AdamW(lr=0.1, weight_decay=0.1))
    state.restore_optimizer(again, second, saved)
    assert all(torch.equal(first[k], second[k]) for k in first), "restoring must not move a weight"
    train(second, again, range(3, 5))
    assert all(torch.equal(straight[k], second[k]) for k in straight)


def test_an_optimizer_of_another_run_is_refused():
    parameters = two()
    optimizer = optim.make(parameters, AdamW())
    with pytest.raises(Exception, match="does not fit this run"):
        state.restore_optimizer(optimizer, parameters, {"other/exp_avg": torch.zeros(2)})


def test_dropout_draws_are_a_function_of_seed_step_and_rank():
    def draw(*key):
        state.seed_step(*key)
        return torch.rand(3).tolist()

    assert draw(1, 5, 0) == draw(1, 5, 0)
    assert len({tuple(draw(*key)) for key in [(1, 5, 0), (1, 6, 0), (1, 5, 1), (2, 5, 0)]}) == 4


def test_eight_bit_moments_are_restored_bitwise():
    pytest.importorskip("torchao")

    def train(parameters, optimizer, steps):
        for step in steps:
            for i, p in enumerate(parameters.values()):
                p.grad = torch.sin(torch.arange(p.numel(), dtype=torch.float32) * (step + 1) + i).view_as(p)
            optim.update(optimizer, torch.tensor(False))

    def large() -> dict[str, nn.Parameter]:  # torchao leaves small tensors in 32 bits
        return {"w": nn.Parameter(torch.linspace(-1, 1, 128 * 64).view(128, 64))}

    straight, first = large(), large()
    train(straight, optim.make(straight, AdamW(lr=0.01, bits=8)), range(4))
    optimizer = optim.make(first, AdamW(lr=0.01, bits=8))
    train(first, optimizer, range(2))
    saved = {k: v.clone() for k, v in state.optimizer_tensors(optimizer, first).items()}
    assert saved["w/exp_avg.codes"].dtype == torch.uint8
    again = optim.make(first, AdamW(lr=0.01, bits=8))
    state.restore_optimizer(again, first, saved)
    train(first, again, range(2, 4))
    assert torch.equal(straight["w"], first["w"])
