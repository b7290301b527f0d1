import json

import numpy as np
import pytest
import torch
from torch import nn

from ft.data.pack import collate
from ft.dist import launched
from ft.errors import NumericsError
from ft.train.guard import GradientCheck, Suspect, Watch
from ft.types import Example


@pytest.fixture
def world():
    with launched() as world:
        yield world


def batch():
    tokens, mask = np.arange(5, dtype=np.int32), np.ones(5, dtype=bool)
    return collate([Example(tokens_L=tokens, mask_L=mask, source="rows.jsonl:7")])


def suspect(step: int, bad: bool) -> Suspect:
    return Suspect(step=step, bad=torch.tensor(bad), batches=(batch(),))


def test_a_bad_step_is_dumped_with_the_names_of_its_rows(tmp_path, world):
    watch = Watch(folder=tmp_path / "bad", patience=3, world=world)
    assert watch.look([suspect(4, False), suspect(5, True)]) == [5]
    kept = json.loads((tmp_path / "bad" / "step-000005-rank-0.json").read_text())
    assert kept["batches"] == [{"sources": ["rows.jsonl:7"], "lengths": [4]}]
    assert (tmp_path / "bad" / "step-000005-rank-0.safetensors").is_file()


def test_only_bad_steps_in_a_row_stop_the_run(tmp_path, world):
    watch = Watch(folder=tmp_path, patience=2, world=world)
    assert watch.look([suspect(0, True), suspect(1, False), suspect(2, True)]) == [0, 2]
    with pytest.raises(NumericsError, match="2 steps in a row"):
        watch.look([suspect(3, True)])


def run_steps(world, parameters, grads_by_step):
    check = GradientCheck(parameters)
    for grads in grads_by_step:
        for name, p in parameters.items():
            p.grad = grads[name]
        check.after_backward(world)


def test_a_tensor_may_wait_for_its_second_step(world):
    parameters = {"a": nn.Parameter(torch.zeros(2)), "b": nn.Parameter(torch.zeros(2))}
    run_steps(world, parameters, [{"a": torch.zeros(2), "b": torch.ones(2)}, {"a": torch.ones(2), "b": None}])


def test_a_tensor_without_a_gradient_stops_the_run_by_name(world):
    parameters = {"layers.0.a": nn.Parameter(torch.zeros(2)), "b": nn.Parameter(torch.zeros(2))}
    with pytest.raises(NumericsError, match=r"1 of 2 trained tensors got no gradient in 2 steps:\n    layers.0.a"):
        run_steps(world, parameters, [{"layers.0.a": torch.zeros(2), "b": torch.ones(2)}] * 2)
