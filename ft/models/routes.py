"""The routing of a forward, kept for its recomputation, written down, or given from outside.

Every family's router chooses by topk. Where a topk is answered with other indices, its values are taken at those
places from the router's own scores: weights follow by the family's own formula, and gradients reach the router as
ever.

- ``kept``: a recomputed layer that rounds differently (other kernels, other ranks' sums) would otherwise send tokens
  to other experts in backward than in forward, and gradients would be of another function.
- ``given``: a sampler that rounds differently from the trainer sends tokens to other experts, and the trainer would
  then weigh answers of another function. Replaying the sampler's choice leaves both with the same experts.

Shapes: M layers with routed experts, T tokens that the model forwards, E experts, K experts per token, G groups.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from ft.errors import ModelError
from ft.kernels.routing import check_routes
from ft.models.experts import expert_modules, stack_shape

_TOPK = (torch.topk, Tensor.topk)


def kept() -> tuple[TorchFunctionMode, TorchFunctionMode]:
    """``context_fn`` of torch's checkpoint: the contexts of a layer's first run and of its replay."""
    chosen: list[Tensor] = []
    return _Choices(chosen, replay=False), _Choices(chosen, replay=True)


@contextmanager
def chosen(model: nn.Module) -> Iterator[list[Tensor]]:
    """Writes down which experts the tokens of one forward go to: a list that holds index_TK of each layer at the end.

    ``torch.stack`` of it is what ``given`` takes. A forward that follows is added behind.

    Raises:
        ModelError: a model without routed experts.
    """
    found: list[Tensor] = []
    with ExitStack() as hooks:
        for module in _experts(model).values():
            hooks.enter_context(module.register_forward_pre_hook(lambda _, args: found.append(args[1].detach())))
        yield found


@contextmanager
def given(model: nn.Module, routes_MTK: Tensor) -> Iterator[None]:
    """One forward, and no backward, in which tokens go to these experts; a token of -1 is routed by the model.

    Args:
        routes_MTK: integers, a layer after the other. T counts every token that the model forwards, padding too.

    Raises:
        ModelError: routes of another shape, or of experts that are not there (looked at on a CPU); experts of more
            groups than a family's router opens; a router that does not choose by one topk a layer; no forward, or
            more than one.
    """
    modules = _experts(model)
    if routes_MTK.ndim != 3 or len(routes_MTK) != len(modules):
        raise ModelError(
            "routes are given for each layer with routed experts", where="routes",
            expected=f"({len(modules)}, tokens, experts per token)", got=f"{tuple(routes_MTK.shape)}",
        )  # fmt: skip
    counts = [stack_shape(module, "down_proj")[0] for module in modules.values()]
    for layer, (E, routes_TK) in enumerate(zip(counts, routes_MTK, strict=True)):
        check_routes(routes_TK, E, tuple(routes_TK.shape), where=f"layer {layer}")
    mode = _Given(routes_MTK, counts)
    with ExitStack() as hooks:
        for place, (name, module) in enumerate(modules.items()):
            hooks.enter_context(module.register_forward_pre_hook(mode.arrived(place, name)))
        with mode:
            yield
    if mode.place != len(modules):
        got = f"{mode.place} of {len(modules)} layers"
        raise ModelError("routes were given, and no whole forward used them", where="routes", got=got)


def _experts(model: nn.Module) -> dict[str, Any]:
    modules = expert_modules(model)
    if not modules:
        raise ModelError("this model has no routed experts", where="routes", got=type(model).__name__)
    return modules


class _Given(TorchFunctionMode):
    """Answers each layer's topk over its experts with the given ones; ``place`` is the layer that comes next."""

    def __init__(self, routes_MTK: Tensor, counts: list[int]):
        super().__init__()
        self.routes_MTK, self.counts, self.place, self.answers = routes_MTK, counts, 0, 0

    def arrived(self, place: int, name: str) -> Any:
        """A hook for the experts of a layer, which follow upon its router's choice."""

        def hook(module: nn.Module, args: Any) -> None:
            if place != self.place:
                raise ModelError(
                    "given routes are for one forward, and another has begun", where=name,
                    fix="enter ft.models.routes.given for each forward, and leave it before backward",
                )  # fmt: skip
            if self.answers != 1:
                raise ModelError(
                    "routes cannot be given to this family", where=name, expected="a router that chooses by one topk",
                    got=f"{self.answers or 'none'} of them",
                )  # fmt: skip
            self.place, self.answers = place + 1, 0

        return hook

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func not in _TOPK or self.place == len(self.counts):  # a balance loss chooses once more, by itself
            return func(*args, **kwargs or {})
        return self._answer(func, *args, **kwargs or {})

    def _answer(self, func: Any, input: Tensor, k: int, *args: Any, **kwargs: Any) -> Any:
        E, routes_TK = self.counts[self.place], self.routes_MTK[self.place].to(input.device, torch.int64)
        if input.ndim != 2 or E % input.shape[1]:  # of another matter: attention that selects, two best of a group
            return func(input, k, *args, **kwargs)
        scores = input.detach()
        if input.shape[1] == E:
            _same(routes_TK, (len(input), k))
            self.answers += 1
            index = torch.where(routes_TK < 0, func(scores, k, *args, **kwargs).indices, routes_TK)
        else:
            index = func(_opened(scores, routes_TK, E), k, *args, **kwargs).indices
            _among(routes_TK * scores.shape[1] // E, index)
        return torch.return_types.topk((input.gather(1, index), index))


def _same(routes_TK: Tensor, shape: tuple[int, int]) -> None:
    if tuple(routes_TK.shape) != shape:
        raise ModelError(
            "routes are given for other tokens than the model forwards, or for another number of experts per token",
            where="routes", expected="{} tokens, {} experts each".format(*shape),
            got="{} tokens, {} experts each".format(*routes_TK.shape),
        )  # fmt: skip


def _opened(worth_TG: Tensor, routes_TK: Tensor, E: int) -> Tensor:
    """Worths by which a router opens the groups of the given experts first: some families weigh none of the others."""
    group_TK = (routes_TK * worth_TG.shape[1] // E).clamp(min=0)
    return torch.where(routes_TK[:, :1] < 0, worth_TG, worth_TG.scatter(1, group_TK, torch.inf))


def _among(group_TK: Tensor, open_TG: Tensor) -> None:
    """Raises: ModelError, where a given expert's group stays shut; looked at on a CPU."""
    if group_TK.device.type != "cpu":
        return
    shut_T = ~((group_TK[:, :, None] == open_TG[:, None]).any(-1) | (group_TK < 0)).all(-1)
    if shut_T.any():
        wrong = int(shut_T.nonzero()[0, 0])
        raise ModelError(
            "a token is given experts of more groups than the router opens", where=f"routes of token {wrong}",
            expected=f"experts of {open_TG.shape[1]} groups", got=f"groups {sorted(set(group_TK[wrong].tolist()))}",
        )  # fmt: skip


class _Choices(TorchFunctionMode):
    """Writes down the indices that each topk finds, or answers with them; the graph is the same both times."""

    def __init__(self, chosen: list[Tensor], *, replay: bool):
        super().__init__()
        self.chosen, self.replay, self.place = chosen, replay, 0

    def __enter__(self) -> Any:
        self.place = 0  # a graph that is kept may be replayed again
        return super().__enter__()

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func not in _TOPK:
            return func(*args, **kwargs)
        if not self.replay:
            with torch.no_grad():
                self.chosen.append(func(*args, **kwargs).indices)
        indices, self.place = self.chosen[self.place], self.place + 1
        return torch.return_types.topk((_take(indices, *args, **kwargs), indices.clone()))


def _take(indices: Tensor, input: Tensor, k: int, dim: int = -1, largest: bool = True, sorted: bool = True) -> Tensor:
    return input.gather(dim, indices)
