"""The same loss functions in three loops that are not ft's, each in a file under 25 lines of tests/foreign.

The loops see one tiny model, one batch and one learning rate, so they must report one sequence of losses.
Shapes: B rows, W columns.
"""

from __future__ import annotations

import copy
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import tiny_models
import torch
from foreign import torch_loop
from torch import Tensor

torch.set_num_threads(1)
STEPS, LR = 6, 0.05
FILES = sorted((Path(__file__).parent / "foreign").glob("*.py"))


@pytest.fixture(scope="module")
def model() -> Any:
    return tiny_models.build("llama")


@pytest.fixture(scope="module")
def batch(model: Any) -> dict[str, Tensor]:
    """Four rows of 12 ids; the first 3 are the prompt, and rows 1 and 3 end early."""
    ids_BW = tiny_models.tokens(4, 12)
    slot_W, length_B = torch.arange(1, 12), torch.tensor([12, 7, 12, 9])
    mask_BW = (slot_W >= 3) & (slot_W < length_B[:, None])
    with torch.no_grad():
        logp_BW = model(input_ids=ids_BW).logits[:, :-1].log_softmax(-1).gather(-1, ids_BW[:, 1:, None])[..., 0]
    adv_B = torch.tensor([1.0, -0.5, 0.8, -1.2])
    return {"input_ids": ids_BW, "old_logps": logp_BW, "advantages": adv_B, "mask": mask_BW}


@pytest.fixture(scope="module")
def plain(model: Any, batch: dict[str, Tensor]) -> list[float]:
    return list(torch_loop.train(copy.deepcopy(model).train(), [batch] * STEPS, LR))


@pytest.mark.parametrize("path", FILES, ids=lambda p: p.stem)
def test_each_is_under_25_lines(path: Path) -> None:
    assert len(path.read_text().splitlines()) < 25


def test_a_plain_loop_learns(plain: list[float]) -> None:
    assert len(plain) == STEPS and plain[-1] < plain[0] - 0.01
    assert all(after < before for before, after in pairwise(plain))


def test_a_transformers_trainer_learns_the_same(
    model: Any, batch: dict[str, Tensor], plain: list[float], tmp_path: Path
) -> None:
    from foreign.transformers_trainer import PolicyTrainer
    from transformers import TrainingArguments

    arguments = TrainingArguments(
        output_dir=str(tmp_path), per_device_train_batch_size=4, max_steps=STEPS, learning_rate=LR, optim="sgd",
        lr_scheduler_type="constant", max_grad_norm=0.0, logging_steps=1, save_strategy="no", report_to=[],
        use_cpu=True, remove_unused_columns=False, disable_tqdm=True,
    )  # fmt: skip
    rows = [{name: value[i] for name, value in batch.items()} for i in range(4)]
    trainer = PolicyTrainer(model=copy.deepcopy(model), args=arguments, train_dataset=rows)  # type: ignore[arg-type]
    trainer.train()
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert losses == pytest.approx(plain, abs=2e-4)  # the Trainer rounds what it logs


def test_lightning_fabric_learns_the_same(model: Any, batch: dict[str, Tensor], plain: list[float]) -> None:
    pytest.importorskip("lightning.fabric", reason="needs the package lightning")
    from foreign import lightning_fabric
    from lightning.fabric import Fabric

    fabric = Fabric(accelerator="cpu", devices=1)
    losses = list(lightning_fabric.train(fabric, copy.deepcopy(model).train(), [batch] * STEPS, LR))
    assert losses == pytest.approx(plain, abs=1e-5)
