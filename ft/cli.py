"""The command line: names, options and exit statuses. What the commands do stands in the rooms below.

Status 0: done, or go. 1: something unforeseen; its traceback lies in a file. 2: something the user can mend, or
no-go. 130: interrupted; `ft run` has saved and said how to go on. Nothing here imports torch before a command needs it.
"""

from __future__ import annotations

import json
import os
import sys
import time
import traceback
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import attrs
import typer

from ft.errors import FtError
from ft.recipe.parts import Recipe

if TYPE_CHECKING:
    from rich.console import Console

_OVERRIDES = {"ignore_unknown_options": True}
_RUN_OPTIONS = ("--tiny", "--resume", "--nproc", "--help")

RecipeFile = Annotated[
    Path, typer.Argument(help="A recipe: x.py, or the recipe.json of a run folder.", metavar="RECIPE")
]
Overrides = Annotated[
    list[str] | None, typer.Argument(help="optim.lr=2e-5 steps=100 adapter=none", metavar="NAME=VALUE")
]
Tiny = Annotated[bool, typer.Option("--tiny", help="Rehearse on a shrunken model of the same architecture.")]

app = typer.Typer(
    name="ft",
    help="Fine-tune language models from typed Python recipes.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)
bench = typer.Typer(help="Measure on this machine.", no_args_is_help=True, rich_markup_mode=None)
app.add_typer(bench, name="bench")


@attrs.define
class _Place:
    """Where a traceback goes: the run folder, once it is known."""

    folder: Path | None = None


@app.command(context_settings=_OVERRIDES, add_help_option=False)
def run(
    ctx: typer.Context,
    recipe: Annotated[Path | None, typer.Argument(help="A recipe: x.py, or a recipe.json.", metavar="RECIPE")] = None,
    overrides: Overrides = None,
    tiny: Tiny = False,
    resume: Annotated[bool, typer.Option("--resume", help="Go on from the newest checkpoint.")] = False,
    nproc: Annotated[int, typer.Option(help="Ranks to start on this machine.", min=1)] = 1,
    help: Annotated[bool, typer.Option("--help", help="Show this, and every field of the recipe.")] = False,
) -> None:
    """Train a recipe. A recipe.json repeats its run in a new folder, or with --resume goes on in its own."""
    from ft.commands.recipes import folder_override, resolve
    from ft.recipe.parts import run_folder

    words, ranks = overrides or [], int(os.environ.get("WORLD_SIZE", "1"))
    if help or recipe is None:
        _help(ctx, recipe, words, tiny)
        raise typer.Exit(0 if help else 2)
    words = words + folder_override(recipe, words, tiny=tiny, resume=resume, ranks=ranks)
    resolved = resolve(recipe, words, tiny=tiny, options=_RUN_OPTIONS)
    if nproc > 1 and ranks == 1:
        from ft.commands.ranks import launch

        flags = [flag for flag, on in (("--tiny", tiny), ("--resume", resume)) if on]
        raise typer.Exit(launch(["run", str(recipe), *words, *flags], nproc))
    if isinstance(ctx.obj, _Place):
        ctx.obj.folder = run_folder(resolved)
    if _rank() == 0:
        _announce(resolve(recipe, words), resolved)
    from ft.train.loop import train

    if train(resolved, resume=resume).ended == "stopped":
        raise typer.Exit(130)


@app.command(context_settings=_OVERRIDES)
def show(
    recipe: RecipeFile,
    overrides: Overrides = None,
    tiny: Tiny = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print what recipe.json would hold.")] = False,
) -> None:
    """Print a recipe, resolved. Every field has its type and documentation; a * marks what differs from its default."""
    from ft.commands.recipes import resolve
    from ft.recipe.files import dumps
    from ft.recipe.show import print_recipe

    resolved = resolve(recipe, overrides or [], tiny=tiny, options=("--tiny", "--json", "--help"))
    if as_json:
        print(dumps(resolved), end="")
    else:
        print_recipe(resolved, _console())


@app.command()
def schema(
    recipe: Annotated[
        Path | None, typer.Argument(help="Narrow the method to this recipe's.", metavar="[RECIPE]")
    ] = None,
) -> None:
    """Print the JSON Schema of recipes."""
    from ft.recipe.files import load
    from ft.recipe.schema import schema as describe

    print(json.dumps(describe(load(recipe) if recipe else None), indent=2, ensure_ascii=False))


@app.command(context_settings=_OVERRIDES)
def inspect(recipe: RecipeFile, overrides: Overrides = None, tiny: Tiny = False) -> None:
    """Show rows as the model will see them. Trained tokens are marked."""
    from ft.commands.recipes import resolve

    resolved = resolve(recipe, overrides or [], tiny=tiny, options=("--tiny", "--help"))
    from ft.train.inspect import inspect as look

    look(resolved, _console())


@app.command(context_settings=_OVERRIDES)
def check(recipe: RecipeFile, overrides: Overrides = None, tiny: Tiny = False) -> None:
    """Try early what could fail late. Exit status 0 is go, 2 is no-go, with reasons."""
    from ft.commands.recipes import resolve

    resolved = resolve(recipe, overrides or [], tiny=tiny, options=("--tiny", "--help"))
    from ft.train.check import check as passes

    raise typer.Exit(0 if passes(resolved, _console()) else 2)


@app.command("eval", context_settings=_OVERRIDES)
def evaluate(
    recipe: RecipeFile,
    words: Annotated[
        list[str] | None, typer.Argument(help="A file of prompts, and overrides.", metavar="[TASK] [NAME=VALUE]")
    ] = None,
    adapter: Annotated[
        Path | None, typer.Option(help="An adapter, a whole (merged) model, or a run's final weights; none: the base.")
    ] = None,
    sampled: Annotated[int, typer.Option(help="Draw so many answers to each prompt; 0: the likeliest.", min=0)] = 0,
    tiny: Tiny = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print the numbers as JSON.")] = False,
) -> None:
    """Rewards of a model's answers: of TASK's prompts, or of the recipe's data.eval."""
    from ft.commands.evaluate import evaluate as measure
    from ft.commands.recipes import resolve

    files = [word for word in words or [] if "=" not in word and not word.startswith("-")]
    options = ("--adapter", "--sampled", "--tiny", "--json", "--help")
    resolved = resolve(recipe, [w for w in words or [] if w not in files], tiny=tiny, options=options)
    measure(resolved, files, adapter=adapter, sampled=sampled, as_json=as_json)


@app.command(context_settings=_OVERRIDES)
def reward(
    recipe: RecipeFile,
    on: Annotated[Path, typer.Option(help="Rows with a column `completion`, and what their prompts' rows have.")],
    overrides: Overrides = None,
) -> None:
    """Try a recipe's reward functions by themselves. Exit status 2: one failed."""
    from ft.commands.recipes import resolve
    from ft.commands.reward import reward as score

    raise typer.Exit(0 if score(resolve(recipe, overrides or [], options=("--on", "--help")), on, _console()) else 2)


@app.command()
def rollouts(
    folder: Annotated[Path, typer.Argument(help="A run folder.", metavar="RUN")],
    step: Annotated[int | None, typer.Option(help="Of this step; the last one by default.")] = None,
    best: Annotated[bool, typer.Option("--best", help="Of all steps, those with the highest rewards.")] = False,
    worst: Annotated[bool, typer.Option("--worst", help="Of all steps, those with the lowest rewards.")] = False,
    most: Annotated[int, typer.Option("-n", help="How many.", min=1)] = 10,
) -> None:
    """Show the scored answers that a run has kept."""
    from ft.commands.rollouts import show

    show(folder, _console(), step=step, best=best, worst=worst, most=most)


@app.command(context_settings=_OVERRIDES)
def serve(recipe: RecipeFile, overrides: Overrides = None) -> None:
    """Start the vLLM server that a recipe samples from, in the foreground, for runs given sampler.url."""
    from ft.commands.recipes import resolve
    from ft.commands.serve import serve as start

    start(resolve(recipe, overrides or [], options=("--help",)), lambda line: print(line, flush=True))


@bench.command()
def kernels(
    ops: Annotated[
        list[str] | None, typer.Argument(help="experts nf4 logprobs routing reductions; all by default.", metavar="OP")
    ] = None,
    case: Annotated[str, typer.Option(help="Cases whose names hold this.")] = "",
    rounds: Annotated[int, typer.Option(help="Turns of each contender.", min=1)] = 5,
    threads: Annotated[int | None, typer.Option(help="Of torch on the CPU.", min=1)] = None,
    dtype: Annotated[list[str] | None, typer.Option(help="float32, bfloat16, float16; may be repeated.")] = None,
    file: Annotated[
        Path | None, typer.Option("--json", help="Append results here. In a checkout: bench/results/kernels.jsonl.")
    ] = None,
    compile: Annotated[bool, typer.Option(help="Without a GPU: compile the Triton kernels for each target.")] = True,
    torch_compile: Annotated[bool, typer.Option("--torch-compile", help="Time torch.compile of plain torch too.")] = (
        False
    ),
) -> None:
    """Test kernels, then time them beside other libraries that are installed. Status 1: a result was wrong."""
    from ft.commands.bench import Options, run

    options = Options(
        case=case, rounds=rounds, dtypes=tuple(dtype or ()), torch_compile=torch_compile, compile=compile, file=file
    )
    if not run(ops or [], options, threads, _console()):
        raise typer.Exit(1)


def _help(ctx: typer.Context, recipe: Path | None, words: list[str], tiny: bool) -> None:
    """Usage, and the fields of the recipe where one is named."""
    print(ctx.get_help(), file=sys.stdout)
    if recipe is not None:
        from ft.commands.recipes import resolve
        from ft.recipe.show import print_recipe

        print()
        print_recipe(resolve(recipe, words, tiny=tiny), _console())


def _announce(named: Recipe, resolved: Recipe) -> None:
    """Say what a rehearsal changed."""
    from ft.recipe.show import compare

    if named != resolved:
        print("rehearsal of a shrunken model; changed for it:")
        for path, before, after in compare(named, resolved):
            print(f"  {path}: {before} -> {after}")


def _console() -> Console:
    from rich.console import Console

    return Console() if sys.stdout.isatty() else Console(width=120)


def _rank() -> int:
    return int(os.environ.get("RANK", "0"))


# Errors ---------------------------------------------------------------------------------------------------------------


def main() -> None:
    """The entry point: errors become one message and an exit status."""
    sys.path.append(os.getcwd())  # `ft` and `python -m ft` find the modules beside the recipes alike
    place = _Place()
    try:
        app(obj=place, prog_name="ft")
    except FtError as error:
        _complain(str(error))
        sys.exit(2)
    except KeyboardInterrupt:
        sys.exit(130)
    except Exception as error:
        file = _keep(error, place.folder)
        _complain(f"{type(error).__name__}: {error}".rstrip(": ") + f"\n  traceback: {file}")
        sys.exit(1)


def _complain(message: str) -> None:
    """One message on stderr. Ranks other than the first say one line: all of them tend to say the same."""
    from rich.console import Console
    from rich.text import Text

    if rank := _rank():
        message = f"rank {rank}: {message.splitlines()[0]}"
    lines = message.splitlines()
    text = "\n".join(lines[:30] + ([f"  ... and {len(lines) - 30} more lines"] if len(lines) > 30 else []))
    Console(stderr=True).print(Text.assemble(("error: ", "bold red"), text), soft_wrap=True)


def _keep(error: Exception, folder: Path | None) -> Path:
    """Write the traceback into the run folder if there is one, else here."""
    rank = f"-rank{_rank()}" if _rank() else ""
    home = folder if folder is not None and folder.is_dir() else Path()
    file = home / f"ft-error-{time.strftime('%Y%m%d-%H%M%S')}{rank}.log"
    file.write_text("".join(traceback.format_exception(error)), encoding="utf-8")
    return file
