"""A reference's log-probs, computed once for every row that a run will ask for and kept on disk.

<data.cache>/reference/<identity>/<SHA-256 of the file>.safetensors holds `key` [n, 32], `count` [n] and `logp` [sum of
counts]: of each row the log-probs of its trained tokens. The identity is that of the reference: its weights, type and
quantisation; adapters play no part, since they are off. The key is that of the row's tokens and mask, so changed rows
are computed anew and the others are found. Nothing removes old files: the folder may be deleted at any time.

Shapes: L tokens of one row, n rows of a file, N trained tokens.
"""

from __future__ import annotations

import gc
import hashlib
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import attrs
import numpy as np
import torch
import torch.distributed as c10d
from attrs import evolve, frozen
from safetensors import SafetensorError
from safetensors.numpy import load as load_tensors
from safetensors.numpy import save as save_tensors
from torch import Tensor

from ft import dist
from ft.data.pack import collate, pack, pack_rows, shard
from ft.dist import World
from ft.errors import RecipeError
from ft.io.files import file_sha256, sync_folder, write_file
from ft.models.policy import Policy
from ft.models.reference import Second, policy_logps, reference_logps
from ft.recipe import Recipe
from ft.train import reference
from ft.train.evaluate import held_out_examples
from ft.types import Asks, Batch, Context, Counts, Dataset, Example, LogProbs, LossOutput, Method, asked

Say = Callable[[str], None]
Ask = Callable[[Policy, Batch], Tensor]  # -> log-probs [T]
Values = Mapping[bytes, np.ndarray]
VERSION = 1
PART = 2**20  # trained tokens that are computed, and kept, at a time


@frozen(kw_only=True, eq=False)
class Known:
    """A method whose examples come with their reference log-probs, looked up and not computed."""

    method: Method
    values: Values

    @property
    def asks(self) -> Asks:
        return asked(self.method)

    def examples(self, step: int, ctx: Context) -> Sequence[Example]:
        return [self._with(example) for example in self.method.examples(step, ctx)]

    def prepare(self, batch: Batch, policy: Any) -> Batch:
        return self.method.prepare(batch, policy)

    def loss(self, logprobs: LogProbs, batch: Batch, counts: Counts) -> LossOutput:
        return self.method.loss(logprobs, batch, counts)

    def _with(self, example: Example) -> Example:
        found = self.values.get(key(example))
        if found is None:
            raise RecipeError("the reference's log-probs of this row were not computed beforehand",
                              where="reference.cached", got=example.source, fix="reference.cached=false")  # fmt: skip
        ref_logp_L = np.zeros(len(example), np.float32)
        ref_logp_L[_trained(example)] = found
        against = example.against and self._with(example.against)
        return evolve(example, ref_logp_L=ref_logp_L, against=against)


def _trained(example: Example) -> np.ndarray:
    """Places of the tokens that are scored: nothing predicts the first."""
    return np.flatnonzero(example.mask_L[1:]) + 1


def key(example: Example) -> bytes:
    """SHA-256 of the row's tokens and mask."""
    return hashlib.sha256(example.tokens_L.astype("<i4").tobytes() + example.mask_L[1:].tobytes()).digest()


def identity(source: Second) -> str:
    """Which reference: its weights' bytes (or commit, or seed where they are random), type and quantisation."""
    model, folder = source.model, source.folder
    if model.tiny or folder is None:
        weights: Any = source.seed
    else:
        weights = folder.commit or [file_sha256(path) for path in sorted(folder.path.glob("*.safetensors"))]
    what = {
        "version": VERSION,
        "weights": weights,
        "config": source.config.to_diff_dict(),
        "dtype": model.dtype,
        "quant": attrs.asdict(model.quant) if model.quant else None,
    }
    return hashlib.sha256(json.dumps(what, sort_keys=True, default=str).encode()).hexdigest()


# Rows of a run --------------------------------------------------------------------------------------------------------


@frozen(kw_only=True, eq=False)
class Rows:
    """Every row that a run will ask for, by key, and what is known of them."""

    rows: Mapping[bytes, Example]
    values: Values
    folder: Path | None

    @property
    def missing(self) -> list[bytes]:
        return [k for k in self.rows if k not in self.values]


def rows_of(
    recipe: Recipe, source: Second, context: Context, held_out: Dataset | None, steps: int, world: World, say: Say
) -> Rows:
    """The rows of all steps and of the evaluation, with what is kept of them for ``source``. The same on every rank.

    They are what the method makes of them: a mismatched answer of KTO is a row too.
    """
    found: dict[bytes, Example] = {}
    for step in range(steps):
        _add(found, recipe.method.examples(step, context))
    if held_out is not None:
        _add(found, held_out_examples(recipe.method, held_out, context, recipe.eval.examples))
    cache = recipe.data.cache
    folder = cache / "reference" / identity(source) if cache is not None else None
    rows = Rows(rows=found, values=read(folder, say) if folder else {}, folder=folder)
    return rows if _agreed(rows.missing, world) else evolve(rows, values={})


def _add(found: dict[bytes, Example], examples: Sequence[Example]) -> None:
    for example in examples:
        plain = Example(tokens_L=example.tokens_L, mask_L=example.mask_L, source=example.source)
        found.setdefault(key(plain), plain)
        if example.against is not None:
            _add(found, [example.against])


def _agreed(missing: Sequence[bytes], world: World) -> bool:
    """Whether all ranks miss the same rows: another run may have written a file while they read."""
    mark = float(int.from_bytes(hashlib.sha256(b"".join(missing)).digest()[:6], "little"))
    most = dist.reduce_tree({"high": mark, "low": -mark}, world, "max")
    return float(most["high"]) == -float(most["low"])


def by_second(rows: Rows, second: Second, recipe: Recipe, world: World, say: Say) -> Rows:
    """The rows with what a second model says of them; it is built only if something is missing, and let go of."""
    if not rows.missing:
        return fill(rows, policy_logps, None, recipe, world, say)
    policy = reference.built(second, recipe, world, say)
    rows = fill(rows, policy_logps, policy, recipe, world, say)
    del policy
    gc.collect()  # sharded modules refer to each other in circles
    if world.device.type == "cuda":
        torch.cuda.empty_cache()
    return rows


def by_policy(rows: Rows, policy: Policy, recipe: Recipe, world: World, say: Say) -> Rows:
    """The rows with what the policy says of them before its first step, its adapters off where it has any."""
    return fill(rows, policy_logps if recipe.adapter is None else reference_logps, policy, recipe, world, say)


def fill(rows: Rows, ask: Ask, policy: Policy | None, recipe: Recipe, world: World, say: Say) -> Rows:
    """Compute what is missing with ``ask(policy, batch)``, all ranks together, and keep it."""
    missing, values = [rows.rows[k] for k in rows.missing], dict(rows.values)
    say(f"reference: log-probs of {len(rows.rows) - len(missing):,} rows were kept, {len(missing):,} are computed now")
    for part in _parts(missing):
        assert policy is not None
        new = dict(zip(map(key, part), _asked(part, ask, policy, recipe.batch.tokens, world), strict=True))
        values |= new
        if rows.folder is not None and world.first:
            _keep(rows.folder, new, say)
    return evolve(rows, values=values)


def _parts(examples: Sequence[Example]) -> Iterator[list[Example]]:
    part, size = [], 0
    for example in examples:
        part.append(example)
        size += len(_trained(example))
        if size >= PART:
            yield part
            part, size = [], 0
    if part:
        yield part


def _asked(part: Sequence[Example], ask: Ask, policy: Policy, tokens: int, world: World) -> list[np.ndarray]:
    """The log-probs of each row's trained tokens; every rank computes its share of the rows and gets all of them."""
    counts = [len(_trained(example)) for example in part]
    cu = np.concatenate(([0], np.cumsum(counts)))
    at = {id(example): slice(int(cu[i]), int(cu[i + 1])) for i, example in enumerate(part)}
    logp_N = torch.zeros(int(cu[-1]), device=world.device)
    make = pack if policy.layout.kind == "packed" else pack_rows
    for examples in shard(make(part, tokens=tokens), rank=world.rank, world=world.size):
        batch = collate(examples).to(world.device)
        found_N = ask(policy, batch)[batch.trained_N]
        start = 0
        for example in examples:
            place = at[id(example)]
            stop = start + place.stop - place.start
            logp_N[place] = found_N[start:stop]
            start = stop
    if world.size > 1:
        c10d.all_reduce(logp_N)  # each value is one rank's; the others add 0
    return np.split(logp_N.cpu().numpy(), cu[1:-1])


# On disk --------------------------------------------------------------------------------------------------------------


def read(folder: Path, say: Say) -> dict[bytes, np.ndarray]:
    """All that was kept in ``folder``; a damaged file is announced and passed over."""
    found: dict[bytes, np.ndarray] = {}
    for path in sorted(folder.glob("*.safetensors")):
        data = path.read_bytes()
        try:
            if hashlib.sha256(data).hexdigest() != path.stem:
                raise ValueError("its checksum is not its name")
            table = load_tensors(data)
            keys, ends = table["key"], np.cumsum(table["count"])
            found |= dict(zip((k.tobytes() for k in keys), np.split(table["logp"], ends[:-1]), strict=True))
        except (ValueError, KeyError, SafetensorError) as error:
            say(f"kept log-probs in {path} are damaged ({error}); their rows are computed anew")
    return found


def _keep(folder: Path, values: Values, say: Say) -> None:
    """Write one file, whole or not at all. Where that fails, what was computed stays in memory, said aloud."""
    table = {
        "key": np.frombuffer(b"".join(values), np.uint8).reshape(-1, 32),
        "count": np.array([len(v) for v in values.values()], np.int64),
        "logp": np.concatenate(list(values.values())),
    }
    data = save_tensors(table)
    target = folder / f"{hashlib.sha256(data).hexdigest()}.safetensors"
    temporary = target.with_suffix(".tmp")
    try:
        folder.mkdir(parents=True, exist_ok=True)
        write_file(temporary, [data])
        temporary.rename(target)
        sync_folder(folder)
    except OSError as error:
        temporary.unlink(missing_ok=True)
        say(f"the reference's log-probs cannot be kept in {folder} ({error}); the next run computes them again")
