"""The `toolkit` command: everything that needs no accelerator.

toolkit --help              # all commands
toolkit plan --help         # one, with examples
"""

import argparse
import sys
from collections.abc import Sequence

from toolkit.cli import jobs, plan, runs
from toolkit.errors import ToolkitError, leave, memory_told


def main(arguments: Sequence[str] | None = None) -> None:
    """Run one command; errors are one line and the exit code of their class."""
    parser = argparse.ArgumentParser(
        prog="toolkit",
        description="Everything that needs no accelerator. `toolkit <command> --help` has examples.",
    )
    commands = parser.add_subparsers(required=True, metavar="command")
    for group in (plan, runs, jobs):
        group.add_to(commands)
    chosen, rest = parser.parse_known_args(arguments)
    given = vars(chosen)
    if wrong := [word for word in rest if word.startswith("-") or "overrides" not in given]:
        parser.error(f"unrecognized arguments: {' '.join(wrong)}")
    if rest:
        given["overrides"] += rest  # those after an option: argparse takes them before or after, not both
    call = given.pop("call")
    try:
        with memory_told("Use a host with more, or a smaller configuration."):
            call(**given)
    except ToolkitError as error:
        leave(error)
    except KeyboardInterrupt:
        sys.exit(130)
