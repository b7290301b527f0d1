"""The vLLM sampler against a stand-in server (tests/fake_vllm.py): what is asked, what is believed, what goes wrong.

Models are tiny and real: the stand-in scores the canary with a second copy that loads what was written to disk.
"""

from __future__ import annotations

import errno
import json
import math
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from attrs import evolve
from fake_vllm import Fake
from tiny_models import build

from ft import GRPO, VLLM, Batching, Data, Embedded, LoRA, Model, Recipe, Sampling, Save, dist
from ft.data.tokenizer import byte_tokenizer
from ft.dist import World
from ft.errors import CapacityError, FtError, RecipeError
from ft.io.adapter import load_adapter, save_adapter
from ft.models import lora as loras
from ft.models.layout import Layout
from ft.models.policy import Policy, Scorer
from ft.recipe import dump, rehearse, restore
from ft.rollout import canary
from ft.rollout.client import Client, Malformed, Refused, Unreachable, in_parallel
from ft.rollout.rewards import exact
from ft.rollout.sent import Weights
from ft.rollout.server import Launch, Server, arguments, environment, interpreter, last_words, retried
from ft.rollout.vllm import VLLMSampler, sampling_options, seed_of
from ft.train.loop import train
from ft.types import Example

FAKE = Path(__file__).with_name("fake_vllm.py")
ROWS = [[5, 9, 14, 3, 77, 21, 8], [40, 41, 42, 43]]
OPTIONS = {"max_tokens": 5, "temperature": 1.0}
LORA = LoRA(r=2, alpha=4.0, targets=("attention", "mlp"))


@pytest.fixture
def world() -> Iterator[World]:
    with dist.launched() as world:
        yield world


@pytest.fixture
def fake() -> Iterator[Fake]:
    with Fake() as server:
        yield server


def prompts(n: int = 2) -> list[Example]:
    tokens = [np.array([3, 4, 5 + i], np.int32) for i in range(n)]
    return [Example(tokens_L=t, mask_L=np.zeros(3, bool), source=f"rows.jsonl:{i + 1}") for i, t in enumerate(tokens)]


class Tiny:
    """A tiny llama with adapters, as policy; and its copy behind a server, which scores with adapters from disk."""

    def __init__(self, seed: int = 0):
        self.net, self.copy = build("llama"), build("llama", seed=seed)
        attached = loras.attach(self.net, LORA)
        loras.attach(self.copy, LORA)
        self.config = loras.adapter_config(attached, "base")
        self.policy = Policy(
            scorer=Scorer(self.net), config=self.net.config, layout=Layout(kind="padded", attention="sdpa")
        )
        self.move(0)

    @torch.no_grad()
    def move(self, seed: int, by: float = 0.3) -> None:
        generator = torch.Generator().manual_seed(seed)
        for parameter in loras.factors(self.net).values():
            parameter.add_(torch.randn(parameter.shape, generator=generator), alpha=by)

    @torch.no_grad()
    def score(self, tokens: list[int], folder: str | None) -> list[float]:
        tensors = load_adapter(Path(folder))[0] if folder else {}
        loras.load_state(self.copy, {n: tensors[n] if folder else 0 * p for n, p in loras.factors(self.copy).items()})
        logp_LV = self.copy(torch.tensor([tokens])).logits[0].log_softmax(-1)
        return [float(logp_LV[i, t]) for i, t in enumerate(tokens[1:])]

    @property
    def weights(self) -> Weights:
        return Weights(
            gather=lambda: loras.adapter_state(self.net),
            write=lambda folder, tensors: save_adapter(folder, tensors, self.config),
        )


def sampler(world: World, folder: Path, *, url: str = "", tiny: Tiny | None = None, **over: Any) -> VLLMSampler:
    """On a server that is not ours where ``url`` says which."""
    tiny = tiny or Tiny()
    said: list[str] = []
    options = {"patience": 1.0, "concurrency": 4, "timeout": 5.0, **over.pop("options", {})}
    given: dict[str, Any] = {
        "options": VLLM(url=url or None, **options), "sampling": Sampling(max_tokens=5), "stop": frozenset({2}),
        "seed": 0, "world": world, "policy": tiny.policy, "weights": tiny.weights, "rows": ROWS, "folder": folder,
        "server": None, "client": Client(url=url, timeout=options["timeout"]) if url else None,
        "notice": said.append, "name": "ft-00000000",
    }  # fmt: skip
    return VLLMSampler(**{**given, **over})


def told(made: VLLMSampler) -> list[str]:
    return made.notice.__self__  # type: ignore[attr-defined]  # the list whose append it is


# --- one call --------------------------------------------------------------------------------------------------------


def test_token_ids_go_out_and_come_back_with_their_log_probs(fake: Fake):
    client = Client(url=fake.url)
    drawn = client.complete("base", [3, 4], 2, {**OPTIONS, "seed": 31})
    assert [d.tokens for d in drawn] == [(5, 6, 7, 11, 2)] * 2
    assert [d.logps for d in drawn] == [(-1.0,) * 5] * 2
    assert [d.finish for d in drawn] == ["stop", "stop"]
    assert client.complete("base", [3, 4], 1, {**OPTIONS, "max_tokens": 2})[0].finish == "length"
    (body, _) = fake.asked("/v1/completions")
    assert body["prompt"] == [3, 4] and body["return_token_ids"] and body["n"] == 2


@pytest.mark.parametrize(
    ("fault", "message"),
    [
        ("garbage", "it begins b'{\"model\""), ("few", "1 choices for n=2"), ("short", "4 log-probs for 5 tokens"),
        ("none", "a log-prob of None"), ("nan", "JSON is malformed"), ("model", "the model 'another'"),
        ("prompt", "another prompt"), ("abort", "ended by 'abort'"),
    ],
)  # fmt: skip
def test_a_malformed_reply_is_asked_for_again_and_then_an_error(fake: Fake, fault: str, message: str):
    client = Client(url=fake.url)
    fake.faults = [fault, fault]
    assert len(client.complete("base", [3], 2, OPTIONS)) == 2
    fake.faults = [fault] * 3
    with pytest.raises(Malformed, match=message):
        client.complete("base", [3], 2, OPTIONS)


def test_ways_of_not_answering(fake: Fake):
    client = Client(url=fake.url, timeout=0.3)
    for fault, message in [("hang", "within 0.3 s"), ("drop", "Disconnected|reset"), ("500", "EngineCore died")]:
        fake.faults = [fault]
        with pytest.raises(Unreachable, match=message):
            client.complete("base", [3], 1, OPTIONS)
    fake.faults = ["400"]
    with pytest.raises(Refused, match="status 400: too long"):
        client.complete("base", [3], 1, OPTIONS)
    fake.faults = ["slow0.2"]
    assert client.complete("base", [3], 1, OPTIONS)
    with pytest.raises(Unreachable, match="refused"):
        Client(url="http://127.0.0.1:9").complete("base", [3], 1, OPTIONS)


def test_the_token_is_sent_and_needed(fake: Fake):
    fake.token = "sesame"
    assert Client(url=fake.url, token="sesame").complete("base", [3], 1, OPTIONS)
    with pytest.raises(Refused, match="401"):
        Client(url=fake.url).complete("base", [3], 1, OPTIONS)


def test_scores_of_a_text_are_those_of_its_tokens(fake: Fake):
    fake.score = lambda tokens, adapter: [-float(t) for t in tokens[1:]]
    assert Client(url=fake.url).score("base", [3, 7, 9]) == [-7.0, -9.0]
    fake.score = lambda tokens, adapter: [math.nan for _ in tokens[1:]]
    with pytest.raises(Malformed):
        Client(url=fake.url).score("base", [3, 7])


def test_in_parallel_stops_at_the_first_failure_and_says_what_was_not_tried():
    def call(x: int) -> int:
        if x == 2:
            raise Unreachable("gone")
        return x

    found = in_parallel(call, [0, 1, 2, 3, 4], threads=1)
    assert found[:2] == [0, 1] and isinstance(found[2], Unreachable) and found[3:] == [None, None]


def test_every_sampling_option_is_given_and_seeds_differ():
    options = sampling_options(Sampling(temperature=0.6, top_p=0.9, top_k=5, min_p=0.1), frozenset({7, 2}), False)
    assert options["stop_token_ids"] == [2, 7] and options["ignore_eos"]
    assert (options["temperature"], options["top_p"], options["top_k"], options["min_p"]) == (0.6, 0.9, 5, 0.1)
    assert options["repetition_penalty"] == 1.0
    assert sampling_options(Sampling(temperature=0.6), frozenset(), True)["temperature"] == 0.0
    seeds = {seed_of(seed, step, p) for seed in range(3) for step in range(-1, 3) for p in range(4)}
    assert len(seeds) == 3 * 4 * 4 and max(seeds) < 2**62


def test_answers_are_seeded_by_their_group_wherever_it_stands(fake: Fake, world: World, tmp_path: Path):
    made = sampler(world, tmp_path, url=fake.url, options={"canary": None, "concurrency": 1})
    made.sync(0)
    groups = [evolve(prompt, group=5 + i) for i, prompt in enumerate(prompts(3))]

    def seeds(asked: list[Example]) -> dict[int, int]:
        before = len(fake.asked("/v1/completions"))
        made.ask(asked, 1, 7)
        return {body["prompt"][-1]: body["seed"] for body in fake.asked("/v1/completions")[before:]}

    found = seeds(groups)
    assert found == {5 + i: seed_of(0, 7, 5 + i) for i in range(3)}, "the last token of prompt i is 5 + i, too"
    assert seeds(groups[::-1]) == seeds(groups[2:] + groups[:2]) == found
    assert seeds(prompts(3)) == {5 + i: seed_of(0, 7, i) for i in range(3)}, "without groups, by their places"


# --- weights ---------------------------------------------------------------------------------------------------------


def test_a_step_sends_its_adapter_in_a_new_folder_and_answers_carry_it(fake: Fake, world: World, tmp_path: Path):
    tiny = Tiny()
    fake.score = tiny.score
    made = sampler(world, tmp_path, url=fake.url, tiny=tiny)
    groups = []
    for step in range(4):
        made.sync(step)
        groups = made.rollout(prompts(), 3, step)
        tiny.move(step + 1)
    paths = [body["lora_path"] for body in fake.asked("/v1/load_lora_adapter")]
    assert len(set(paths)) == 4 and all(body["load_inplace"] for body in fake.asked("/v1/load_lora_adapter"))
    assert sorted(str(p) for p in (tmp_path / "sync").iterdir()) == sorted(paths[-2:])
    assert [[r.policy_step for r in group] for group in groups] == [[3] * 3] * 2
    rollout = groups[1][2]
    assert rollout.tokens_L.dtype == np.int32 and rollout.finish == "stop" and rollout.prompt.source == "rows.jsonl:2"
    assert rollout.logp_L is not None and rollout.logp_L.tolist() == [-1.0] * 5
    assert made.mismatch is not None and made.mismatch.divergence < 1e-10  # what lies on disk is the policy
    made.close()
    assert not fake.adapters and not list((tmp_path / "sync").iterdir())


def test_weights_that_the_server_has_are_not_sent_again(fake: Fake, world: World, tmp_path: Path):
    tiny = Tiny()
    fake.score = tiny.score
    made = sampler(world, tmp_path, url=fake.url, tiny=tiny)
    made.sync(-1)
    made.sync(0)
    assert len(fake.asked("/v1/load_lora_adapter")) == 1 and made.step == 0
    assert made.rollout(prompts(1), 1, 0)[0][0].policy_step == 0


def test_greedy_answers_have_no_log_probs(fake: Fake, world: World, tmp_path: Path):
    made = sampler(world, tmp_path, url=fake.url, options={"canary": None})
    made.sync(0)
    (group,) = made.rollout(prompts(1), 1, -1, greedy=True)
    assert group[0].logp_L is not None and np.isnan(group[0].logp_L).all()
    assert fake.asked("/v1/completions")[-1]["temperature"] == 0.0


def test_a_full_disk_ends_cleanly_and_leaves_nothing_half_written(fake: Fake, world: World, tmp_path: Path):
    tiny = Tiny()
    fake.score = tiny.score

    def full(folder: Path, tensors: Any) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    made = sampler(world, tmp_path, url=fake.url, tiny=tiny, weights=evolve(tiny.weights, write=full))
    with pytest.raises(CapacityError, match="No space left"):
        made.sync(0)
    assert not fake.seen and not list((tmp_path / "sync").iterdir())
    made.weights = tiny.weights
    made.sync(0)
    assert made.rollout(prompts(1), 1, 0)


# --- canary ----------------------------------------------------------------------------------------------------------


def test_divergence_by_hand():
    ours, theirs = np.array([-1.0, -2.0]), np.array([-1.0, -2.0 - np.log(2)])
    assert canary.divergence(theirs, ours) == pytest.approx((2 - 1 - np.log(2)) / 2)
    verdict = canary.compare(np.array([-1.0]), np.array([-1.1]), {"the old ones": np.array([-1.001])})
    assert verdict.resembles == "the old ones" and verdict.largest == pytest.approx(0.1)
    assert canary.compare(np.array([-1.09]), np.array([-1.1]), {"the old ones": np.array([-1.001])}).resembles == ""


def test_an_adapter_that_is_not_applied_trips_the_canary(fake: Fake, world: World, tmp_path: Path):
    tiny = Tiny()
    fake.score = lambda tokens, folder: tiny.score(tokens, None)
    with pytest.raises(FtError, match=r"(?s)log-probs are not the policy's.*layout"):
        sampler(world, tmp_path, url=fake.url, tiny=tiny).sync(0)


def test_another_model_trips_the_canary(fake: Fake, world: World, tmp_path: Path):
    tiny = Tiny(seed=1)
    fake.score = tiny.score
    with pytest.raises(FtError, match="another model"):
        sampler(world, tmp_path, url=fake.url, tiny=tiny).sync(0)


@pytest.mark.parametrize("by", [0.3, 0.003])
def test_a_stale_adapter_trips_the_canary_however_small_the_step_was(
    fake: Fake, world: World, tmp_path: Path, by: float
):
    tiny = Tiny()
    fake.score = tiny.score
    made = sampler(world, tmp_path, url=fake.url, tiny=tiny)
    made.sync(0)
    tiny.move(1)
    made.sync(1)
    fake.deaf = True
    tiny.move(2, by)
    with pytest.raises(FtError, match="still answers with the weights before these"):
        made.sync(2)


def test_without_a_limit_the_canary_only_speaks(fake: Fake, world: World, tmp_path: Path):
    made = sampler(world, tmp_path, url=fake.url, options={"canary": None})
    made.sync(0)
    assert "canary" in told(made)[0] and made.mismatch is not None and made.mismatch.divergence > 0.05


def test_log_probs_without_temperature_are_refused(fake: Fake, world: World, tmp_path: Path):
    tiny, fake.raw = Tiny(), True
    fake.score = tiny.score
    sampler(world, tmp_path, url=fake.url, tiny=tiny).sync(0)  # at temperature 1 they are the same
    made = sampler(world, tmp_path, url=fake.url, tiny=tiny, sampling=Sampling(max_tokens=5, temperature=0.6))
    with pytest.raises(FtError, match="leave out the temperature"):
        made.sync(0)
    fake.raw = False
    made.sync(0)


# --- a server that is not ours ---------------------------------------------------------------------------------------


def test_one_that_is_gone_for_a_moment_is_tried_again(fake: Fake, world: World, tmp_path: Path):
    tiny = Tiny()
    fake.score = tiny.score
    made = sampler(world, tmp_path, url=fake.url, tiny=tiny)
    made.sync(0)
    fake.faults = ["", "drop"]
    groups = made.rollout(prompts(3), 2, 0)
    assert [len(group) for group in groups] == [2, 2, 2]
    assert "trying again" in told(made)[-1]


def test_one_that_came_back_without_the_adapter_gets_it_again(fake: Fake, world: World, tmp_path: Path):
    tiny = Tiny()
    fake.score = tiny.score
    made = sampler(world, tmp_path, url=fake.url, tiny=tiny)
    made.sync(0)
    fake.adapters.clear()
    assert len(made.rollout(prompts(3), 2, 0)) == 3
    assert len(fake.asked("/v1/load_lora_adapter")) == 2


@pytest.mark.parametrize("fault", ["drop", "hang", "500"])
def test_one_that_stays_away_is_an_error(fake: Fake, world: World, tmp_path: Path, fault: str):
    tiny = Tiny()
    fake.score = tiny.score
    made = sampler(world, tmp_path, url=fake.url, tiny=tiny, options={"timeout": 0.3, "patience": 0.6})
    made.sync(0)
    fake.always = fault
    with pytest.raises(FtError, match=r"(?s)cannot be reached.*--resume"):
        made.rollout(prompts(), 2, 0)


@pytest.mark.parametrize(("fault", "message"), [("garbage", "sends what was not asked"), ("400", "refuses a request")])
def test_one_that_answers_nonsense_is_an_error_that_names_it(
    fake: Fake, world: World, tmp_path: Path, fault: str, message: str
):
    made = sampler(world, tmp_path, url=fake.url, options={"canary": None})
    made.sync(0)
    fake.always = fault
    with pytest.raises(FtError, match=f"(?s){fake.url}.*{message}.*rows.jsonl"):
        made.rollout(prompts(), 2, 0)


def test_waits_grow_and_end():
    calls: list[float] = []

    def act() -> None:
        calls.append(time.monotonic())
        raise Unreachable("gone")

    with pytest.raises(Unreachable):
        retried(act, 0.2, first=0.02)
    assert 3 <= len(calls) <= 5
    assert retried(lambda: None, 0) is None


# --- a server of ours ------------------------------------------------------------------------------------------------


@pytest.fixture
def start(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[..., Server]]:
    """Servers of ours, which are the stand-in as a program; what is left at the end is killed."""
    python = tmp_path / "python"
    python.write_text(f'#!/bin/sh\nexec {sys.executable} {FAKE} "$@"\n')
    python.chmod(0o755)
    monkeypatch.setenv("FAKE_PIDS", str(tmp_path / "pids"))
    monkeypatch.setenv("FAKE_FAULTS", str(tmp_path / "faults"))
    made: list[Server] = []

    def make(faults: str = "", **over: Any) -> Server:
        (tmp_path / "faults").write_text(faults)
        given = {"python": str(python), "model": tmp_path, "arguments": ("--x",), "port": 0, "startup": 20.0}
        launch = Launch(**{**given, "timeout": 2.0, "log": tmp_path / "vllm.log", **over})
        made.append(Server(launch=launch, token="sesame"))
        return made[-1]

    yield make
    for server in made:
        server.close()


def pids(folder: Path) -> list[int]:
    file = folder / "pids"
    return [int(word) for word in file.read_text().split()] if file.exists() else []


def gone(numbers: list[int], within: float = 10.0) -> bool:
    deadline = time.monotonic() + within
    while any(_alive(n) for n in numbers) and time.monotonic() < deadline:
        time.sleep(0.05)
    return not any(_alive(n) for n in numbers)


def _alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def test_it_is_started_ready_and_closed_with_its_children(start: Callable[..., Server], tmp_path: Path):
    server = start()
    client = server.start()
    assert client.complete("base", [3], 1, OPTIONS) and server.alive
    found = pids(tmp_path)
    assert len(found) == 2 and all(_alive(n) for n in found)
    assert "sesame" not in (tmp_path / "vllm.log").read_text()
    server.close()
    assert gone(found) and not server.alive


@pytest.mark.parametrize(
    ("faults", "message"),
    [
        ("refuse", r"ended while it started.*does not like its arguments.*status 3"),
        ("never", r"does not answer within"),
        ("400", r"does not generate"),
    ],
)
def test_one_that_does_not_start_says_why(start: Callable[..., Server], tmp_path: Path, faults: str, message: str):
    server = start(faults, startup=3.0)
    with pytest.raises(FtError, match="(?s)" + message):
        server.start()
    assert gone(pids(tmp_path)) and not server.alive


def test_a_python_that_does_not_exist_is_said(start: Callable[..., Server], tmp_path: Path):
    with pytest.raises(FtError, match="was not started"):
        start(python=str(tmp_path / "nowhere")).start()


@pytest.mark.parametrize("fault", ["die", "hang", "500"])
def test_one_that_fails_is_started_again_and_the_rollout_goes_on(
    start: Callable[..., Server], world: World, tmp_path: Path, fault: str
):
    # asked before: is it ready; the canary's two texts
    server = start(f"ok ok ok ok {fault}")
    made = sampler(world, tmp_path, server=server, options={"canary": None, "concurrency": 1})
    made.sync(0)
    before = made._client().url
    groups = made.rollout(prompts(3), 2, 0)
    assert [len(group) for group in groups] == [2, 2, 2]
    assert made._client().url != before and "started again" in told(made)[-1]
    assert len(pids(tmp_path)) == 4 and gone(pids(tmp_path)[:2])
    os.kill(pids(tmp_path)[2], signal.SIGKILL)  # again in the same step
    assert gone(pids(tmp_path)[2:])
    with pytest.raises(FtError, match=r"(?s)cannot be reached.*log ends"):
        made.rollout(prompts(3), 2, 0)
    assert len(made.rollout(prompts(3), 2, 1)) == 3  # and in the next one it may
    made.close()
    assert gone(pids(tmp_path))


def test_an_error_shows_what_went_wrong_first_in_the_server_s_last_start(tmp_path: Path) -> None:
    log = tmp_path / "vllm.log"
    log.write_text(
        "--- 2026-01-01 10:00:00 python\nValueError: of the start before\n"
        "--- 2026-01-01 11:00:00 python\nWARNING OSError: [Errno 24] may come\n"
        "(Worker) ERROR [x.py:1] RuntimeError: CPU Generator does not use offset\n"
        + "INFO 500 Internal Server Error\n" * 40
        + "EngineDeadError: see above\n"
    )
    assert last_words(log, 2) == (
        "; the first error in its log:\n  | RuntimeError: CPU Generator does not use offset; its log ends:\n"
        "  | INFO 500 Internal Server Error\n  | EngineDeadError: see above"
    )


def test_it_outlives_the_thread_that_started_it(start: Callable[..., Server]):
    server = start()
    thread = threading.Thread(target=server.start)
    thread.start()
    thread.join()
    time.sleep(0.3)
    assert server.alive and server.client is not None and server.client.complete("base", [3], 1, OPTIONS)


PARENT = """
import sys, time
from pathlib import Path
from ft.rollout.server import Launch, Server
here = Path(sys.argv[1])
server = Server(launch=Launch(python=str(here / "python"), model=here, arguments=(), port=0, startup=20.0, timeout=99.0,
                              log=here / "vllm.log"))
client = server.start()
print("up", flush=True)
client.complete("base", [3], 1, {"max_tokens": 5})
"""


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGINT, signal.SIGTERM])
def test_nothing_is_left_of_it_when_its_parent_is_killed_while_it_generates(
    start: Callable[..., Server], tmp_path: Path, number: signal.Signals
):
    start("ok hang")
    env = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[1])}
    parent = subprocess.Popen(
        [sys.executable, "-c", PARENT, str(tmp_path)], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, env=env
    )
    assert parent.stdout is not None and parent.stdout.readline() == b"up\n"
    found = pids(tmp_path)
    assert len(found) == 2 and all(_alive(n) for n in found)
    parent.send_signal(number)
    assert parent.wait(10) != 0 and gone(found)
    parent.stdout.close()


# --- ranks -----------------------------------------------------------------------------------------------------------

RANKS = """
import json, sys
from pathlib import Path
from test_vllm import LORA, OPTIONS, Client, FtError, Weights, dist, loras, prompts, sampler, save_adapter
from ft.models.build import build, plan_config
from ft.recipe import Model, Parallel
url, folder = sys.argv[1], Path(sys.argv[2])
with dist.launched() as world:
    model = Model(id="-", family="llama", dtype="float32", tiny=True)
    built = build(model, LORA, plan_config(model, None, vocab=96), None, world=world, parallel=Parallel(), seed=0,
                  say=lambda line: None)
    net = built.policy.scorer.model
    config = loras.adapter_config(built.attached, "base")
    weights = Weights(gather=lambda: loras.adapter_state(net),
                      write=lambda path, tensors: save_adapter(path, tensors, config))
    made = sampler(world, folder, url=url, options={"canary": None, "patience": 0.1}, policy=built.policy,
                   weights=weights)
    made.sync(0)
    groups = made.rollout(prompts(3), 2, 0)
    said = [[r.tokens_L.tolist(), r.logp_L.tolist(), r.finish, r.policy_step] for group in groups for r in group]
    made.client = Client(url="http://127.0.0.1:9")
    try:
        made.rollout(prompts(3), 2, 1)
        failed = ""
    except FtError as error:
        failed = error.problem
    (folder / f"rank{world.rank}.json").write_text(json.dumps({"said": said, "failed": failed}))
"""


def test_one_of_two_ranks_talks_and_both_know(fake: Fake, tmp_path: Path):
    here = Path(__file__).parent
    file = tmp_path / "ranks.py"
    file.write_text(RANKS)
    env = {**os.environ, "PYTHONPATH": os.pathsep.join([str(here.parent), str(here)]), "OMP_NUM_THREADS": "1"}
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    subprocess.run([*launcher, str(file), fake.url, str(tmp_path)], env=env, check=True, timeout=200)
    first, second = (json.loads((tmp_path / f"rank{r}.json").read_text()) for r in (0, 1))
    assert first["said"] == second["said"] and len(first["said"]) == 6
    tokens, logps, finish, step = first["said"][0]
    assert tokens[:3] == [5, 6, 7] and logps == [-1.0] * 5 and (finish, step) == ("stop", 0)
    assert "cannot be reached" in first["failed"] and "first rank" in second["failed"]
    assert len(fake.asked("/v1/load_lora_adapter")) == 1
    assert len([body for body in fake.asked("/v1/completions") if body.get("n") == 2]) == 3


# --- a run -----------------------------------------------------------------------------------------------------------


def test_a_run_whose_server_goes_away_ends_with_an_error_and_goes_on_with_resume(fake: Fake, tmp_path: Path):
    model = tmp_path / "model"
    build("llama", vocab_size=261).save_pretrained(model)
    byte_tokenizer().save_pretrained(model)
    rows = tmp_path / "rows.jsonl"
    rows.write_text("".join(json.dumps({"prompt": f"Say {i}.", "answer": str(i)}) + "\n" for i in range(4)))
    one = recipe(
        model=Model(id=str(model), dtype="float32", checkpointing=False),
        data=Data(train=str(rows), max_tokens=64, cache=None),
        sampler=VLLM(url=fake.url, patience=0.3, canary=None),
        batch=Batching(examples=2, tokens=512),
        save=Save(dir=tmp_path / "run", every=1),
        steps=3,
    )
    one = evolve(one, method=evolve(one.method, group=2))
    fake.faults = ["ok"] * 6 + ["500"] * 99  # the canary's two texts, and two prompts of each of two steps
    with pytest.raises(FtError, match=r"(?s)cannot be reached.*--resume"):
        train(one)
    assert (tmp_path / "run" / "step-000002").is_dir()
    fake.faults.clear()
    outcome = train(one, resume=True)
    assert (outcome.ended, outcome.step) == ("done", 3)
    assert not fake.adapters and not list((tmp_path / "run" / "sync").iterdir())


# --- the recipe ------------------------------------------------------------------------------------------------------


def recipe(**over: Any) -> Recipe:
    method = GRPO(rewards=exact, sampling=Sampling(max_tokens=32))
    data = Data(train="x.jsonl", max_tokens=100)
    given: dict[str, Any] = {"model": Model(id="m"), "data": data, "method": method, "adapter": LoRA(r=12)}
    return Recipe(**{**given, "sampler": VLLM(), **over})


def test_a_recipe_with_a_server_is_kept_and_rehearsed_without_one():
    one = recipe(sampler=VLLM(url="http://127.0.0.1:8000", concurrency=3))
    assert restore(dump(one)) == one
    assert rehearse(one).sampler == Embedded()
    with pytest.raises(ValueError, match="url"):
        VLLM(url="127.0.0.1:8000")


def test_the_servers_arguments_follow_the_recipe():
    words = arguments(recipe(), 132)
    assert words[words.index("--max-lora-rank") + 1] == "16"  # the next size that vLLM has
    assert words[words.index("--logprobs-mode") + 1] == "processed_logprobs"
    assert words[words.index("--max-model-len") + 1] == "132"
    assert "--enable-lora" not in arguments(recipe(adapter=None), 132)
    if not torch.cuda.is_available():  # prompts are read whole, whatever else the server is to do
        assert "--no-enable-chunked-prefill" in words
        assert int(words[words.index("--max-num-batched-tokens") + 1]) >= 132


def test_the_servers_environment_is_its_own(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("RANK", "1")
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0")
    found = environment("sesame")
    assert "RANK" not in found and found["VLLM_API_KEY"] == "sesame" and found["CUDA_VISIBLE_DEVICES"] == "0"
    assert environment("sesame", "1")["CUDA_VISIBLE_DEVICES"] == "1"


def test_a_machine_without_vllm_is_told_how_to_go_on(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.delenv("FT_VLLM_PYTHON", raising=False)
    monkeypatch.setattr("ft.rollout.server.find_spec", lambda name: None)
    with pytest.raises(RecipeError, match="sampler=embedded"):
        interpreter(VLLM())
    with pytest.raises(RecipeError, match="/nowhere/python"):
        interpreter(VLLM(python="/nowhere/python"))
    monkeypatch.setenv("FT_VLLM_PYTHON", sys.executable)
    assert interpreter(VLLM()) == sys.executable


RECIPE = """
from ft import GRPO, VLLM, Data, LoRA, Model, Recipe
from ft.rollout.rewards import exact
recipe = Recipe(model=Model(id={model!r}), adapter={adapter}, data=Data(train="x.jsonl"), method=GRPO(rewards=exact),
                sampler=VLLM(python={python!r}))
"""


@pytest.mark.parametrize(("ends", "adapter"), [("ctrl_c", "LoRA()"), ("by_itself", "None")])
def test_serve_says_how_to_use_it_and_ends(start: Callable[..., Server], tmp_path: Path, ends: str, adapter: str):
    start()
    model = tmp_path / "model"
    build("llama").save_pretrained(model)
    file = tmp_path / "x.py"
    file.write_text(RECIPE.format(model=str(model), adapter=adapter, python=str(tmp_path / "python")))
    env = {**os.environ, "FT_VLLM_TOKEN": "sesame"}
    process = subprocess.Popen(
        [sys.executable, "-m", "ft", "serve", str(file)], stdout=subprocess.PIPE, stderr=subprocess.PIPE, env=env
    )
    assert process.stdout is not None
    said = [process.stdout.readline().decode(), process.stdout.readline().decode()]
    assert "Ctrl+C ends it" in said[0] and "FT_VLLM_TOKEN=sesame" in said[1]
    url = said[1].split("sampler.url=")[1].strip()
    client = Client(url=url, token="sesame")
    assert client.complete("base", [3], 1, OPTIONS)
    if adapter == "None":
        assert client.workers() == 2  # it takes whole models
    else:
        with pytest.raises(Refused, match="404"):
            client.workers()
    if ends == "ctrl_c":
        process.send_signal(signal.SIGINT)
    else:
        os.kill(pids(tmp_path)[0], signal.SIGKILL)
    _, errors = process.communicate(timeout=20)
    assert process.returncode == (130 if ends == "ctrl_c" else 2) and gone(pids(tmp_path))
    assert (b"the vLLM server has ended" in errors) == (ends == "by_itself")


def test_serve_refuses_what_needs_no_server():
    from ft import SFT
    from ft.commands.serve import serve

    for one in (recipe(method=SFT()), recipe(sampler=VLLM(url="http://x"))):
        with pytest.raises(RecipeError):
            serve(one, print)
