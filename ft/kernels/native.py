"""C routines that ship as source, compiled at first use by this machine's compiler for this machine's processor.

None is needed: without a compiler, or with FT_NATIVE=0 in the environment, plain torch runs instead, only slower.
Libraries are kept in $XDG_CACHE_HOME/ft/native, else ~/.cache/ft/native, each under a hash of its source, the
compiler and the processor's instructions, since a home may be shared by different machines.
"""

from __future__ import annotations

import ctypes
import hashlib
import os
import shlex
import shutil
import stat
import subprocess
import tempfile
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path

from attrs import frozen

# Products and sums round each, as in torch, unless ``extra`` asks otherwise. OpenMP's runtime is torch's, by its name.
FLAGS = ("-O3", "-ffp-contract=off", "-shared", "-fPIC")
# Tried in turn. Some compilers know their own processor by -mcpu, and some come without OpenMP.
VARIANTS = (("-march=native", "-fopenmp"), ("-march=native",), ("-mcpu=native", "-fopenmp"), ("-mcpu=native",), ())
COMPILERS = ("cc", "gcc", "clang")
SECONDS = 120  # that a compiler may take


class Failed(Exception):
    """Why there is no library, for a line of text."""


@frozen(kw_only=True)
class Native:
    """A library, None where torch must do its work; and in a line what runs and why."""

    library: ctypes.CDLL | None
    text: str


def load(source: Path, extra: Sequence[str] = ()) -> Native:
    """The library of ``source``, from the cache or compiled, with flags ``extra`` after ours; it never raises.

    Each source exports ``const char *instructions(void)``: which of the processor's it was compiled for.
    """
    try:
        if os.environ.get("FT_NATIVE") == "0":
            raise Failed("FT_NATIVE=0 in the environment")
        place, remark = cache()
        with place as folder:
            library, flags = _first(compiler(), source, extra, Path(folder))
    except (Failed, OSError, ValueError) as error:  # ValueError: $CC cannot be read
        return Native(library=None, text=f"torch: {error}")
    library.instructions.restype = ctypes.c_char_p
    kind = library.instructions().decode()
    threads = "" if "-fopenmp" in flags else ", one thread: this compiler has no OpenMP"
    return Native(library=library, text=f"C routines ({kind}{threads}){remark}")


def compiler() -> list[str]:
    """The command that compiles C: $CC, else the first of COMPILERS on PATH."""
    if own := shlex.split(os.environ.get("CC", "")):
        return own
    for name in COMPILERS:
        if path := shutil.which(name):
            return [path]
    raise Failed("no C compiler found")


def cache() -> tuple[AbstractContextManager[str], str]:
    """The user's folder of libraries, else a private one that goes away once its library is loaded; and why."""
    own = os.environ.get("XDG_CACHE_HOME", "")
    folder = (Path(own) if os.path.isabs(own) else Path("~/.cache").expanduser()) / "ft" / "native"
    try:
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        if safe(folder) and os.access(folder, os.W_OK | os.X_OK):
            return nullcontext(str(folder)), ""
        why = "is not this user's alone"
    except (OSError, RuntimeError):  # RuntimeError: a user without a home
        why = "cannot be made"
    return tempfile.TemporaryDirectory(prefix="ft-native-"), f", compiled by each process: {folder} {why}"


def safe(path: Path) -> bool:
    """Whether nobody but this user can have put code there."""
    found = path.lstat()
    mine = found.st_uid == os.geteuid() and not found.st_mode & (stat.S_IWGRP | stat.S_IWOTH)
    return mine and not stat.S_ISLNK(found.st_mode)


def _first(compiler: list[str], source: Path, extra: Sequence[str], folder: Path) -> tuple[ctypes.CDLL, Sequence[str]]:
    """The library of the first of VARIANTS that compiles, and its flags. Raises Failed with the last one's reason."""
    why = Failed()
    for variant in VARIANTS:
        command = [*compiler, *FLAGS, *variant, *extra]
        try:
            # The compiler's macros tell its version, and the instructions that this processor has.
            macros = _run([*command, "-dM", "-E", "-x", "c", os.devnull])
            key = hashlib.sha256("\0".join([*command, macros, source.read_text("utf-8")]).encode()).hexdigest()
            target = folder / f"{source.stem}-{key[:32]}.so"
            if not (target.exists() and safe(target)):
                _compile(command, source, target)
            return ctypes.CDLL(str(target)), variant
        except Failed as error:
            why = error
    raise why


def _compile(command: list[str], source: Path, target: Path) -> None:
    """Under another name first: several ranks start at once, and none may see half a library."""
    number, made = tempfile.mkstemp(dir=target.parent, suffix=".part")
    os.close(number)
    try:
        _run([*command, "-o", made, str(source)])
        os.chmod(made, 0o700)
        os.replace(made, target)
    finally:
        Path(made).unlink(missing_ok=True)


def _run(command: list[str]) -> str:
    try:
        done = subprocess.run(command, capture_output=True, text=True, errors="replace", timeout=SECONDS)
    except (OSError, subprocess.TimeoutExpired) as error:
        raise Failed(f"{command[0]} cannot be run: {error}") from error
    if done.returncode:
        said = [line for line in done.stderr.splitlines() if "error" in line] or done.stderr.splitlines()
        raise Failed(f"{command[0]} failed: {said[0] if said else f'status {done.returncode}'}")
    return done.stdout
