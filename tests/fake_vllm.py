"""A stand-in for vLLM's server, from the standard library: the routes that ft uses, and faults on demand.

``Fake`` runs in a thread. As a program (``python fake_vllm.py ... --port N``) it also starts a child that sleeps, as
vLLM has an engine process, and writes both pids into $FAKE_PIDS. The file $FAKE_FAULTS holds words, one start's faults.
"""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

Score = Callable[[list[int], str | None], list[float]]
# Calls by which whole models are sent: only where vLLM's developer mode is on.
TAKING = (
    "/pause", "/resume", "/is_paused", "/collective_rpc", "/reset_prefix_cache", "/update_weight_version",
    "/weight_info", "/get_world_size", "/init_weight_transfer_engine", "/start_weight_update", "/update_weights",
    "/finish_weight_update", "/shutdown_weight_transfer_engine",
)  # fmt: skip


class Fake(ThreadingHTTPServer):
    """Answers "5 6 7 <seed's digit> 2". ``faults`` are taken one by one by requests that generate."""

    daemon_threads = True

    def __init__(self, port: int = 0, *, score: Score | None = None, token: str = "", faults: tuple[str, ...] = ()):
        super().__init__(("127.0.0.1", port), _Handler)
        self.score, self.token, self.faults = score, token, list(faults)
        self.always = ""  # a fault of every request
        self.adapters: dict[str, str] = {}
        self.deaf = False  # takes adapters, and does not apply them
        self.closed = False  # takes no adapters at all
        self.unfit = ""  # what it says of adapters that it fails at
        self.version, self.root, self.longest = "0.32.0+cpu", "", 256  # vLLM's, and the model's
        self.routes: Callable[[list[int]], str] | None = None  # what it says of the experts of forwarded tokens
        self.raw = False  # log-probs leave out the temperature
        self.seen: list[tuple[str, dict[str, Any]]] = []
        self.whole = False  # has the calls of TAKING
        self.old = False  # keeps no version of its weights
        self.guarded = True  # asks for its token there, too
        self.on: dict[str, Callable[[dict[str, Any]], object]] = {}  # what else a call does; one that raises fails
        self.paused, self.weights = False, "default"  # whether it draws no answers; what its weights are called

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}"

    def __enter__(self) -> Fake:
        threading.Thread(target=self.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True).start()
        return self

    def __exit__(self, *exc: object) -> None:
        self.shutdown()
        self.server_close()

    def asked(self, path: str) -> list[dict[str, Any]]:
        return [body for route, body in self.seen if route == path]

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Clients that hang up are not worth a traceback."""


class _Handler(BaseHTTPRequestHandler):
    server: Fake  # type: ignore[assignment]

    def do_GET(self) -> None:
        if self.locked():
            return self.reply(401, {"error": {"message": "Unauthorized"}})
        if self.path == "/health":
            return self.reply(200, "")
        if self.path == "/version" and self.server.version:
            return self.reply(200, {"version": self.server.version})
        if self.path == "/v1/models":
            base = {"id": "base", "root": self.server.root, "parent": None, "max_model_len": self.server.longest}
            return self.reply(200, {"data": [base, {"id": "x", "root": "/adapters/x", "parent": "base"}]})
        if self.path in TAKING and self.server.whole and not self.outdated():
            return self.reply(200, {"world_size": 2, "weight_version": self.server.weights})
        return self.reply(404, {"detail": "Not Found"})

    def locked(self) -> bool:
        opened = self.path == "/health" or (self.route in TAKING and not self.server.guarded)
        wrong = self.headers.get("Authorization") != f"Bearer {self.server.token}"
        return bool(self.server.token) and wrong and not opened

    def outdated(self) -> bool:
        return self.server.old and self.route in ("/update_weight_version", "/weight_info")

    @property
    def route(self) -> str:
        return self.path.partition("?")[0]

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        self.server.seen.append((self.path, body))
        if self.locked():
            return self.reply(401, {"error": {"message": "Unauthorized"}})
        if self.route in TAKING:
            return self.take(body)
        if self.path == "/v1/load_lora_adapter" and self.server.closed:
            return self.reply(404, {"detail": "Not Found"})
        if self.path == "/v1/load_lora_adapter" and self.server.unfit:
            return self.reply(500, {"error": {"message": self.server.unfit}})
        if self.path == "/v1/load_lora_adapter":
            if not self.server.deaf or body["lora_name"] not in self.server.adapters:
                self.server.adapters[body["lora_name"]] = body["lora_path"]
            return self.reply(200, "Success")
        if self.path == "/v1/unload_lora_adapter":
            self.server.adapters.pop(body["lora_name"])
            return self.reply(200, "Success")
        if body["model"] != "base" and body["model"] not in self.server.adapters:
            return self.reply(404, {"error": {"message": f"The model `{body['model']}` does not exist."}})
        fault = self.server.always or (self.server.faults.pop(0) if self.server.faults else "")
        return self.completion(body, fault)

    def take(self, body: dict[str, Any]) -> None:
        """A call of TAKING. A model that is loaded again is kept as the adapter of "base"."""
        if not self.server.whole or self.outdated():
            return self.reply(404, {"detail": "Not Found"})
        try:
            self.server.on.get(self.route, lambda body: None)(body)
        except Exception as error:
            return self.send(500, f"Internal Server Error: {error}".encode())
        if self.route in ("/pause", "/resume"):
            self.server.paused = self.route == "/pause"
        if self.route == "/update_weight_version":
            self.server.weights = body["new_version"]
        if body.get("method") == "reload_weights":
            self.server.adapters["base"] = body["kwargs"]["weights_path"]
        return self.reply(200, {"success": True})

    def completion(self, body: dict[str, Any], fault: str) -> None:
        if fault == "die":
            os._exit(9)
        if fault.startswith("slow"):
            time.sleep(float(fault[4:]))
        if fault == "hang":
            time.sleep(60)
        if fault == "drop":
            return self.connection.close()
        if fault == "500":
            return self.reply(500, {"error": {"message": "EngineCore died"}})
        if fault == "400":
            return self.reply(400, {"error": {"message": "too long"}})
        reply = self.answers(body)
        if fault == "garbage":
            return self.send(200, b'{"model": "base", "choices": [{')
        if fault == "few":
            reply["choices"].pop()
        if fault == "short":
            reply["choices"][0]["logprobs"]["token_logprobs"].pop()
        if fault == "none":
            reply["choices"][0]["logprobs"]["token_logprobs"][0] = None
        if fault == "nan":
            reply["choices"][0]["logprobs"]["token_logprobs"][0] = math.nan
        if fault == "model":
            reply["model"] = "another"
        if fault == "prompt":
            reply["choices"][0]["prompt_token_ids"] = [0]
        if fault == "abort":
            reply["choices"][0]["finish_reason"] = "abort"
        return self.reply(200, reply)

    def answers(self, body: dict[str, Any]) -> dict[str, Any]:
        prompt, most = body["prompt"], body["max_tokens"]
        tokens = [5, 6, 7, 10 + body.get("seed", 0) % 10, 2][:most]
        sharp = 1.0 if self.server.raw else 1 / (body.get("temperature") or 1.0)
        logprobs = {"token_logprobs": [-1.0 / sharp] * len(tokens), "top_logprobs": [{"x": -0.5 / sharp}] * len(tokens)}
        choice = {
            "token_ids": tokens, "text": "", "logprobs": logprobs, "prompt_token_ids": prompt,
            "finish_reason": "stop" if tokens[-1] == 2 else "length", "prompt_logprobs": None,
        }  # fmt: skip
        if self.server.routes:
            choice["routed_experts"] = self.server.routes([*prompt, *tokens[:-1]])
        if "prompt_logprobs" in body:
            values = (self.server.score or _even)(prompt, self.server.adapters.get(body["model"]))
            given = [{str(t): {"logprob": v}} for t, v in zip(prompt[1:], values, strict=True)]
            choice["prompt_logprobs"] = [None, *given]
        return {"model": body["model"], "choices": [{**choice, "index": i} for i in range(body.get("n", 1))]}

    def reply(self, status: int, value: Any) -> None:
        self.send(status, json.dumps(value).encode())

    def send(self, status: int, raw: bytes) -> None:
        self.send_response(status)
        self.send_header("Content-Length", str(len(raw)))
        self.end_headers()
        self.wfile.write(raw)

    def log_message(self, format: str, *args: Any) -> None:
        pass


def _even(tokens: list[int], adapter: str | None) -> list[float]:
    return [-1.0] * (len(tokens) - 1)


if __name__ == "__main__":
    pids = os.environ.get("FAKE_PIDS")
    engine = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(300)"])
    if pids:
        with open(pids, "a") as file:
            file.write(f"{os.getpid()} {engine.pid}\n")
    plan = Path(os.environ["FAKE_FAULTS"])
    faults = tuple(plan.read_text().split()) if plan.exists() else ()
    plan.unlink(missing_ok=True)  # the next start is a good one
    if "refuse" in faults:
        print("ValueError: the fake does not like its arguments", flush=True)
        sys.exit(3)
    if "never" in faults:
        time.sleep(300)
    port = int(sys.argv[sys.argv.index("--port") + 1])
    fake = Fake(port, token=os.environ["VLLM_API_KEY"], faults=faults)
    if "unreadable" in faults:
        fake.on["/collective_rpc"] = lambda body: 1 / 0
    fake.whole = os.environ.get("VLLM_SERVER_DEV_MODE") == "1"
    fake.serve_forever()
