"""The command ``toolkit``, a file a group of commands: how one is declared, its options follow.

command = add(commands, export, "write a checkpoint as a Hugging Face folder", "toolkit export runs/bert")
command.add_argument("run", type=Path)       # the function's parameters are the arguments
"""

import argparse
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from rich.console import Console

Commands = Any  # argparse keeps the class to itself
OVERRIDES = "Hydra overrides, e.g. {}"


def add(commands: Commands, call: Callable[..., None], what: str, *examples: str, note: str = "") -> Any:
    """The parser of the command that is called as ``call`` is."""
    parser = commands.add_parser(
        call.__name__.replace("_", "-"),
        help=what,
        description=f"{what[0].upper()}{what[1:]}.{f' {note}' if note else ''}",
        epilog="\n".join(("examples:", *(f"  {example}" for example in examples))),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.set_defaults(call=call)
    return parser


def console(**options: Any) -> "Console":
    """Rich's, which takes a moment to import."""
    from rich.console import Console

    return Console(**options)


def stem(path: Path) -> Path:
    """A picture's name without .png or .svg: both are written."""
    return path.with_suffix("") if path.suffix in (".png", ".svg") else path
