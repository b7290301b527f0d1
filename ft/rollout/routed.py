"""The experts that a vLLM server sent tokens to, so that training sends them to the same.

A server that was started with --enable-return-routed-experts tells them with each answer: a .npy file in base64, of
every token of prompt and answer but the last, which it has not forwarded, and of every layer of the decoder; layers
without routed experts hold zeros.

Shapes: L tokens that were forwarded, H layers of the decoder, M of them with routed experts, K experts per token.
"""

from __future__ import annotations

import base64
import io

import numpy as np
from attrs import frozen

from ft.errors import RecipeError, ServerError
from ft.models.experts import expert_modules, stack_shape
from ft.models.policy import Policy
from ft.rollout.client import Malformed


@frozen(kw_only=True, eq=False)
class Routed:
    """Where a model has its routed experts."""

    layers: int  # H
    place_M: np.ndarray  # among them
    experts_M: np.ndarray  # how many


def routed(policy: Policy) -> Routed:
    """Of the policy. vLLM numbers layers as their names do.

    Raises:
        RecipeError: it has none.
    """
    modules = expert_modules(policy.scorer.model)
    if not modules:
        raise RecipeError(
            "this model has no routed experts whose choice could be replayed", where="sampler.routes",
            got=type(policy.scorer.model).__name__, fix="sampler.routes=false",
        )  # fmt: skip
    return Routed(
        layers=policy.config.get_text_config().num_hidden_layers,
        place_M=np.array([next(int(part) for part in name.split(".") if part.isdigit()) for name in modules]),
        experts_M=np.array([stack_shape(module, "down_proj")[0] for module in modules.values()]),
    )


def read(told: str | None, model: Routed, tokens: int, url: str) -> np.ndarray:
    """routes_LMK, int16, of ``tokens`` tokens.

    Raises:
        ServerError: nothing was told.
        Malformed: something else was.
    """
    if told is None:
        raise ServerError(
            "the server does not tell which experts it chose", where=url, expected="routed_experts with each answer",
            got="none",
            fix="start it with --enable-return-routed-experts, as `ft serve` does for a recipe with "
            "sampler.routes=true; or set sampler.routes=false",
        )  # fmt: skip
    found_LHK = _array(told)
    kind, shape = found_LHK.dtype, found_LHK.shape
    if kind.kind not in "iu" or len(shape) != 3 or shape[:2] != (tokens, model.layers) or not shape[2]:
        raise Malformed(f"experts as {kind}, {shape}, not as integers, ({tokens}, {model.layers}, experts per token)")
    routes_LMK = found_LHK[:, model.place_M]
    wrong_LMK = (routes_LMK < 0) | (routes_LMK >= model.experts_M[:, None])
    wrong_LMK[..., 1:] |= routes_LMK[..., 1:] == routes_LMK[..., :-1]  # zeros, where nothing was written down
    if wrong_LMK.any():
        token, layer, _ = (int(x) for x in np.argwhere(wrong_LMK)[0])
        raise Malformed(
            f"experts {routes_LMK[token, layer].tolist()} of token {token} in layer {model.place_M[layer]}, "
            f"which has {model.experts_M[layer]}"
        )
    return routes_LMK.astype(np.int16)


def _array(told: str) -> np.ndarray:
    try:
        return np.lib.format.read_array(io.BytesIO(base64.b64decode(told, validate=True)), allow_pickle=False)
    except (ValueError, TypeError, MemoryError, OverflowError) as error:
        raise Malformed(f"experts that are no array: {error}") from error
