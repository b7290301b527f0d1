"""``ft serve x.py``: the server that a recipe samples from, in the foreground, for runs that are told its address."""

from __future__ import annotations

from collections.abc import Callable

from attrs import evolve

from ft.errors import RecipeError, ServerError
from ft.io.weights import resolve
from ft.recipe import VLLM, Recipe, run_folder
from ft.rollout.server import TOKEN, Server, launch
from ft.types import asked


def serve(recipe: Recipe, say: Callable[[str], None]) -> None:
    """Start it, say how to use it, and wait until it ends or is interrupted. What it prints comes through.

    Raises:
        RecipeError: the recipe samples nothing, or from a server that runs already.
        ServerError: the server does not start, or ends by itself.
    """
    options = recipe.sampler if isinstance(recipe.sampler, VLLM) else VLLM()
    if asked(recipe.method).rows != "prompts":
        raise RecipeError(f"{type(recipe.method).__name__} samples nothing", where="method", fix="there is no need")
    if options.url is not None:
        raise RecipeError("the recipe names a server that runs already", where="sampler.url", got=options.url)
    if recipe.model.tiny:
        raise RecipeError("a look-alike has no weights to serve", where="model.tiny", fix="set model.tiny=false")
    model = resolve(recipe.model.id, recipe.model.revision).path
    server = Server(launch=evolve(launch(recipe, options, model, run_folder(recipe)), log=None))
    try:
        client = server.start()
        say(f"serving {recipe.model.id} at {client.url}; Ctrl+C ends it. To train with it:")
        say(f"  {TOKEN}={client.token} ft run RECIPE sampler=vllm sampler.url={client.url}")
        assert server.process is not None
        server.process.wait()
        raise ServerError("the vLLM server has ended; what it printed stands above", where=client.url)
    finally:
        server.close()
