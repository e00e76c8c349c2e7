"""Errors meant for the user: one clear line that says what, the value, the rule and the way out.

raise ConfigError("batch.global_size=60: does not divide by 2 ranks. Use 62 or 64.")

Everything else that is raised is a bug of ours and keeps its traceback. A process ends with its error's code:
0 done, 1 a bug, 2 refused, 69 a rank hung or was lost, 71 out of memory, 75 stopped by a signal after saving.
"""

import difflib
import re
import shlex
import sys
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import NoReturn

BUG = 1
LOST = 69  # EX_UNAVAILABLE of sysexits.h: a rank hangs, or was not heard of any more


class ToolkitError(Exception):
    """Base of every error that is shown without a traceback (``HYDRA_FULL_ERROR=1`` shows it)."""

    code = 2  # the process's exit code


class ConfigError(ToolkitError):
    """A key, a value or a combination in the configuration is wrong."""


class PlanError(ToolkitError):
    """The configuration cannot run on this machine."""


class DataError(ToolkitError):
    """Input data is missing, malformed or too small; the message names file and line."""


class CheckpointError(ToolkitError):
    """A checkpoint is missing, broken or belongs to another model."""


class OutOfMemory(ToolkitError):
    """The device or the host has no memory left for what was asked."""

    code = 71  # EX_OSERR of sysexits.h


class Stopped(Exception):
    """Training was asked to stop, and has saved: the command that it names goes on."""

    code = 75  # EX_TEMPFAIL of sysexits.h


command: list[str] = []  # as it was typed, without the launcher; with the run's name, once that is settled
_alone = False


def typed(words: Iterable[str], *, alone: bool) -> None:
    """Remember how this process was started: the recipe and its arguments; ``alone``: without a launcher."""
    global _alone
    command[:], _alone = words, alone


def go_on() -> str:
    """How this process's run is taken up again, in a sentence."""
    if not command:
        return "Start it again under its name= to go on."
    line = shlex.join(command)
    return f"Go on with: python {line}" if _alone else f"Go on with the same launcher and: {line}"


@contextmanager
def memory_told(way_out: str) -> Iterator[None]:
    """What ran out of memory, the host's or a device's, raises OutOfMemory with ``way_out``."""
    try:
        yield
    except (MemoryError, RuntimeError) as error:  # torch.OutOfMemoryError is a RuntimeError, the CPU's is only that
        if not isinstance(error, MemoryError) and not re.search(r"out of memory|can't allocate memory", str(error)):
            raise
        what = (str(error) or "MemoryError").splitlines()[0]
        raise OutOfMemory(f"out of memory: {what} {way_out}") from error


def leave(error: ToolkitError, whose: str = "") -> NoReturn:
    """Print the error's lines and end this process with its code."""
    for line in str(error).splitlines():
        print(f"error: {whose}{line}", file=sys.stderr)
    sys.exit(error.code)


def first_of(names: Sequence[str], most: int) -> str:
    """``a, b, …``: so many of the names, and whether there are more."""
    return ", ".join(names[:most]) + ", …" * (len(names) > most)


def nearest(name: str, known: Iterable[str]) -> str:
    """`` Did you mean 'stage'?`` for a misspelt ``name``, or the empty string."""
    written = {one.lower(): one for one in known}
    matches = difflib.get_close_matches(name.lower(), written, n=1, cutoff=0.6)
    return f" Did you mean '{written[matches[0]]}'?" if matches else ""
