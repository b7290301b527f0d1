"""Every public name of ft.losses is there, is a function or a room, and needs torch alone."""

import subprocess
import sys
from types import FunctionType, ModuleType

import pytest

from ft import losses


@pytest.mark.parametrize("name", losses.__all__)
def test_a_public_name_is_what_it_says(name):
    found = getattr(losses, name)
    assert isinstance(found, ModuleType if name in losses._MODULES else FunctionType)
    assert found.__doc__
    assert getattr(losses, name) is found, "importing its module must not put the module in its place"


def test_all_and_the_table_agree():
    assert sorted([*losses._HOME, *losses._MODULES]) == sorted(losses.__all__)


def test_every_loss_needs_torch_alone():
    code = (
        "import sys\n"
        "for name in ('transformers', 'peft', 'safetensors', 'tokenizers', 'triton'):\n"
        "    sys.modules[name] = None\n"
        "from ft import losses\n"
        "assert all(getattr(losses, name) is not None for name in losses.__all__)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
