"""Whole models on their way to a running server: read again from a folder, or sent over a wire.

The server is a stand-in (tests/fake_vllm.py) which scores with a copy that loads what was written or sent.
"""
# ruff: noqa: F811  (fixtures of another file)

from __future__ import annotations

import asyncio
import base64
import os
import queue
import signal
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from attrs import define, evolve, field
from fake_vllm import Fake
from safetensors.torch import load_file
from test_vllm import fake, gone, pids, prompts, sampler, start, told, world  # noqa: F401  (fixtures)
from tiny_models import build
from torch import Tensor

from ft import GRPO, VLLM, Data, LoRA, Model, Recipe, Sampling
from ft.dist import World
from ft.errors import RecipeError, ServerError
from ft.io import served
from ft.io.weights import open_weights
from ft.models import load
from ft.models.build import Built
from ft.models.layout import Layout
from ft.models.policy import Policy, Scorer
from ft.rollout import server as servers
from ft.rollout.client import Broken, Unreachable
from ft.rollout.rewards import exact
from ft.rollout.sent import Weights, packed, weights
from ft.rollout.server import Server, environment
from ft.rollout.transfer import Broadcast, together
from ft.rollout.vllm import VLLMSampler
from ft.rollout.wire import Nccl, chosen

# What a server is asked for each time, in this order.
HEAD = ["/pause?mode=wait", "/collective_rpc"]
TAIL = ["/collective_rpc", "/reset_prefix_cache", "/update_weight_version", "/resume"]
WIRED = [*HEAD, "/start_weight_update", "/update_weights", "/finish_weight_update", *TAIL]


def recipe(model: Path, **over: Any) -> Recipe:
    given: dict[str, Any] = {
        "model": Model(id=str(model), dtype="float32"), "data": Data(train="x.jsonl", max_tokens=64),
        "method": GRPO(rewards=exact, sampling=Sampling(max_tokens=8)), "sampler": VLLM(),
    }  # fmt: skip
    return Recipe(**{**given, **over})


class Whole:
    """A tiny model as policy, all of it trained; and its copy behind a server, which scores with what arrived."""

    def __init__(self, folder: Path, url: str | None = None, family: str = "llama", **over: Any):
        self.net, self.copy, self.base = build(family, **over), build(family, seed=1, **over), folder / "base"
        self.net.save_pretrained(self.base)
        self.policy = Policy(
            scorer=Scorer(self.net), config=self.net.config, layout=Layout(kind="padded", attention="sdpa")
        )
        self.built = Built(policy=self.policy, attached=None, folder=None)
        self.arrived: dict[str, Tensor] = {}
        self.weights = weights(recipe(self.base), self.built, self.base, VLLM(url=url))

    @torch.no_grad()
    def move(self, seed: int = 1) -> None:
        generator = torch.Generator().manual_seed(seed)
        for parameter in self.net.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=generator), alpha=0.05)

    @torch.no_grad()
    def score(self, tokens: list[int], folder: str | None) -> list[float]:
        tensors = load_file(Path(folder) / "model.safetensors") if folder else self.arrived
        self.copy.load_state_dict(tensors)
        logp_LV = self.copy(torch.tensor([tokens])).logits[0].log_softmax(-1)
        return [float(logp_LV[i, t]) for i, t in enumerate(tokens[1:])]

    def wired(self, wire: Any) -> Weights:
        return wired(self.weights, self.net, self.base, wire)


def wired(found: Weights, net: torch.nn.Module, base: Path, wire: Any) -> Weights:
    """The same weights, sent over ``wire``."""
    stored = open_weights(base)
    plan = load.plan(net, stored, where="")
    return evolve(found, way=lambda _: Broadcast(wire), entries=lambda tensors: served.model(tensors, plan, stored))


def calls(fake: Fake) -> list[str]:
    """What it was asked for since the last time, without completions."""
    found = [path for path, _ in fake.seen if path != "/v1/completions"]
    fake.seen.clear()
    return found


def at(fake: Fake, world: World, folder: Path, whole: Whole, **over: Any) -> VLLMSampler:
    fake.whole, fake.score = True, whole.score
    return sampler(world, folder, url=fake.url, tiny=whole, **over)  # type: ignore[arg-type]  # of the same shape


def refuses(body: dict[str, Any]) -> None:
    raise RuntimeError("no such file")


def without_ours(body: dict[str, Any]) -> None:
    """A server that we did not start has no methods of ours."""
    if body["method"].startswith("ft_"):
        raise AttributeError(f"no attribute {body['method']!r}")


def unreadable(body: dict[str, Any]) -> None:
    if body["method"] == "reload_weights":
        refuses(body)


# --- from a folder ---------------------------------------------------------------------------------------------------


def test_each_step_is_read_again_in_place_and_the_server_goes_on(fake: Fake, world: World, tmp_path: Path):
    whole = Whole(tmp_path, fake.url)
    made = at(fake, world, tmp_path, whole)
    for step in range(3):
        whole.move(step)
        made.sync(step)
        asked = fake.asked("/collective_rpc")
        assert [body["method"] for body in asked] == ["ft_unpack", "reload_weights", "ft_repack"]
        assert calls(fake) == [*HEAD, "/collective_rpc", *TAIL] and not fake.paused
        assert Path(asked[1]["kwargs"]["weights_path"]).parent == (tmp_path / "sync").resolve()
        assert made.mismatch is not None and made.mismatch.divergence < 1e-10
        assert [r.policy_step for r in made.rollout(prompts(), 1, step)[0]] == [step]
    assert len(list((tmp_path / "sync").iterdir())) == 2
    assert not [line for line in told(made) if "again" in line]
    made.close()
    assert not list((tmp_path / "sync").iterdir())


def test_the_key_is_sent_with_every_call(fake: Fake, world: World, tmp_path: Path):
    whole, fake.token = Whole(tmp_path, fake.url), "sesame"
    made = at(fake, world, tmp_path, whole)
    assert made.client is not None
    made.client = evolve(made.client, token="sesame")
    made.sync(0)
    assert "/resume" in calls(fake) and not [line for line in told(made) if "key" in line]


def test_a_server_that_cannot_read_them_is_not_left_paused(fake: Fake, world: World, tmp_path: Path):
    fake.on["/collective_rpc"] = unreadable
    with pytest.raises(ServerError, match=r"(?s)cannot load the weights, and has none now.*no such file"):
        at(fake, world, tmp_path, Whole(tmp_path, fake.url)).sync(0)
    assert calls(fake) == [*HEAD, "/collective_rpc", "/resume"] and not fake.paused


def test_weights_that_are_not_taken_trip_the_canary(fake: Fake, world: World, tmp_path: Path):
    whole = Whole(tmp_path, fake.url)
    made = at(fake, world, tmp_path, whole)
    made.sync(0)
    stale = fake.adapters["base"]
    fake.score = lambda tokens, folder: whole.score(tokens, stale)
    whole.move()
    with pytest.raises(ServerError, match="still answers with the weights"):
        made.sync(1)


def test_a_cache_that_is_not_emptied_is_an_error(fake: Fake, world: World, tmp_path: Path):
    fake.on["/reset_prefix_cache"] = refuses
    with pytest.raises(ServerError, match="no such file"):
        at(fake, world, tmp_path, Whole(tmp_path, fake.url)).sync(0)
    assert not fake.paused


# --- servers that are not ours ---------------------------------------------------------------------------------------


def test_one_without_these_calls_is_told_how_to_have_them(fake: Fake, world: World, tmp_path: Path):
    whole = Whole(tmp_path, fake.url)
    made = at(fake, world, tmp_path, whole)
    fake.whole = False
    with pytest.raises(ServerError, match=r"(?s)takes no whole models.*ft serve RECIPE.*VLLM_SERVER_DEV_MODE=1"):
        made.sync(0)
    assert not calls(fake) and not (tmp_path / "sync").exists()
    fake.whole = True
    made.sync(0)
    fake.whole = False  # started anew, without
    whole.move()
    with pytest.raises(ServerError, match="takes no whole models"):
        made.sync(1)


@pytest.mark.parametrize("token", ["", "sesame"])
def test_one_that_takes_them_from_everybody_is_announced(fake: Fake, world: World, tmp_path: Path, token: str):
    fake.token, fake.guarded = token, False
    made = at(fake, world, tmp_path, Whole(tmp_path, fake.url))
    assert made.client is not None
    made.client = evolve(made.client, token=token)
    made.sync(0)
    assert f"whoever reaches {fake.url} can change its weights" in told(made)[0]


def test_one_that_keeps_no_version_is_not_asked_what_it_has(fake: Fake, world: World, tmp_path: Path):
    made = at(fake, world, tmp_path, Whole(tmp_path, fake.url))
    fake.old = True
    made.sync(0)
    calls(fake)
    assert made.rollout(prompts(), 1, 0) and not calls(fake)


def test_one_without_our_methods_is_sent_them_all_the_same(fake: Fake, world: World, tmp_path: Path):
    """On a GPU it needs none of them."""
    fake.on["/collective_rpc"] = without_ours
    made = at(fake, world, tmp_path, Whole(tmp_path, fake.url))
    made.sync(0)
    assert made.mismatch is not None and made.mismatch.divergence < 1e-10


def test_one_that_was_started_anew_unnoticed_is_sent_them_again(fake: Fake, world: World, tmp_path: Path):
    whole = Whole(tmp_path, fake.url)
    made = at(fake, world, tmp_path, whole)
    made.sync(0)
    calls(fake)
    made.rollout(prompts(), 1, 0)
    assert not calls(fake)
    fake.weights = "default"
    fake.adapters.clear()
    made.rollout(prompts(), 1, 0)
    assert calls(fake) == [*HEAD, "/collective_rpc", *TAIL] and "trying again" in told(made)[-1]


# --- a server of ours ------------------------------------------------------------------------------------------------


def test_ours_starts_once_on_the_first_weights_and_again_on_the_newest(
    start: Callable[..., Server], world: World, tmp_path: Path
):
    whole, server = Whole(tmp_path), start()
    server.launch = evolve(server.launch, whole=True)
    made = sampler(world, tmp_path, server=server, tiny=whole, options={"canary": None})  # type: ignore[arg-type]
    for step in range(3):
        whole.move(step)
        made.sync(step)
    assert len(pids(tmp_path)) == 2  # of one start: the server and its engine
    os.kill(pids(tmp_path)[0], signal.SIGKILL)
    assert gone(pids(tmp_path))
    assert made.rollout(prompts(1), 1, 2)
    starts = [line.split("--model ")[1].split()[0] for line in (tmp_path / "vllm.log").read_text().splitlines()
              if line.startswith("--- ")]  # fmt: skip
    assert [Path(path).name[:11] for path in starts] == ["step-000000", "step-000002"]
    made.close()
    assert gone(pids(tmp_path))


def test_ours_is_started_again_on_what_it_cannot_read_while_it_runs(
    start: Callable[..., Server], world: World, tmp_path: Path
):
    whole, server = Whole(tmp_path), start("unreadable")
    server.launch = evolve(server.launch, whole=True)
    made = sampler(world, tmp_path, server=server, tiny=whole, options={"canary": None})  # type: ignore[arg-type]
    for step in range(3):
        whole.move(step)
        made.sync(step)
    assert next(line for line in told(made) if "again" in line).startswith("the vLLM server failed (status 500")
    assert len(pids(tmp_path)) == 4  # the first start fails at the second weights; the next one takes the third
    made.close()


def test_only_where_whole_models_are_sent_the_calls_exist_and_our_guard_with_them(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
):
    monkeypatch.setenv("VLLM_SERVER_DEV_MODE", "1")
    monkeypatch.setenv("PYTHONPATH", "/elsewhere")
    assert environment("sesame")["VLLM_SERVER_DEV_MODE"] == "0" and "PYTHONPATH" not in environment("sesame")
    inside = Path(environment("sesame", whole=True)["PYTHONPATH"])
    assert environment("sesame", whole=True)["VLLM_SERVER_DEV_MODE"] == "1"
    assert sorted(file.name for file in inside.glob("*.py")) == ["ft_guard.py", "ft_worker.py"]
    for adapter in (None, LoRA()):
        one = recipe(tmp_path, adapter=adapter, sampler=VLLM(python=sys.executable, arguments=("--x", "1")))
        made = servers.launch(one, one.sampler, tmp_path, tmp_path)  # type: ignore[arg-type]
        words = " ".join(made.arguments)
        assert made.whole == ("--middleware ft_guard.Guard" in words) == (adapter is None)
        assert words.endswith(" --x 1") and "--weight-transfer-config" not in words


def test_a_server_with_gpus_of_its_own_is_sent_tensors_and_no_folder(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    whole, options = Whole(tmp_path), VLLM(python=sys.executable, devices="1")
    assert whole.weights.entries is None
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0")
    one = recipe(whole.base, sampler=options)
    words = servers.launch(one, options, whole.base, tmp_path).arguments
    assert words[words.index("--weight-transfer-config") + 1] == '{"backend": "nccl"}'
    sent = weights(one, whole.built, whole.base, options)
    assert sent.entries is not None
    parcel = packed(sent, whole.weights.gather(), tmp_path, 0, "x-0")
    assert parcel.folder is None and not (tmp_path / "sync").exists()
    assert {entry.name for entry in parcel.entries} == set(open_weights(whole.base).names())


# --- the guard -------------------------------------------------------------------------------------------------------


def said(guard: Any, **scope: Any) -> Any:
    """The status of the guard's reply to a request; "passed" where it lets it through."""
    out: list[Any] = []

    async def send(message: Any) -> None:
        out.append(message.get("status", message.get("code")))

    async def receive() -> Any:
        return {}

    asyncio.run(guard({"type": "http", "path": "/collective_rpc", "headers": [], **scope}, receive, send))
    return out[0]


def test_the_guard_lets_nothing_pass_without_the_key(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.syspath_prepend(str(Path(servers.__file__).with_name("inside")))
    from ft_guard import Guard  # type: ignore[import-not-found]  # a server's path holds it, ours does not

    async def app(scope: Any, receive: Any, send: Any) -> None:
        await send({"status": "passed"})

    monkeypatch.setenv("VLLM_API_KEY", "sesame")
    guard, right = Guard(app), [(b"authorization", b"Bearer sesame")]
    assert said(guard) == 401 and said(guard, headers=right) == "passed"
    assert said(guard, path="/health") == "passed" and said(guard, type="lifespan") == "passed"
    for path in ("/health/", "//health", "/v1/models", "/", ""):
        assert said(guard, path=path) == 401
    for wrong in (b"Bearer sesam", b"Bearer sesame ", b"sesame", b"Basic sesame", b"Bearer ", b""):
        assert said(guard, headers=[(b"authorization", wrong)]) == 401
    assert said(guard, headers=right * 2) == 401  # which of them another server behind it would take is unknown
    assert said(guard, method="OPTIONS") == 401
    assert said(guard, type="websocket") == 1008 and said(guard, type="websocket", headers=right) == "passed"
    monkeypatch.setenv("VLLM_API_KEY", "")
    assert said(Guard(app), headers=[(b"authorization", b"Bearer ")]) == 401


# --- what is packed --------------------------------------------------------------------------------------------------


def test_heads_and_experts_are_packed_anew_on_a_cpu_and_left_alone_on_a_gpu(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.syspath_prepend(str(Path(servers.__file__).with_name("inside")))
    from ft_worker import Repacks  # type: ignore[import-not-found]

    packed: list[str] = []

    def module(device: str, name: str, **over: Any) -> Any:
        made = torch.nn.Linear(1, 1, device=device)
        method = SimpleNamespace(moe_kernel=None, process_weights_after_loading=lambda m: packed.append(name))
        vars(made).update({"quant_method": method, **over})
        return made

    for device, found in (("cpu", 1), ("meta", 0)):
        head = module(device, "head", tie_weights=print, cpu_linear=print)
        linear, table = module(device, "linear", cpu_linear=print), module(device, "table", tie_weights=print)
        experts = module(device, "experts", quant_method=SimpleNamespace(moe_kernel="made"))
        model = torch.nn.Sequential(linear, table, head, experts, torch.nn.ReLU())
        worker = Repacks()
        worker.model_runner = SimpleNamespace(get_model=lambda model=model: model)
        assert worker.ft_unpack() == worker.ft_repack() == found
        assert experts.quant_method.moe_kernel is (None if found else "made")
    assert packed == ["head"]


# --- over a wire -----------------------------------------------------------------------------------------------------


@define(eq=False)
class Tube:
    """A wire in memory. Its other end is the stand-in's: a tensor is gone only when that has taken it."""

    whole: Whole
    worlds: list[int] = field(factory=list)
    there: threading.Barrier = field(factory=lambda: threading.Barrier(2, timeout=5.0))
    tensors: queue.Queue[Tensor] = field(factory=queue.Queue)
    flushed: int = 0

    def open(self, world: int) -> dict[str, Any]:
        self.worlds.append(world)
        return {"nccl_unique_id_b64": "abc"}

    def join(self) -> None:
        self.there.wait()

    def send(self, tensor: Tensor) -> None:
        assert tensor.is_contiguous()
        self.tensors.put(tensor)
        self.tensors.join()

    def flush(self) -> None:
        self.flushed += 1

    def end(self, fake: Fake) -> None:
        """The server's."""
        fake.on["/init_weight_transfer_engine"] = lambda body: self.there.wait()
        fake.on["/update_weights"] = self.take

    def take(self, body: dict[str, Any]) -> None:
        info = body["update_info"]
        for name, dtype, shape in zip(info["names"], info["dtype_names"], info["shapes"], strict=True):
            tensor = self.tensors.get(timeout=5.0)
            assert (str(tensor.dtype), list(tensor.shape)) == (f"torch.{dtype}", shape)
            self.whole.arrived[name] = tensor.clone()
            self.tensors.task_done()


def test_tensors_arrive_while_the_server_waits_for_them(fake: Fake, world: World, tmp_path: Path):
    whole = Whole(tmp_path, fake.url)
    tube = Tube(whole)
    tube.end(fake)
    made = at(fake, world, tmp_path, whole, weights=whole.wired(tube))
    made.sync(0)
    (init,) = fake.asked("/init_weight_transfer_engine")
    assert init["init_info"] == {"rank_offset": 1, "world_size": 3, "packed": False, "nccl_unique_id_b64": "abc"}
    assert tube.worlds == [3]  # two workers, and us
    assert calls(fake) == [*HEAD, "/init_weight_transfer_engine", *WIRED[2:]] and not fake.paused
    whole.move()
    made.sync(1)
    assert calls(fake) == WIRED and tube.flushed == 2  # the connection is kept
    assert made.mismatch is not None and made.mismatch.divergence < 1e-10
    fake.weights = "default"  # started anew: it is at no end of a wire
    assert made.rollout(prompts(), 1, 1) and tube.worlds == [3, 3]
    assert calls(fake) == [*HEAD, "/init_weight_transfer_engine", *WIRED[2:]]
    assert not (tmp_path / "sync").exists()
    made.close()
    assert calls(fake) == ["/shutdown_weight_transfer_engine"]


def test_what_arrives_is_what_the_folder_would_hold_buffers_included(fake: Fake, world: World, tmp_path: Path):
    whole = Whole(tmp_path, fake.url, "deepseek_v3")
    tube = Tube(whole)
    tube.end(fake)
    made = at(fake, world, tmp_path, whole, weights=whole.wired(tube), options={"canary": None})
    whole.move()
    with torch.no_grad():
        for name, buffer in whole.net.named_buffers():
            if name.endswith("e_score_correction_bias"):
                buffer.fill_(1.5)
    fake.score = None
    made.sync(0)
    whole.weights.write(tmp_path / "folder", whole.weights.gather())
    there = load_file(tmp_path / "folder" / "model.safetensors")
    assert there.keys() == whole.arrived.keys() and all(torch.equal(t, whole.arrived[n]) for n, t in there.items())
    (buffer,) = [name for name in there if name.endswith("e_score_correction_bias")]
    assert (there[buffer] == 1.5).all()


def test_a_server_that_fails_while_we_wait_for_it_is_an_error_and_not_a_hang(fake: Fake, world: World, tmp_path: Path):
    whole = Whole(tmp_path, fake.url)
    tube = Tube(whole, there=threading.Barrier(2))  # would wait for ever
    tube.end(fake)
    fake.on["/init_weight_transfer_engine"] = refuses
    made = at(fake, world, tmp_path, whole, weights=whole.wired(tube))
    with pytest.raises(ServerError, match=r"(?s)does not connect itself.*no such file.*--weight-transfer-config"):
        made.sync(0)
    assert not fake.paused
    tube.there = threading.Barrier(2, timeout=5.0)
    tube.end(fake)
    made.sync(0)
    whole.move()
    fake.on["/update_weights"] = refuses
    calls(fake)
    with pytest.raises(ServerError, match=r"(?s)failed while it took the weights.*no such file"):
        made.sync(1)
    assert calls(fake) == [*WIRED[:4], "/resume"] and not fake.paused


def test_a_wire_that_breaks_is_an_error_that_says_what_to_do(fake: Fake, world: World, tmp_path: Path):
    whole = Whole(tmp_path, fake.url)
    tube = Tube(whole, there=threading.Barrier(1))
    fake.on["/init_weight_transfer_engine"] = lambda body: time.sleep(60)
    tube.there.abort()
    began = time.monotonic()
    with pytest.raises(ServerError, match=r"(?s)BrokenBarrierError.*the same version of NCCL.*sampler.transfer"):
        at(fake, world, tmp_path, whole, weights=whole.wired(tube), options={"timeout": 50.0}).sync(0)
    assert time.monotonic() - began < 20 and not fake.paused


def test_what_the_server_says_comes_before_what_broke_here():
    def late() -> None:
        time.sleep(0.3)
        raise Broken("out of memory")

    def here() -> None:
        raise RuntimeError("connection closed")

    with pytest.raises(Broken, match="out of memory"):
        together(late, here, 5.0)
    with pytest.raises(ServerError, match="RuntimeError: connection closed"):
        together(lambda: None, here, 5.0)


def test_neither_end_is_waited_for_for_ever():
    with pytest.raises(Unreachable, match=r"within 0.2 s"):
        together(lambda: time.sleep(5), lambda: time.sleep(5), 0.2)
    with pytest.raises(Unreachable, match=r"within 0.2 s"):
        together(lambda: None, lambda: time.sleep(5), 0.2)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="NCCL needs a GPU")
def test_nccl_joins_sends_and_flushes():
    """Alone on its wire; that another end receives it needs a second GPU and vLLM."""
    wire = Nccl(device=torch.device("cuda", 0))
    assert len(base64.b64decode(wire.open(1)["nccl_unique_id_b64"])) == 128
    wire.join()
    for tensor in (torch.arange(6.0), torch.ones(3, 2, dtype=torch.bfloat16).T, torch.arange(4)):
        wire.send(tensor)
    wire.flush()


# --- which way -------------------------------------------------------------------------------------------------------


def test_nccl_is_for_servers_with_gpus_of_their_own(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    assert chosen(VLLM(devices="1")) == "file"
    with pytest.raises(RecipeError, match=r"(?s)transfer.*no CUDA here.*file"):
        chosen(VLLM(devices="1", transfer="nccl"))
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    monkeypatch.setattr("torch.cuda.device_count", lambda: 4)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
    assert chosen(VLLM(devices="2,3")) == "nccl" and chosen(VLLM(devices="2,3", transfer="file")) == "file"
    assert chosen(VLLM()) == "file" and chosen(VLLM(devices="1, 2")) == "file"
    assert chosen(VLLM(url="http://x", transfer="nccl")) == "nccl" and chosen(VLLM(url="http://x")) == "file"
    with pytest.raises(RecipeError, match=r"the trainer's own GPU 1 among"):
        chosen(VLLM(devices="1, 2", transfer="nccl"))
    with pytest.raises(RecipeError, match=r"no sampler.devices"):
        chosen(VLLM(transfer="nccl"))
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "5,6")
    assert chosen(VLLM(devices="0,1")) == "nccl" and chosen(VLLM(devices="6")) == "file"
