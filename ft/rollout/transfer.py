"""How a running server is given weights: an adapter or a whole model from a folder, or a whole model over a wire."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import FIRST_EXCEPTION, Future, wait
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Protocol

from attrs import define, frozen

from ft.errors import ServerError
from ft.io.stream import Entry
from ft.rollout import foreign
from ft.rollout.client import Broken, Client, Refused, Unreachable
from ft.rollout.server import BASE
from ft.rollout.wire import Wire

_LAST_WORD = 2.0  # seconds in which a server may say why our end of the wire broke


class Lost(Unreachable):
    """The server has other weights than it was sent: it was started anew."""


@frozen(kw_only=True, eq=False)
class Parcel:
    """The weights of a step: in a folder, or as tensors by their stored names."""

    version: str  # no other parcel's
    folder: Path | None = None
    entries: Sequence[Entry] = ()


class Way(Protocol):
    """A way of giving weights to a server."""

    @property
    def model(self) -> str:
        """What the server calls the model that has them."""
        ...

    @property
    def starts(self) -> bool:
        """Whether a server of ours that is started on a parcel's folder has them already."""
        ...

    def send(self, client: Client, parcel: Parcel) -> None:
        """Have the server take them.

        Raises:
            Unreachable, Refused, ServerError
        """
        ...

    def check(self, client: Client, parcel: Parcel) -> None:
        """Raises:
        Lost: the server does not have them any more, and would not say so when it is asked for answers.
        """
        ...

    def leave(self, client: Client) -> None:
        """Have a server that goes on without us forget us."""
        ...


@frozen
class Adapter:
    """An adapter, from its folder, in the place of the one of that name."""

    model: str
    starts = False

    def send(self, client: Client, parcel: Parcel) -> None:
        try:
            client.load_adapter(self.model, str(parcel.folder))
        except Refused as error:
            if error.status == 404:
                raise foreign.no_adapters(client, error) from error
            raise
        except Broken as error:  # vLLM says so too where an adapter does not fit
            if client.healthy():
                raise foreign.unfit(client, error) from error
            raise

    def check(self, client: Client, parcel: Parcel) -> None:
        """A server that lost it refuses to answer."""

    def leave(self, client: Client) -> None:
        client.post("/v1/unload_lora_adapter", {"lora_name": self.model})


@frozen
class Reload:
    """A whole model, from its folder, into the place of the one that the server has in memory."""

    ours: bool  # a server of ours, which is started again when this fails
    model = BASE
    starts = True

    def send(self, client: Client, parcel: Parcel) -> None:
        with taking(client, parcel):
            try:
                client.call("reload_weights", weights_path=str(parcel.folder))
            except Broken as error:
                if self.ours:
                    raise
                raise foreign.no_reload(client, error) from error

    def check(self, client: Client, parcel: Parcel) -> None:
        _same(client, parcel)

    def leave(self, client: Client) -> None:
        """Nothing was left there but the weights."""


@define(eq=False)
class Broadcast:
    """A whole model, tensor by tensor, over a wire that the server joins once."""

    wire: Wire
    joined: tuple[Client, str] | None = None  # the server at the other end, and the version that it was sent last
    model = BASE
    starts = False

    def send(self, client: Client, parcel: Parcel) -> None:
        joined, self.joined = self.joined, None
        with taking(client, parcel):
            if joined is None or joined[0] is not client or not _has(client, joined[1]):
                self._join(client)
            self._update(client, parcel.entries)
        self.joined = (client, parcel.version)

    def _join(self, client: Client) -> None:
        world = 1 + client.workers()
        init = {"rank_offset": 1, "world_size": world, "packed": False, **self.wire.open(world)}
        try:
            together(
                lambda: client.post("/init_weight_transfer_engine", {"init_info": init}), self.wire.join, client.timeout
            )
        except Broken as error:
            if client.healthy():
                raise foreign.no_wire(client, error) from error
            raise

    def _update(self, client: Client, entries: Sequence[Entry]) -> None:
        said = {
            "names": [entry.name for entry in entries],
            "dtype_names": [str(entry.dtype).removeprefix("torch.") for entry in entries],
            "shapes": [list(entry.shape) for entry in entries],
        }
        client.post("/start_weight_update", {})
        try:
            together(
                lambda: client.post("/update_weights", {"update_info": said}),
                lambda: self._stream(entries), client.timeout,
            )  # fmt: skip
        except (Unreachable, Refused) as error:  # what was sent and not taken may hold our GPU: no second try
            raise foreign.halfway(client, error) from error
        client.post("/finish_weight_update", {})

    def _stream(self, entries: Sequence[Entry]) -> None:
        for entry in entries:
            self.wire.send(entry.get().detach().contiguous())
        self.wire.flush()

    def check(self, client: Client, parcel: Parcel) -> None:
        _same(client, parcel)

    def leave(self, client: Client) -> None:
        if self.joined is not None:
            client.post("/shutdown_weight_transfer_engine", {})


@contextmanager
def taking(client: Client, parcel: Parcel) -> Iterator[None]:
    """The server finishes the answers that it is at, takes weights meanwhile, and goes on: also where it could not.

    Raises:
        ServerError: it has no such calls.
    """
    try:
        client.post("/pause?mode=wait", {})
        _helped(client, "ft_unpack")
        yield
        _helped(client, "ft_repack")
        client.reset_cache()
        with suppress(Refused):  # see _has
            client.post("/update_weight_version", {"new_version": parcel.version})
    except BaseException as error:
        with suppress(Unreachable, Refused):
            client.post("/resume", {})
        if isinstance(error, Refused) and error.status == 404:
            raise foreign.closed(client, error) from error
        raise
    client.post("/resume", {})


def _helped(client: Client, method: str) -> None:
    """By what we add to servers of ours (ft_worker.py); another one that needs it, on a CPU, fails the canary."""
    try:
        client.call(method)
    except Broken:
        if not client.healthy():
            raise


def _same(client: Client, parcel: Parcel) -> None:
    if not _has(client, parcel.version):
        raise Lost(f"its weights are not those that it was sent as {parcel.version!r}")


def _has(client: Client, version: str) -> bool:
    """Whether it is the server that was sent this, as far as it can tell."""
    try:
        return client.weight_version() == version
    except Refused:  # older servers keep no version
        return True


def together(theirs: Callable[[], object], ours: Callable[[], object], timeout: float) -> None:
    """Both at once, since each waits for the other. One that fails ends it, and the other is left behind in its thread.

    Raises:
        Unreachable, Refused: the server's call failed, or they did not end in time.
        ServerError: our end of the wire failed, and the server does not say why.
    """
    server, wire = _begun(theirs), _begun(ours)
    wait((server, wire), timeout, FIRST_EXCEPTION)
    broken = wire.exception() if wire.done() else None
    if broken is not None:
        wait((server,), _LAST_WORD)
    if server.done():
        server.result()
    if broken is not None:
        raise ServerError(
            "weights cannot be sent to the server", where="sampler.transfer", got=f"{type(broken).__name__}: {broken}",
            fix='both environments need the same version of NCCL; sampler.transfer="file" needs none',
        ) from broken  # fmt: skip
    if not (server.done() and wire.done()):
        raise Unreachable(f"the weights did not arrive within {timeout:g} s")


def _begun(act: Callable[[], object]) -> Future[object]:
    """In a daemon's thread, which keeps no process from ending."""
    future: Future[object] = Future()

    def run() -> None:
        try:
            future.set_result(act())
        except Exception as error:  # for the thread that waits
            future.set_exception(error)

    threading.Thread(target=run, daemon=True).start()
    return future
