"""Errors meant for the user: one clear line that says what, the value, the rule and the way out.

    raise ConfigError("batch.global_size=60", "does not divide by 2 ranks", "use 62 or 64")

Everything else that is raised is a bug of ours and keeps its traceback.
"""

import difflib
from collections.abc import Iterable


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
    """Training was asked to stop, and has saved."""


def nearest(name: str, known: Iterable[str]) -> str:
    """`` Did you mean 'stage'?`` for a misspelt ``name``, or the empty string."""
    known = list(known)
    matches = difflib.get_close_matches(name, known, n=1, cutoff=0.6)
    return f" Did you mean '{matches[0]}'?" if matches else ""
