"""A block in tiles of tokens equals the block untiled: gradients, several sequences, extra inputs, several outputs."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.checkpoint import checkpoint

from ft.errors import ModelError
from ft.kernels.experts import Factors, LoRA, Params, Stack, experts
from ft.kernels.tiled import tiled, tiled_module


class MLP(nn.Module):
    """Unpacks three dimensions, as some models' blocks do."""

    def __init__(self, D: int = 6, inner: int = 10, p: float = 0.0):
        super().__init__()
        self.gate, self.up, self.down = nn.Linear(D, inner), nn.Linear(D, inner, bias=False), nn.Linear(inner, D)
        self.dropout = nn.Dropout(p)

    def forward(self, hidden: Tensor) -> Tensor:
        _, _, _ = hidden.shape
        return self.down(self.dropout(F.silu(self.gate(hidden)) * self.up(hidden)))


def randn(*shape: int, grad: bool = True, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(*shape, dtype=dtype).requires_grad_(grad)


@pytest.fixture(autouse=True)
def seed() -> Iterator[None]:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        yield


@pytest.mark.parametrize("shape", [(3, 7, 6), (1, 13, 6), (2, 2, 5, 6), (9, 6)], ids=str)
@pytest.mark.parametrize("tile", [1, 4, 13, 100])
def test_batches_of_any_shape_equal_the_untiled_block(shape, tile):
    """With more sequences than one, a tile of a flat row is no slice of every sequence; that is where others fail."""
    mlp, hidden, weight = MLP().double(), randn(*shape), randn(*shape, grad=False)
    want = mlp(hidden.reshape(1, -1, 6)).reshape(shape)
    got = tiled_module(mlp, hidden, tile=tile)
    assert got.shape == want.shape
    torch.testing.assert_close(got, want, rtol=1e-12, atol=1e-14)
    leaves = [hidden, *mlp.parameters()]
    for a, b in zip(*(torch.autograd.grad((y * weight).sum(), leaves) for y in (got, want)), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-14)


def test_gradcheck_with_inputs_beside_the_hidden_state_and_several_outputs():
    W = randn(3, 4)

    def fn(hidden_tD: Tensor, weight_tK: Tensor, index_tK: Tensor) -> tuple[Tensor, Tensor]:
        mixed = torch.tanh(hidden_tD @ W) * weight_tK.sum(1, keepdim=True)
        return mixed.gather(1, index_tK), hidden_tD[:, 0].square()  # the second one's gradient counts too

    index_TK = torch.randint(4, (5, 2))

    def run(hidden: Tensor, weight: Tensor, _: Tensor) -> tuple[Tensor, Tensor]:
        return tiled(fn, hidden, weight, index_TK, tile=2)

    assert torch.autograd.gradcheck(run, (randn(5, 3), randn(5, 2), W))


def test_parameters_get_their_gradient_once_and_it_adds_to_what_is_there():
    mlp, hidden = MLP().double(), randn(2, 8, 6)
    calls = []
    mlp.gate.weight.register_post_accumulate_grad_hook(lambda p: calls.append(p.grad.clone()))
    tiled_module(mlp, hidden, tile=3).sum().backward()
    first = mlp.gate.weight.grad.clone()  # type: ignore[union-attr]
    assert len(calls) == 1 and torch.equal(calls[0], first)
    tiled_module(mlp, hidden, tile=3).sum().backward()
    torch.testing.assert_close(mlp.gate.weight.grad, 2 * first)


def test_a_frozen_block_passes_the_gradient_on_and_no_grad_builds_no_graph():
    mlp, hidden = MLP().double().requires_grad_(False), randn(1, 9, 6)
    want = torch.autograd.grad(mlp(hidden).sum(), hidden)
    torch.testing.assert_close(torch.autograd.grad(tiled_module(mlp, hidden, tile=4).sum(), hidden), want)
    with torch.no_grad():
        assert not tiled_module(mlp, hidden, tile=4).requires_grad


def test_dropout_is_the_same_in_backward():
    """dy/d(down.bias) tells nothing of dropout; y is linear in down.weight, so y = grad . weight + bias."""
    mlp, hidden = MLP(p=0.5).double(), randn(1, 9, 6, grad=False)
    out = tiled_module(mlp, hidden, tile=4)
    (grad,) = torch.autograd.grad(out.sum(), mlp.down.weight)
    torch.testing.assert_close((grad * mlp.down.weight).sum() + 9 * mlp.down.bias.sum(), out.sum())


def test_routed_experts_with_the_router_outside():
    T, K, E, D, inner, r = 11, 2, 4, 8, 16, 2
    hidden, router = randn(T, D, dtype=torch.float32), randn(E, D, dtype=torch.float32)
    up, down = randn(E, 2 * inner, D, dtype=torch.float32), randn(E, D, inner, dtype=torch.float32)
    A, B = randn(E, r, D, dtype=torch.float32), randn(E, 2 * inner, r, dtype=torch.float32)
    weight = randn(T, D, grad=False, dtype=torch.float32)

    def act(h_RM: Tensor) -> Tensor:
        gate, value = h_RM.chunk(2, -1)
        return F.silu(gate) * value

    def run(hidden_TD: Tensor, index_TK: Tensor, weight_TK: Tensor) -> Tensor:
        params = Params(up=Stack(weight=up), down=Stack(weight=down), act=act)
        lora = Factors(A_ErN=A, B_EMr=B, scaling=0.5)
        return experts(hidden_TD, index_TK, weight_TK, params, LoRA(up=lora), impl="torch")

    results = []
    for tile in (T, 4):
        probs_TE = torch.softmax(hidden @ router.T, -1)
        weight_TK, index_TK = probs_TE.topk(K)
        balance = (probs_TE.mean(0) ** 2).sum()  # over all tokens, whatever the tile
        out = tiled(run, hidden, index_TK, weight_TK, tile=tile)
        grads = torch.autograd.grad((out * weight).sum() + balance, (hidden, router, up, down, A, B))
        results.append((out, *grads))
    for got, want in zip(*results, strict=True):
        torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-6)


def test_bfloat16_stays_within_its_rounding():
    mlp, hidden, exact = MLP(32, 64).bfloat16(), randn(2, 64, 32, dtype=torch.bfloat16), MLP(32, 64)
    exact.load_state_dict(mlp.state_dict())
    leaves = [hidden, *mlp.parameters()]
    out = tiled_module(mlp, hidden, tile=16)
    want = exact(hidden.float())
    grads = torch.autograd.grad(out.float().square().sum(), leaves)
    exact_grads = torch.autograd.grad(want.square().sum(), [hidden, *exact.parameters()])
    for got, true in zip(grads, exact_grads, strict=True):
        assert got.dtype == torch.bfloat16
        assert (got.float() - true).norm() < 2**-6 * true.norm()


@pytest.mark.parametrize("outer", [False, True], ids=["by itself", "in a recomputed layer"])
def test_the_largest_activation_is_that_of_a_tile(outer):
    mlp, hidden = MLP(4, 64), randn(1, 64, 4, dtype=torch.float32)
    sizes = []

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            out = func(*args, **(kwargs or {}))
            sizes.extend(t.numel() for t in tree_leaves(out) if isinstance(t, Tensor))
            return out

    def layer(x: Tensor) -> Tensor:
        return x + tiled_module(mlp, x, tile=8)

    with Watch():
        out = checkpoint(layer, hidden, use_reentrant=False) if outer else layer(hidden)
        assert isinstance(out, Tensor)
        out.square().sum().backward()
    assert max(sizes) == 8 * 64  # untiled it is 64 * 64
    want = hidden + mlp(hidden)
    (grad,) = torch.autograd.grad(want.square().sum(), hidden)
    torch.testing.assert_close(hidden.grad, grad)


def test_no_tokens():
    mlp, hidden = MLP(), randn(1, 0, 6, dtype=torch.float32)
    out = tiled_module(mlp, hidden, tile=4)
    assert out.shape == (1, 0, 6)
    out.sum().backward()
    assert hidden.grad is not None and mlp.up.weight.grad is not None and mlp.up.weight.grad.abs().sum() == 0


def test_a_transformers_mlp_takes_its_place_by_its_own_forward():
    """What a recipe would do: the module keeps its name, its parameters and the hooks of its parts."""
    transformers = pytest.importorskip("transformers")
    config = transformers.LlamaConfig(
        hidden_size=16, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2, vocab_size=31
    )
    model = transformers.LlamaForCausalLM(config)
    ids = torch.randint(31, (3, 7))
    want = model(input_ids=ids, labels=ids).loss
    grads = torch.autograd.grad(want, list(model.parameters()))
    names = set(model.state_dict())
    for layer in model.model.layers:
        own = layer.mlp.forward
        layer.mlp.forward = lambda x, own=own: tiled_module(own, x, tile=4)
    got = model(input_ids=ids, labels=ids).loss
    torch.testing.assert_close(got, want)
    for a, b in zip(torch.autograd.grad(got, list(model.parameters())), grads, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-7)
    assert set(model.state_dict()) == names


def test_what_cannot_be_tiled_is_refused():
    hidden = randn(6, 3)
    with pytest.raises(ModelError, match=r"one row per token\n.*4 rows.*\n.*\(\)\n.*outside the tiles"):
        tiled(lambda x: x.sum(), hidden, tile=4)
    with pytest.raises(ModelError, match="one row per token"):
        tiled(lambda x: (x, None), hidden, tile=4)  # type: ignore
    with pytest.raises(ModelError, match=r"differ in their tokens\n.*\n.*\(6, 3\), \(5,\)"):
        tiled(lambda x, y: x, hidden, torch.zeros(5), tile=4)
    with pytest.raises(ModelError, match="at least one token"):
        tiled(lambda x: x, hidden, tile=0)
