"""The vLLM sampler against a real vLLM. Skipped unless $FT_VLLM_PYTHON names a Python that has it.

SmolLM2-135M-Instruct in float32, from $FT_MODELS or ./models. One server serves most tests; each start takes a minute
or more, so that the whole takes about sixteen. ``pytest -s`` shows what is measured.
"""

from __future__ import annotations

import base64
import io
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from datetime import timedelta
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from attrs import define, evolve
from test_transfer import Whole, wired
from test_transfer import recipe as small
from test_vllm import gone, sampler, told
from tiny_models import build as tiny_model
from torch.distributed import ProcessGroupGloo, TCPStore

from ft import GRPO, VLLM, Data, LoRA, Model, Recipe, Sampling, Save, dist
from ft.data.pack import collate
from ft.data.tokenizer import byte_tokenizer, load_tokenizer
from ft.dist import World, copy_into, whole
from ft.errors import FtError
from ft.io.weights import resolve
from ft.models import routes
from ft.models.build import Built, build
from ft.models.experts import use_ft_experts
from ft.models.layout import Layout
from ft.models.load import config_of
from ft.models.policy import Policy, Scorer, logprobs
from ft.recipe import Parallel
from ft.rollout import routed
from ft.rollout.ahead import AheadSampler
from ft.rollout.client import Client, Refused
from ft.rollout.rewards import exact
from ft.rollout.server import Server, launch
from ft.rollout.vllm import VLLMSampler
from ft.train import optim
from ft.train.online import sampler_of
from ft.types import Example, Rollout

pytestmark = [
    pytest.mark.skipif(not os.environ.get("FT_VLLM_PYTHON"), reason="FT_VLLM_PYTHON names no Python with vLLM"),
    pytest.mark.timeout(900),
]
ID = "HuggingFaceTB/SmolLM2-135M-Instruct"
QUESTIONS = ("What is 3 + 4?", "Name a colour.", "Say hello to Anna.", "Which is larger, 7 or 9?")


def recipe(folder: Path, **over: Any) -> Recipe:
    given: dict[str, Any] = {
        "model": Model(id=ID, dtype="float32", checkpointing=False),
        "adapter": LoRA(r=8, alpha=16.0, targets=("attention", "mlp")),
        "data": Data(train="x.jsonl", max_tokens=128),
        "method": GRPO(rewards=exact, sampling=Sampling(max_tokens=24)),
        "sampler": VLLM(concurrency=4),
        "save": Save(dir=folder),
    }
    return Recipe(**{**given, **over})


def made(recipe: Recipe, world: World, said: list[str]) -> tuple[VLLMSampler, Built, Any]:
    source = resolve(ID, None)
    tokenizer, config = load_tokenizer(source.path), config_of(source.path)
    built = build(
        recipe.model, recipe.adapter, config, source, world=world, parallel=Parallel(), seed=0, say=said.append
    )
    found = sampler_of(recipe, built, world, tokenizer, source, said.append)
    assert isinstance(found, VLLMSampler)
    return found, built, tokenizer


class Stand:
    """A sampler with a server of ours, its policy, and what it said."""

    def __init__(self, world: World, folder: Path, **over: Any):
        torch.set_num_threads(1)
        self.said: list[str] = []
        self.world = world
        self.sampler, self.built, tokenizer = made(recipe(folder, **over), world, self.said)
        texts = [
            tokenizer.apply_chat_template([{"role": "user", "content": q}], tokenize=False, add_generation_prompt=True)
            for q in QUESTIONS
        ]
        tokens = [np.array(tokenizer.encode(text, add_special_tokens=False), np.int32) for text in texts]
        self.prompts = [Example(tokens_L=t, mask_L=np.zeros(len(t), bool), source=str(i)) for i, t in enumerate(tokens)]
        self.step = 0

    @torch.no_grad()
    def move(self, by: float = 0.02) -> None:
        """Change all that is trained; of adapters, the first time makes the second factors other than zero."""
        self.step += 1
        generator = torch.Generator().manual_seed(self.step)
        for parameter in optim.trained(self.built.policy.scorer.model).values():
            copy_into(parameter, whole(parameter) + by * torch.randn(parameter.shape, generator=generator))

    def gap(self, sampling: Sampling) -> tuple[float, float, int]:
        """Mismatch KL, largest |log ratio| and tokens of fresh answers: the trainer's against the sampler's."""
        self.sampler.sampling = sampling
        groups = self.sampler.rollout(self.prompts, 4, self.step)
        rollouts = [rollout for group in groups for rollout in group]
        examples, said = [], []
        for r in rollouts:
            assert r.logp_L is not None
            whole = np.concatenate([r.prompt.tokens_L, r.tokens_L])
            examples.append(Example(tokens_L=whole, mask_L=np.arange(len(whole)) >= len(r.prompt.tokens_L)))
            said.append(r.logp_L.astype(np.float64))
        batch = collate(examples)
        with torch.no_grad():
            ours_T = logprobs(self.built.policy, batch, temperature=sampling.temperature).logp_T
        gap_N = ours_T[batch.trained_N].double().numpy() - np.concatenate(said)
        return float(np.mean(np.expm1(gap_N) - gap_N)), float(np.abs(gap_N).max()), len(gap_N)


@pytest.fixture(scope="module")
def stand(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Stand]:
    with dist.launched() as world:
        stand = Stand(world, tmp_path_factory.mktemp("run"))
        try:
            yield stand
        finally:
            stand.sampler.close()


@pytest.mark.parametrize("temperature", [1.0, 0.6])
@pytest.mark.parametrize("moved", [False, True])
def test_importance_ratios_are_one(stand: Stand, temperature: float, moved: bool):
    if moved:
        stand.move()
    stand.sampler.sync(stand.step)
    kl, largest, tokens = stand.gap(Sampling(max_tokens=24, temperature=temperature))
    verdict = stand.sampler.mismatch
    assert verdict is not None
    seen = f"KL {kl:.2g}, largest |log ratio| {largest:.2g}, {tokens} tokens, canary {verdict.divergence:.2g}"
    print(f"\ntemperature {temperature}, moved {moved}: {seen}")
    assert tokens > 100 and kl < 1e-7 and largest < 5e-3 and verdict.divergence < 1e-7


def test_the_servers_log_probs_have_the_temperature_in_them(stand: Stand):
    stand.sampler.sync(stand.step)
    stand.sampler.sampling = Sampling(max_tokens=4, temperature=0.6)
    stand.sampler._check_temperature()


def test_prompts_of_more_tokens_than_it_takes_at_a_time(stand: Stand):
    """A CPU's server dies of them where prompts may be read in parts; see ``ft.rollout.server.arguments``."""
    stand.sampler.sync(stand.step)
    stand.sampler.sampling = Sampling(max_tokens=2)
    assert 24 * sum(len(prompt.tokens_L) for prompt in stand.prompts) > 2048
    groups = stand.sampler.rollout(stand.prompts, 24, stand.step)
    assert [len(group) for group in groups] == [24] * len(stand.prompts)


def test_answers_are_a_function_of_the_seed(stand: Stand):
    stand.sampler.sync(stand.step)
    stand.sampler.sampling = Sampling(max_tokens=8)
    first, second, other = (stand.sampler.rollout(stand.prompts, 2, step) for step in (7, 7, 8))
    same = [a.tokens_L.tolist() == b.tokens_L.tolist() for x, y in zip(first, second, strict=True)
            for a, b in zip(x, y, strict=True)]  # fmt: skip
    assert all(same)
    assert any(a[0].tokens_L.tolist() != b[0].tokens_L.tolist() for a, b in zip(first, other, strict=True))


@pytest.mark.parametrize("by", [0.02, 0.0005])
def test_a_stale_adapter_trips_the_canary(stand: Stand, by: float):
    stand.move()
    stand.sampler.sync(stand.step)
    right, before = stand.sampler.weights, stand.sampler.weights.gather()
    stand.move(by)
    stand.sampler.weights = evolve(right, write=lambda folder, tensors: right.write(folder, before))
    try:
        with pytest.raises(FtError, match="still answers with the weights before these"):
            stand.sampler.sync(stand.step)
    finally:
        stand.sampler.weights = right
    print(f"\nstale by {by}: {stand.sampler.mismatch}")


def test_an_adapter_under_other_names_trips_the_canary_or_is_refused(stand: Stand):
    stand.move()
    right = stand.sampler.weights

    def renamed(folder: Path, tensors: Any) -> None:
        right.write(
            folder, {name.replace("model.layers", "model.language_model.layers"): t for name, t in tensors.items()}
        )

    stand.sampler.weights = evolve(right, write=renamed)
    try:
        with pytest.raises(FtError) as caught:
            stand.sampler.sync(stand.step)
    finally:
        stand.sampler.weights = right
    print(f"\nother names: {caught.value}")
    stand.sampler.sync(stand.step)


def logps(stand: Stand, groups: list[list[Rollout]]) -> tuple[np.ndarray, np.ndarray]:
    """Of all tokens of the answers: the policy's as it is now, and the sampler's as drawn."""
    rollouts = [rollout for group in groups for rollout in group]
    examples = []
    for r in rollouts:
        tokens_L = np.concatenate([r.prompt.tokens_L, r.tokens_L])
        examples.append(Example(tokens_L=tokens_L, mask_L=np.arange(len(tokens_L)) >= len(r.prompt.tokens_L)))
    batch = collate(examples)
    with torch.no_grad():
        ours_T = logprobs(stand.built.policy, batch).logp_T
    said = [r.logp_L for r in rollouts if r.logp_L is not None]
    return ours_T[batch.trained_N].double().numpy(), np.concatenate(said).astype(np.float64)


def test_answers_in_flight_while_weights_are_sent_are_all_by_the_older_ones(stand: Stand):
    stand.sampler.sampling = Sampling(max_tokens=24)
    ahead = AheadSampler(sampler=stand.sampler, world=stand.world)
    stand.move()
    ahead.sync(stand.step)
    before = stand.step
    ahead.begin(40, stand.prompts, 4, before)
    time.sleep(0.5)  # into the generation
    adapter = {name: whole(p).clone() for name, p in optim.trained(stand.built.policy.scorer.model).items()}
    stand.move()
    ahead.sync(stand.step)
    groups = ahead.take(40)
    assert {rollout.policy_step for group in groups for rollout in group} == {before}
    newer_N, drawn_N = logps(stand, groups)
    with torch.no_grad():
        for name, p in optim.trained(stand.built.policy.scorer.model).items():
            copy_into(p, adapter[name])
    older_N, _ = logps(stand, groups)
    near, far = np.abs(older_N - drawn_N).max(), np.abs(newer_N - drawn_N).max()
    print(f"\nlargest |log ratio| to the older weights {near:.2g}, to the newer ones {far:.2g}")
    assert near < 5e-3 and far > 0.1
    stand.sampler.sync(stand.step)
    ahead.close()


def processes(leader: int) -> list[int]:
    """Those of its group: the launcher, the server, its engine and its workers."""
    found = subprocess.run(["ps", "-eo", "pid=,pgid="], capture_output=True, text=True, check=True).stdout.split("\n")
    return [int(line.split()[0]) for line in found if line.split()[1:] == [str(leader)]]


def test_a_killed_engine_is_noticed_and_the_rollout_goes_on(stand: Stand):
    stand.sampler.sampling = Sampling(max_tokens=8)
    stand.sampler.sync(stand.step)
    server = stand.sampler.server
    assert server is not None and server.process is not None
    before = processes(server.process.pid)
    names = {n: Path(f"/proc/{n}/cmdline").read_bytes().replace(b"\0", b" ") for n in before}
    (engine,) = [n for n, name in names.items() if name.startswith(b"VLLM::EngineCore")]
    os.kill(engine, signal.SIGKILL)
    began = time.monotonic()
    groups = stand.sampler.rollout(stand.prompts, 2, stand.step)
    print(f"\nrestarted and answered in {time.monotonic() - began:.0f} s: {stand.said[-1]}")
    assert [len(group) for group in groups] == [2] * len(stand.prompts)
    assert "started again" in stand.said[-1] and gone(before)
    kl, largest, _ = stand.gap(Sampling(max_tokens=24))
    assert kl < 1e-7 and largest < 5e-3  # with the adapter that it had before


PARENT = """
import sys
from pathlib import Path
sys.path.insert(0, sys.argv[2])
from test_vllm_real import Stand, dist
with dist.launched() as world:
    stand = Stand(world, Path(sys.argv[1]))
    stand.sampler.sync(0)
    print(stand.sampler.server.process.pid, flush=True)
    stand.sampler.rollout(stand.prompts, 64, 0)
"""


def test_nothing_is_left_when_the_parent_is_killed(stand: Stand, tmp_path: Path):
    stand.sampler.close()
    here = Path(__file__).parent
    env = {**os.environ, "PYTHONPATH": os.pathsep.join([str(here.parent), str(here)])}
    parent = subprocess.Popen([sys.executable, "-c", PARENT, str(tmp_path), str(here)], stdout=subprocess.PIPE, env=env)
    assert parent.stdout is not None
    leader = next(int(line) for line in parent.stdout if line.strip().isdigit())
    time.sleep(1)  # into the generation
    left = processes(leader)
    assert len(left) >= 3
    parent.kill()
    parent.wait()
    parent.stdout.close()
    assert gone(left)


INTERRUPTED = """
from ft import *
from ft.rollout.rewards import last_number

recipe = Recipe(
    model=Model(id="HuggingFaceTB/SmolLM2-135M-Instruct", dtype="float32", checkpointing=False),
    adapter=LoRA(r=8, alpha=16.0, targets=("attention", "mlp")),
    data=Data(train="rows.jsonl", max_tokens=128),
    method=Ahead(GRPO(rewards=last_number, group=4, sampling=Sampling(max_tokens=64)), by=1),
    sampler=VLLM(), batch=Batching(examples=2, tokens=2048), save=Save(dir="run"), steps=50,
)
"""


def descendants(leader: int) -> set[int]:
    """``leader`` and all that it started, and what those started."""
    rows = subprocess.run(["ps", "-eo", "pid=,ppid="], capture_output=True, text=True, check=True).stdout.split("\n")
    pairs, found = [tuple(map(int, row.split())) for row in rows if row], {leader}
    while more := {pid for pid, parent in pairs if parent in found} - found:
        found |= more
    return found


@pytest.mark.parametrize("ask", [os.killpg, os.kill], ids=["as a terminal does", "the parent alone"])
def test_ctrl_c_saves_ends_and_leaves_nothing_and_the_run_goes_on(stand: Stand, tmp_path: Path, ask: Any):
    stand.sampler.close()
    (tmp_path / "x.py").write_text(INTERRUPTED)
    rows = [{"prompt": f"What is {i} + 4?", "answer": str(i + 4)} for i in range(8)]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    models = str(resolve(ID, None).path.parents[1].resolve())
    command = [sys.executable, "-m", "ft", "run"]
    env = {**os.environ, "FT_MODELS": models, "OMP_NUM_THREADS": "1"}
    run = subprocess.Popen(
        [*command, "x.py"], cwd=tmp_path, env=env, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
        start_new_session=True,
    )  # fmt: skip
    assert run.stdout is not None
    said = []
    for line in run.stdout:
        said.append(line)
        if line.startswith("step 2/"):
            break
    left = descendants(run.pid)
    assert len(left) >= 6  # the run, the launcher, the server, its engine, its worker, a process that scores
    ask(run.pid, signal.SIGINT)
    said += run.stdout.readlines()
    run.stdout.close()
    assert run.wait(60) == 130 and gone(sorted(left)), "".join(said)
    text = "".join(said)
    assert "saved at step" in text and "started again" not in text
    saved = int(text.partition("saved at step ")[2].partition(";")[0])
    done = subprocess.run(
        [*command, "run/recipe.json", "--resume", f"steps={saved + 1}"], cwd=tmp_path, env=env, stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT, text=True,
    )  # fmt: skip
    assert done.returncode == 0 and f"step {saved + 1}/{saved + 1}" in done.stdout, done.stdout


@pytest.fixture(scope="module")
def full(stand: Stand, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Stand]:
    """All weights are trained: they are read again from a folder. The other server ends first."""
    stand.sampler.close()
    made = Stand(stand.world, tmp_path_factory.mktemp("full"), adapter=None)
    try:
        yield made
    finally:
        made.sampler.close()


def sent(full: Stand) -> None:
    """New weights arrive; the server's log-probs of fresh answers are then the policy's."""
    full.move(0.002)
    began = time.monotonic()
    full.sampler.sync(full.step)
    took = time.monotonic() - began
    kl, largest, tokens = full.gap(Sampling(max_tokens=24))
    print(f"\nstep {full.step}: sent in {took:.1f} s, KL {kl:.2g}, largest |log ratio| {largest:.2g}, {tokens} tokens")
    assert tokens > 100 and kl < 1e-7 and largest < 5e-3


def test_a_whole_model_takes_the_place_of_the_one_in_a_running_server(full: Stand):
    """Its head is tied to its embeddings, of which a CPU's server keeps a packed copy."""
    sent(full)
    assert full.sampler.server is not None and full.sampler.server.process is not None
    before = full.sampler.server.process.pid
    for _ in range(2):
        sent(full)
    assert full.sampler.server.process.pid == before and "started again" not in "".join(full.said)


def test_only_the_key_opens_what_changes_weights(full: Stand):
    full.sampler.sync(full.step)
    client = full.sampler._client()
    client.call("ft_repack")
    assert client.workers() == 1
    stranger = Client(url=client.url, timeout=30.0)
    for path in ("/collective_rpc", "/pause", "/update_weights", "/init_weight_transfer_engine", "/v1/completions"):
        with pytest.raises(Refused, match="401"):
            stranger.post(path, {"method": "ft_repack"})
    for path in ("/get_world_size", "/is_paused", "/version", "/metrics", "/docs", "/openapi.json", "/nowhere"):
        with pytest.raises(Refused, match="401"):
            stranger._request("GET", path, None)
    with pytest.raises(Refused, match="401"):
        Client(url=client.url, token=client.token[:-1], timeout=30.0).workers()
    assert stranger.healthy()


def test_whole_weights_outlive_a_crash_of_the_server(full: Stand):
    sent(full)
    server = full.sampler.server
    assert server is not None and server.process is not None
    os.killpg(server.process.pid, signal.SIGKILL)
    assert full.sampler.rollout(full.prompts, 1, full.step)
    kl, largest, _ = full.gap(Sampling(max_tokens=24))
    assert kl < 1e-7 and largest < 5e-3
    sent(full)


def test_experts_and_buffers_take_their_places_too(full: Stand, tmp_path: Path):
    """Of a tiny model: routed experts, which a CPU's server packs, and a router's correction, which is a buffer."""
    full.sampler.close()
    tiny = Whole(tmp_path, None, "glm4_moe", hidden_size=128, head_dim=32, vocab_size=261)
    byte_tokenizer().save_pretrained(tiny.base)
    asked = small(tiny.base)
    assert isinstance(asked.sampler, VLLM)
    server = Server(launch=launch(asked, asked.sampler, tiny.base, tmp_path))
    made = sampler(full.world, tmp_path, server=server, tiny=tiny, options={"timeout": 60.0})  # type: ignore[arg-type]
    try:
        for step in range(3):
            tiny.move(step)
            (buffer,) = [b for name, b in tiny.net.named_buffers() if name.endswith("e_score_correction_bias")]
            buffer.copy_(torch.randn(buffer.shape, generator=torch.Generator().manual_seed(step)))
            made.sync(step)
            assert made.mismatch is not None and made.mismatch.divergence < 1e-9
        assert "again" not in "".join(told(made))
    finally:
        made.close()


@pytest.mark.parametrize("family", ["glm4_moe", "mixtral"])
def test_the_experts_that_it_writes_down_are_the_trainers_in_this_order(tmp_path: Path, family: str):
    """glm4_moe's first layer is dense. See vllm_routes.py."""
    net = tiny_model(family, hidden_size=128, head_dim=32, vocab_size=261, num_hidden_layers=3)
    net.save_pretrained(tmp_path)
    byte_tokenizer().save_pretrained(tmp_path)
    use_ft_experts(net)
    command = [
        os.environ["FT_VLLM_PYTHON"],
        str(Path(__file__).with_name("vllm_routes.py")),
        tmp_path,
        tmp_path / "o.npz",
    ]
    done = subprocess.run(command, capture_output=True, text=True, env={**os.environ, "PYTHONPATH": ""})
    assert done.returncode == 0, done.stderr[-3000:]
    found = np.load(tmp_path / "o.npz")
    policy = Policy(scorer=Scorer(net), config=net.config, layout=Layout(kind="padded", attention="sdpa"))
    told = io.BytesIO()
    np.save(told, found["routes"])
    theirs_LMK = routed.read(base64.b64encode(told.getvalue()).decode(), routed.routed(policy), 14, "")
    with torch.no_grad(), routes.chosen(net) as ours:
        net(input_ids=torch.from_numpy(found["tokens"][None, :-1]))
    assert np.array_equal(theirs_LMK, torch.stack(ours).transpose(0, 1).numpy())
    assert not found["routes"][:, [i for i in range(3) if i not in routed.routed(policy).place_M]].any()


@define
class Gloo:
    """Our end of a wire between CPUs; the server's is in vllm_wire.py."""

    world: int = 0
    store: TCPStore | None = None
    group: Any = None

    def open(self, world: int) -> dict[str, Any]:
        self.world, self.store = world, TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
        return {"master_address": "127.0.0.1", "master_port": self.store.port}

    def join(self) -> None:
        assert self.store is not None
        self.group = ProcessGroupGloo(self.store, 0, self.world, timedelta(seconds=60))

    def send(self, tensor: torch.Tensor) -> None:
        self.group.broadcast(tensor, 0).wait()

    def flush(self) -> None:
        """Each was waited for."""


def test_a_whole_model_reaches_a_running_server_over_a_wire(full: Stand, tmp_path: Path):
    """vLLM's calls, and its engine of them, with gloo in NCCL's place: see vllm_wire.py."""
    full.sampler.close()
    here = Path(__file__).parent
    shutil.copyfile(here / "vllm_wire.py", tmp_path / "vllm_wire.py")
    python = tmp_path / "python"
    python.write_text(f'#!/bin/sh\nPYTHONPATH="$PYTHONPATH:{tmp_path}" exec {os.environ["FT_VLLM_PYTHON"]} "$@"\n')
    python.chmod(0o755)
    arguments = ("--worker-extension-cls", "vllm_wire.Wired", "--weight-transfer-config", '{"backend": "gloo"}')
    made = Stand(
        full.world, tmp_path / "run", adapter=None,
        sampler=VLLM(concurrency=4, python=str(python), arguments=arguments),
    )  # fmt: skip
    net = made.built.policy.scorer.model
    made.sampler.weights = wired(made.sampler.weights, net, resolve(ID, None).path, Gloo())
    made.sampler.way = made.sampler.weights.way("")
    try:
        for _ in range(3):
            sent(made)
        server = made.sampler.server
        assert server is not None and server.process is not None and "started again" not in "".join(made.said)
        os.killpg(server.process.pid, signal.SIGKILL)
        sent(made)
        assert not (tmp_path / "run" / "sync").exists()
    finally:
        made.sampler.close()
