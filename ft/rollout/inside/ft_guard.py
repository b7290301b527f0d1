"""Runs inside a vLLM server that ft starts: no request without the server's key, whatever its path.

vLLM itself asks for its key on the paths of its API only. Those by which a running server takes new weights, and by
which any method of its workers is called, are open to every user of the machine.
"""

from __future__ import annotations

import hmac
import os
from collections.abc import Awaitable, Callable, Mapping
from typing import Any

Receive = Callable[[], Awaitable[Mapping[str, Any]]]
Send = Callable[[Mapping[str, Any]], Awaitable[None]]
App = Callable[[Mapping[str, Any], Receive, Send], Awaitable[None]]
_OPEN = "/health"  # says nothing but that it runs


class Guard:
    """ASGI middleware. The key is vLLM's own, from its environment; without one nothing passes."""

    def __init__(self, app: App):
        self.app = app
        self.wanted = f"Bearer {os.environ.get('VLLM_API_KEY', '')}".encode()

    async def __call__(self, scope: Mapping[str, Any], receive: Receive, send: Send) -> None:
        if scope["type"] == "lifespan" or scope.get("path") == _OPEN or self._knows(scope):
            return await self.app(scope, receive, send)
        if scope["type"] == "websocket":
            return await send({"type": "websocket.close", "code": 1008})
        head = [(b"content-type", b"application/json"), (b"www-authenticate", b"Bearer")]
        await send({"type": "http.response.start", "status": 401, "headers": head})
        return await send({"type": "http.response.body", "body": b'{"error": {"message": "Unauthorized"}}'})

    def _knows(self, scope: Mapping[str, Any]) -> bool:
        given = [value for name, value in scope.get("headers", []) if name.lower() == b"authorization"]
        return len(self.wanted) > len(b"Bearer ") and len(given) == 1 and hmac.compare_digest(given[0], self.wanted)
