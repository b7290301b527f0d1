"""Loss and gradient of a step do not depend on how it is split: micro-batch budgets x ranks x layouts."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

WORKER = Path(__file__).with_name("split_worker.py")


@pytest.fixture(scope="module")
def results(tmp_path_factory) -> dict[tuple[str, int, int, str], dict[str, torch.Tensor]]:
    folder = tmp_path_factory.mktemp("split")
    for ranks in (1, 2, 3):
        launcher = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={ranks}"] if ranks > 1 else []
        done = subprocess.run(
            [sys.executable, *launcher, str(WORKER), str(folder)], capture_output=True, text=True, timeout=280
        )
        assert done.returncode == 0, done.stderr[-4000:]
    found = {}
    for path in folder.iterdir():
        name, size, tokens, layout = path.stem.split("-")
        found[name, int(size), int(tokens), layout] = load_file(path)
    return found


@pytest.mark.parametrize("name", ["full", "qlora"])
def test_loss_and_gradient_are_equal_however_a_step_is_split(results, name):
    reference = results[name, 1, 256, "packed"]
    assert len(results) == 2 * 3 * 3 * 2
    for (model, *split), found in results.items():
        if model != name:
            continue
        assert found.keys() == reference.keys()
        for key in found.keys() - {"idle", "batches"}:
            torch.testing.assert_close(
                found[key], reference[key], rtol=2e-4, atol=2e-6, msg=lambda m, k=key, s=split: f"{k} at {s}: {m}"
            )


def test_the_splits_are_what_they_claim_to_be(results):
    assert results["full", 1, 256, "packed"]["batches"] == 1
    assert results["full", 1, 30, "packed"]["batches"] >= 4
    assert results["full", 3, 256, "packed"]["idle"] == 1.0, "two of three ranks have nothing to do"
    assert results["full", 2, 256, "padded"]["idle"] == 1.0
