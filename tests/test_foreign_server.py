"""Servers that are not ours, or go while the run ends: what is looked at first, what is said, what is not done."""
# ruff: noqa: F811  (fixtures of another file)

from __future__ import annotations

import json
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from attrs import evolve
from fake_vllm import Fake
from safetensors.torch import load_file
from test_vllm import Tiny, fake, gone, pids, prompts, sampler, start, told, world  # noqa: F401  (fixtures)
from tiny_models import build

from ft import GRPO, VLLM, Data, LoRA, Model, Recipe, Sampling, dist
from ft.dist import World
from ft.errors import RecipeError, ServerError
from ft.io.runfolder import is_free
from ft.models import lora as loras
from ft.models.build import Built
from ft.models.experts import use_ft_experts
from ft.models.layout import Layout
from ft.models.policy import Policy, Scorer
from ft.rollout.client import Client, Unreachable, in_parallel
from ft.rollout.foreign import Wanted, meet
from ft.rollout.rewards import exact
from ft.rollout.sent import weights
from ft.rollout.server import Server


def folder(path: Path, **config: Any) -> Path:
    path.mkdir()
    (path / "config.json").write_text(json.dumps(config))
    return path


def asked(fake: Fake, model: Path, context: int = 100, token: str = "") -> list[str]:
    said: list[str] = []
    meet(Client(url=fake.url, token=token, timeout=2.0), Wanted(model=model, context=context), said.append)
    return said


def test_one_that_fits_is_taken_in_silence(fake: Fake, tmp_path: Path):
    ours = folder(tmp_path / "ours", hidden_size=8)
    for root in ("", "org/name", str(ours), str(folder(tmp_path / "copy", hidden_size=8))):
        fake.root = root
        assert asked(fake, ours) == []


def test_another_model_too_short_texts_and_an_old_version_are_said(fake: Fake, tmp_path: Path):
    ours = folder(tmp_path / "ours", hidden_size=8)
    fake.root = str(folder(tmp_path / "theirs", hidden_size=16))
    with pytest.raises(ServerError, match=f"(?s){fake.url}.*another model.*ours.*theirs.*ft serve"):
        asked(fake, ours)
    fake.root = str(ours)
    with pytest.raises(ServerError, match=r"(?s)shorter texts.*at least 257 tokens.*got: 256"):
        asked(fake, ours, 257)
    assert asked(fake, ours, 256) == []
    fake.version = "0.9.2.dev3"
    assert asked(fake, ours) == [
        f"the server at {fake.url} runs vLLM 0.9.2.dev3, older than what ft is tested with (0.32)"
    ]


def test_a_key_and_what_is_no_vllm_are_said(fake: Fake, tmp_path: Path):
    fake.token = "sesame"
    with pytest.raises(ServerError, match=r"(?s)does not take our key.*FT_VLLM_TOKEN"):
        asked(fake, tmp_path)
    assert asked(fake, tmp_path, token="sesame") == []
    elsewhere = Client(url=f"{fake.url}/other", token="sesame")
    with pytest.raises(ServerError, match="not a vLLM server"):
        meet(elsewhere, Wanted(model=tmp_path, context=1), print)


def test_the_run_looks_before_it_sends(fake: Fake, world: World, tmp_path: Path):
    tiny = Tiny()
    made = sampler(world, tmp_path, url=fake.url, tiny=tiny)
    made.weights = evolve(tiny.weights, wanted=Wanted(model=tmp_path, context=257))
    with pytest.raises(ServerError, match="shorter texts"):
        made.sync(0)
    assert not fake.seen and not (tmp_path / "sync").exists()


def test_a_server_that_takes_no_adapters_is_told_from_one_that_lost_them(fake: Fake, world: World, tmp_path: Path):
    fake.closed = True
    with pytest.raises(ServerError, match=r"(?s)takes no adapters while it runs.*--enable-lora"):
        sampler(world, tmp_path, url=fake.url).sync(0)
    assert len(fake.asked("/v1/load_lora_adapter")) == 1


def test_an_adapter_that_the_server_fails_at_is_an_error_at_once(fake: Fake, world: World, tmp_path: Path):
    fake.unfit = "LoRA rank 64 is greater than max_lora_rank 16."
    with pytest.raises(ServerError, match=r"(?s)cannot apply the adapter.*rank 64.*lower adapter.r"):
        sampler(world, tmp_path, url=fake.url).sync(0)
    assert len(fake.asked("/v1/load_lora_adapter")) == 1


def test_a_run_may_go_on_with_a_server_elsewhere():
    assert is_free("sampler.url") and is_free("sampler.python") and is_free("judging.workers")
    assert not is_free("sampler") and not is_free("sampler.canary") and not is_free("method.sampling.temperature")


# --- the end of a run -------------------------------------------------------------------------------------------------


def test_waiting_for_answers_ends_with_the_run():
    ended = threading.Event()
    threading.Timer(0.3, ended.set).start()
    began = time.monotonic()
    with pytest.raises(Unreachable, match="the run is ending"):
        in_parallel(lambda item: time.sleep(5), [1, 2], 2, ended)
    assert time.monotonic() - began < 4


def test_a_server_that_ends_with_the_run_is_not_started_again(
    start: Callable[..., Server],
    world: World,
    tmp_path: Path,
):
    """As when answers are drawn ahead: another thread waits for them while the run ends."""
    server = start("ok ok ok hang")
    made = sampler(world, tmp_path, server=server, options={"canary": None, "concurrency": 1})
    made.sync(0)
    failed: list[BaseException] = []

    def ask() -> None:
        try:
            made.ask(prompts(1), 1, 0)
        except Exception as error:
            failed.append(error)

    thread = threading.Thread(target=ask)
    thread.start()
    time.sleep(0.3)
    made.close()
    thread.join(5)
    assert not thread.is_alive() and isinstance(failed[0], (ServerError, Unreachable))
    assert gone(pids(tmp_path)) and len(pids(tmp_path)) == 2  # of one start
    assert not [line for line in told(made) if "started again" in line]
    with pytest.raises(ServerError, match="the run is ending"):
        server.start()
    assert gone(pids(tmp_path))


# --- what can be sent -------------------------------------------------------------------------------------------------


def adapted(folder: Path, targets: tuple[str, ...]) -> tuple[Recipe, Built]:
    net = build("qwen3_moe")
    net.save_pretrained(folder)
    use_ft_experts(net)
    lora = LoRA(r=2, alpha=4.0, targets=targets)
    attached = loras.attach(net, lora)
    policy = Policy(scorer=Scorer(net), config=net.config, layout=Layout(kind="padded", attention="sdpa"))
    recipe = Recipe(
        model=Model(id=str(folder)), adapter=lora, data=Data(train="x.jsonl", max_tokens=64),
        method=GRPO(rewards=exact, sampling=Sampling(max_tokens=8)), sampler=VLLM(),
    )  # fmt: skip
    return recipe, Built(policy=policy, attached=attached, folder=None)


@pytest.mark.skipif(torch.cuda.is_available(), reason="refused without a GPU only")
@pytest.mark.parametrize("targets", [("attention",), ("experts",)])
def test_models_with_experts_and_adapters_are_refused_on_a_cpu(tmp_path: Path, targets: tuple[str, ...]):
    recipe, built = adapted(tmp_path, targets)
    with pytest.raises(RecipeError, match="vLLM on a CPU takes no adapters"):
        weights(recipe, built, tmp_path, VLLM())


def test_adapters_of_experts_go_to_a_server_elsewhere_one_by_one(tmp_path: Path):
    recipe, built = adapted(tmp_path / "base", ("experts",))
    sent = weights(recipe, built, tmp_path / "base", VLLM(url="http://127.0.0.1:1"))
    assert sent.wanted == Wanted(model=tmp_path / "base", context=72)
    tensors = sent.gather()
    assert len(tensors) == 2 * 8 * 3 * 2  # layers, experts, projections, factors
    sent.write(tmp_path / "sent", tensors)
    config = json.loads((tmp_path / "sent" / "adapter_config.json").read_text())
    assert config["target_modules"] == ["down_proj", "gate_proj", "up_proj"] and config["target_parameters"] is None


def test_adapters_do_not_go_by_nccl(tmp_path: Path):
    recipe, built = adapted(tmp_path, ("attention",))
    with pytest.raises(RecipeError, match="adapters are sent in folders"):
        weights(recipe, built, tmp_path, VLLM(url="http://127.0.0.1:1", transfer="nccl"))


def test_a_whole_model_with_experts_is_sent_as_its_folder_was(tmp_path: Path):
    net = build("qwen3_moe")
    net.save_pretrained(tmp_path / "base")
    recipe, _ = adapted(tmp_path / "other", ("attention",))
    policy = Policy(scorer=Scorer(net), config=net.config, layout=Layout(kind="padded", attention="sdpa"))
    recipe = evolve(recipe, adapter=None, model=Model(id=str(tmp_path / "base"), dtype="float32"))
    sent = weights(recipe, Built(policy=policy, attached=None, folder=None), tmp_path / "base", VLLM())
    with dist.launched():
        sent.write(tmp_path / "sent", sent.gather())
    ours, theirs = (tmp_path / name / "model.safetensors" for name in ("base", "sent"))
    before, after = load_file(ours), load_file(theirs)
    assert before.keys() == after.keys() and all(torch.equal(before[n], after[n]) for n in before)
    assert (tmp_path / "sent" / "config.json").is_file()
