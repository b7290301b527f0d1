"""What must never pass unseen: steps that are not finite, and trained tensors without a gradient."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path

import torch
from attrs import field, frozen
from safetensors.torch import save_file
from torch import Tensor, nn

from ft import dist
from ft.dist import World
from ft.errors import NumericsError
from ft.types import Batch


@frozen(kw_only=True, eq=False)
class Suspect:
    """A step whose flag has not been looked at yet, with what is needed to tell of it."""

    step: int
    bad: Tensor  # 0-d bool, the same on all ranks
    batches: tuple[Batch, ...]


@frozen(kw_only=True, eq=False)
class Watch:
    """Counts bad steps in a row. ``dump`` takes what a person needs to find the row that did it."""

    folder: Path
    patience: int
    world: World
    row: list[int] = field(factory=list)

    def look(self, suspects: list[Suspect]) -> list[int]:
        """Look at the flags of all steps since the last call; returns the bad ones, dumped.

        Raises:
            NumericsError: ``patience`` steps in a row were bad.
        """
        bad_steps = []
        for suspect in suspects:
            if not bool(suspect.bad):
                self.row.clear()
                continue
            bad_steps.append(suspect.step)
            self.row.append(suspect.step)
            dump(self.folder, suspect, self.world)
            if len(self.row) >= self.patience:
                raise NumericsError(
                    f"loss or gradient was not finite {len(self.row)} steps in a row",
                    where=f"step {suspect.step}",
                    fix=f"look at {self.folder}; lower optim.lr; the weights are those before step {self.row[0]}",
                )
        return bad_steps


def dump(folder: Path, suspect: Suspect, world: World) -> None:
    """Write this rank's micro-batches of a bad step: tokens as safetensors, the names of their rows as JSON."""
    folder.mkdir(parents=True, exist_ok=True)
    stem = folder / f"step-{suspect.step:06d}-rank-{world.rank}"
    tensors, rows = {}, []
    for i, batch in enumerate(suspect.batches):
        for name in ("input_T", "target_T", "mask_T", "cu_S1"):
            tensors[f"{i}.{name}"] = getattr(batch, name).cpu().contiguous()
        rows.append({"sources": list(batch.sources), "lengths": list(batch.lengths)})
    save_file(tensors, stem.with_suffix(".safetensors"))
    stem.with_suffix(".json").write_text(json.dumps({"step": suspect.step, "batches": rows}, indent=1))


class GradientCheck:
    """Every trained tensor must have had a non-zero gradient by its second step.

    Adapters start with one factor at zero, whose partner gets its first gradient in the second step.
    """

    STEPS = 2

    def __init__(self, parameters: Mapping[str, nn.Parameter]):
        self.parameters = parameters
        self.seen: dict[str, Tensor] = {}
        self.steps = 0

    def after_backward(self, world: World) -> None:
        """Call between backward and the optimizer step; does nothing after its last look.

        Raises:
            NumericsError: names the tensors that got none.
        """
        if self.steps >= self.STEPS:
            return
        self.steps += 1
        for name, p in self.parameters.items():
            if p.grad is not None:
                local = p.grad.to_local() if hasattr(p.grad, "to_local") else p.grad  # pyright: ignore
                hit = (local != 0).any() if local.numel() else torch.zeros((), dtype=torch.bool, device=local.device)
                self.seen[name] = hit | self.seen[name] if name in self.seen else hit
        if self.steps == self.STEPS:
            self._judge(world)

    def _judge(self, world: World) -> None:
        flags = {name: self.seen[name].float() if name in self.seen else 0.0 for name in self.parameters}
        hits = dist.reduce_tree(flags, world, "max")
        dead = [name for name, hit in hits.items() if not bool(hit)]
        if dead:
            shown = "\n    ".join(dead[:10]) + (f"\n    ... and {len(dead) - 10} more" if len(dead) > 10 else "")
            raise NumericsError(
                f"{len(dead)} of {len(hits)} trained tensors got no gradient in {self.STEPS} steps:\n    {shown}",
                expected="every trained tensor to be trained",
                fix="leave them out: adapter.targets for adapters, model.frozen for full fine-tuning",
            )
