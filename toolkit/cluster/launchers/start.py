"""`toolkit launch`: what a launcher needs is saved and printed, or submitted.

start(Path("recipes/pretrain.py"), ["zero=stage3"], on="slurm", submit=True)
"""

import os
import re
import shlex
import shutil
import sys
from collections.abc import Sequence
from contextlib import suppress
from importlib import import_module
from pathlib import Path

from toolkit.cluster.launchers import LAUNCHERS
from toolkit.cluster.launchers.job import Launch, prepare, save
from toolkit.config.schema import SECRET
from toolkit.errors import ConfigError, nearest


def start(recipe: Path, overrides: Sequence[str], *, on: str, submit: bool = False, out: Path | None = None) -> None:
    """Print the command, script or manifest; with ``submit`` become the process that submits it. Raises ConfigError."""
    if on not in LAUNCHERS:
        raise ConfigError(f"--on {on}: no such launcher.{nearest(on, LAUNCHERS)} Known: {', '.join(LAUNCHERS)}.")
    job = prepare(recipe, overrides, out)
    try:
        launch: Launch = getattr(import_module(f"toolkit.cluster.launchers.{LAUNCHERS[on]}"), on)(job)
        tool = launch.command[0]
        if submit and shutil.which(tool) is None:
            raise ConfigError(
                f"{tool}: not found on this host. Install it, or run without --submit and take it where it is."
            )
    except ConfigError:
        with suppress(OSError):  # not empty, or never made
            (Path(job.config.output_dir) / job.name).rmdir()
        raise
    save(job, launch)
    hint = f"; start it with: {shlex.join(launch.command)}" if launch.shown in launch.files.values() else ""
    print(f"Saved for {job.world} ranks: {job.directory}{hint}", file=sys.stderr, flush=True)
    if submit:
        # DeepSpeed writes MLFLOW* into the remote command line and its log (EXPORT_ENVS, launcher/runner.py).
        kept = {k: v for k, v in os.environ.items() if not (k.startswith("MLFLOW") and re.search(SECRET, k))}
        os.execvpe(tool, list(launch.command), {**kept, **launch.environment})
    print(launch.shown, end="")
