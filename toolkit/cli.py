"""The `toolkit` command: everything that needs no accelerator.

toolkit prepare data=text data.path='docs/*.txt'    # corpus -> token ids, with an audit
toolkit export runs/bert                            # checkpoint -> Hugging Face folder
toolkit build-ops zero=stage2 offload=cpu           # DeepSpeed's C++ ops, ahead of the first run
"""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from toolkit.errors import ToolkitError


def main(arguments: Sequence[str] | None = None) -> None:
    """Run one command; errors are one line and exit code 2."""
    parser = argparse.ArgumentParser(
        prog="toolkit", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    commands = parser.add_subparsers(required=True, metavar="command")

    prepare = commands.add_parser("prepare", help="prepare a corpus and print its audit")
    prepare.add_argument("overrides", nargs="*", help="Hydra overrides, e.g. data.max_length=512")
    prepare.set_defaults(call=lambda a: _prepare(a.overrides))

    export = commands.add_parser("export", help="write a run's newest checkpoint as a Hugging Face folder")
    export.add_argument("run", type=Path, help="the run directory, e.g. runs/bert")
    export.add_argument("--out", type=Path, help="where to (default: <run>/export)")
    export.set_defaults(call=lambda a: _export(a.run, a.out))

    ops = commands.add_parser("build-ops", help="build DeepSpeed's C++ ops that a configuration needs")
    ops.add_argument("overrides", nargs="*", help="Hydra overrides, e.g. offload=cpu")
    ops.add_argument("--world", type=int, default=2, help="ranks the job will have (default: 2)")
    ops.set_defaults(call=lambda a: _build_ops(a.overrides, a.world))

    chosen = parser.parse_args(arguments)
    try:
        chosen.call(chosen)
    except ToolkitError as error:
        for line in str(error).splitlines():
            print(f"error: {line}", file=sys.stderr)
        sys.exit(2)


def _prepare(overrides: list[str]) -> None:
    from rich.console import Console

    from toolkit import data
    from toolkit.compose import compose

    console = Console()
    prepared = data.prepare(compose(overrides), console=console, progress=True)
    console.print(data.format_audit(prepared.audit))
    console.print(f"Prepared corpus: {prepared.path}")


def _export(run: Path, out: Path | None) -> None:
    from toolkit.export import export

    print(f"Exported to {export(run, out)}")


def _build_ops(overrides: list[str], world: int) -> None:
    from rich.console import Console

    from toolkit import ds_config, ops, ranks
    from toolkit.compose import compose

    config, device = compose(overrides), ranks.device()
    ds = ds_config.complete(config, world=world, device=device)
    builders = ds_config.required_ops(ds, device=device, world=world)
    ops.ensure(builders, Console())
    print(f"Ready in {ops.directory()}: {', '.join(builders)}")
