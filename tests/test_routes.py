"""Routes of whole models: written down, replayed, replaced, and refused where they cannot be."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from test_routing import STRATEGY_OF, bias_of, logits_of, router_config
from tiny_models import MOE, build, tokens
from torch import Tensor

from ft.data.pack import collate
from ft.errors import ModelError
from ft.kernels.routing import route
from ft.models import routes, tiles
from ft.models.build import recompute
from ft.models.documents import BY_DOCUMENT
from ft.models.experts import expert_modules, use_ft_experts
from ft.models.layout import Layout
from ft.models.policy import Policy, Scorer, logprobs
from ft.types import Example

IDS = tokens(2, 6)


def model(family: str, **over: Any) -> Any:
    made = build(family, **over)
    use_ft_experts(made)
    return made


def own(net: Any) -> tuple[Tensor, Tensor]:
    """Logits, and the routes of that forward."""
    with torch.no_grad(), routes.chosen(net) as found:
        return net(input_ids=IDS).logits, torch.stack(found)


def forward(net: Any, routes_MTK: Tensor, **options: Any) -> Tensor:
    with routes.given(net, routes_MTK):
        return net(input_ids=IDS, **options).logits


def others(routes_MTK: Tensor) -> Tensor:
    """Each expert's neighbour in its group of two, a token's two in the other order."""
    return (routes_MTK ^ 1).flip(-1)


def gradients(net: Any, logits: Tensor) -> list[Tensor]:
    trained = [p for p in net.parameters() if p.requires_grad]
    return [g for g in torch.autograd.grad(logits.square().mean(), trained, allow_unused=True) if g is not None]


@pytest.mark.parametrize("family", MOE)
def test_the_own_routes_replayed_change_nothing_and_others_do(family: str):
    net = model(family)
    plain = net(input_ids=IDS).logits
    logits, routes_MTK = own(net)
    assert routes_MTK.shape == (len(expert_modules(net)), 12, 2)
    replayed = forward(net, routes_MTK)
    assert torch.equal(replayed, logits)
    assert all(torch.equal(a, b) for a, b in zip(gradients(net, replayed), gradients(net, plain), strict=True))
    with torch.no_grad(), routes.chosen(net) as found:
        changed = forward(net, others(routes_MTK))
    assert torch.equal(torch.stack(found), others(routes_MTK))
    assert (changed - logits).abs().max() > 1e-4


@pytest.mark.parametrize("family", MOE)
def test_given_experts_weigh_by_the_familys_formula(family: str):
    """What the first experts are handed equals the pure function's weights of the same logits and experts."""
    net = model(family)
    routes_MTK = others(own(net)[1])
    name = next(
        n for n, m in net.named_modules() if "Router" in type(m).__name__ or type(m).__name__.endswith("V1Gate")
    )
    router, holder = net.get_submodule(name), net.get_submodule(name.rpartition(".")[0])
    seen: list[Tensor] = []
    router.register_forward_pre_hook(lambda _, args: seen.append(args[0].reshape(-1, args[0].shape[-1])))
    next(iter(expert_modules(net).values())).register_forward_pre_hook(lambda _, args: seen.extend(args[1:]))
    with torch.no_grad():
        forward(net, routes_MTK)
        strategy, scales = STRATEGY_OF[family](router_config(router, holder)), getattr(router, "per_expert_scale", None)
        args = logits_of(family, router, seen[0]), strategy, bias_of(family, router, holder), scales
        index_TK, weight_TK = route(*args, routes_TK=routes_MTK[0])
    assert torch.equal(seen[1], index_TK) and torch.allclose(seen[2], weight_TK, rtol=1e-5)
    assert not torch.equal(route(*args)[0].sort().values, index_TK.sort().values)


def test_a_tokens_routes_move_it_alone_and_a_token_without_routes_goes_as_ever():
    """The last tokens of both rows are sent elsewhere; -1 leaves the others to the router."""
    net = model("qwen3_moe")
    logits, routes_MTK = own(net)
    some_MTK = torch.full_like(routes_MTK, -1)
    some_MTK[:, [5, 11]] = others(routes_MTK)[:, [5, 11]]
    changed = forward(net, some_MTK)
    assert torch.equal(changed[:, :-1], logits[:, :-1]) and not torch.equal(changed[:, -1], logits[:, -1])


@pytest.mark.parametrize("family", ["qwen3_moe", "deepseek_v2", "gpt_oss"])
def test_recomputed_layers_keep_given_routes(family: str):
    net = model(family).train()
    routes_MTK = others(own(net)[1])
    expected = gradients(net, forward(net, routes_MTK))
    recompute(net)
    logits = forward(net, routes_MTK)
    found = gradients(net, logits)
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))
    told = pytest.raises(ModelError, match=r"for one forward, and another has begun\n.*leave it before backward")
    with told, routes.given(net, routes_MTK):
        gradients(net, net(input_ids=IDS).logits)


def test_a_balance_loss_counts_the_routers_own_choice():
    net = model("qwen3_moe", output_router_logits=True)
    with torch.no_grad(), routes.given(net, own(net)[1]):
        out = net(input_ids=IDS, labels=IDS)
    assert torch.equal(out.aux_loss, net(input_ids=IDS, labels=IDS).aux_loss)


@pytest.mark.parametrize(("kind", "forwarded"), [("packed", 8), ("padded", 10)])
def test_a_policys_log_probs_take_given_routes(kind: Any, forwarded: int):
    """Of sequences of 5 and 3 tokens, with a balance loss, and by blocks in tiles: routes are of what is forwarded."""
    net = model("qwen3_moe")
    tiles.apply(net, 4)
    layout = Layout(kind=kind, attention=BY_DOCUMENT)
    policy = Policy(scorer=Scorer(net), config=net.config, layout=layout, aux=0.01)
    rows = [
        Example(tokens_L=tokens(n + 1, seed=n).int().numpy(), mask_L=torch.ones(n + 1).bool().numpy()) for n in (5, 3)
    ]
    batch = collate(rows)
    with routes.chosen(net) as found:
        plain = logprobs(policy, batch)
    routes_MTK = torch.stack(found)
    assert routes_MTK.shape == (2, forwarded, 2)
    with routes.given(net, routes_MTK):
        replayed = logprobs(policy, batch)
    assert torch.equal(replayed.logp_T, plain.logp_T) and torch.equal(replayed.aux, plain.aux)  # type: ignore[arg-type]
    with routes.given(net, others(routes_MTK)):
        assert not torch.allclose(logprobs(policy, batch).logp_T, plain.logp_T)


# --- bad input -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("shape", "message"),
    [
        ((1, 12, 2), r"each layer with routed experts\n.*\(2, tokens, experts per token\)\n.*\(1, 12, 2\)"),
        ((12, 2), r"each layer with routed experts"),
        ((2, 11, 2), r"other tokens than the model forwards.*\n.*12 tokens, 2 experts each\n.*11 tokens, 2"),
        ((2, 12, 3), r"another number of experts per token\n.*2 experts each\n.*3 experts each"),
    ],
)
def test_wrong_shapes_are_told(shape: tuple[int, ...], message: str):
    with pytest.raises(ModelError, match=message):
        forward(model("qwen3_moe"), torch.arange(shape[-1]).expand(shape))


def test_experts_that_are_not_there_are_told():
    net = model("qwen3_moe")
    routes_MTK = own(net)[1]
    routes_MTK[1, 7] = torch.tensor([3, 8])
    with pytest.raises(ModelError, match=r"layer 1, token 7: .*cannot have\n.*0 to 7, or -1 throughout\n.*\[3, 8\]"):
        forward(net, routes_MTK)
    with pytest.raises(ModelError, match=r"integers.*\n.*float32"):
        forward(net, routes_MTK.float())
    with pytest.raises(ModelError, match=r"no routed experts"):
        forward(build("llama"), routes_MTK)


def test_more_groups_than_the_router_opens_are_told():
    """8 experts in 2 groups, one of which may be chosen: 3 and 4 are of different ones."""
    with pytest.raises(ModelError, match=r"token 0: .*more groups.*\n.*experts of 1 groups\n.*groups \[0, 1\]"):
        forward(model("deepseek_v3"), torch.tensor([3, 4]).expand(1, 12, 2))


def test_none_or_two_forwards_are_told():
    net = model("qwen3_moe")
    routes_MTK = own(net)[1]
    told = pytest.raises(ModelError, match=r"no whole forward used them\n.*0 of 2 layers")
    with told, routes.given(net, routes_MTK):
        pass
    told = pytest.raises(ModelError, match=r"layers.0.mlp.experts: given routes are for one forward, and another")
    with told, routes.given(net, routes_MTK):
        net(input_ids=IDS)
        net(input_ids=IDS)


def test_a_router_that_chooses_otherwise_is_told():
    net = model("qwen3_moe")
    routes_MTK = own(net)[1]
    gate = net.model.layers[1].mlp.gate

    def sorts(hidden_TD: Tensor) -> tuple[Tensor, ...]:
        value_TE, index_TE = (hidden_TD @ gate.weight.T).softmax(-1).sort(descending=True)
        return value_TE, value_TE[:, :2], index_TE[:, :2]

    gate.forward = sorts
    with pytest.raises(ModelError, match=r"layers.1.mlp.experts: .*cannot be given to this family\n.*one topk\n.*none"):
        forward(net, routes_MTK)
