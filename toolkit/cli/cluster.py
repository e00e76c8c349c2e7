"""Hosts: whether a configuration runs there, and what starts it.

toolkit doctor offload=nvme --hostfile hosts
toolkit launch recipes/pretrain.py --on slurm
"""

import sys
from pathlib import Path

from toolkit.cli.command import OVERRIDES, Commands, add, console
from toolkit.cluster.launchers import LAUNCHERS
from toolkit.errors import ConfigError


def add_to(commands: Commands) -> None:
    command = add(
        commands, doctor, "check that a configuration runs here, or on the hosts of a hostfile, and say what mends it",
        "toolkit doctor zero=stage3 offload=nvme", "toolkit doctor offload=nvme --hostfile hosts",
        note="Ops, disks, memory, GPUs, hosts, network. Exit code 0: it fits, warnings or not. 2: it does not.",
    )  # fmt: skip
    command.add_argument("overrides", nargs="*", help=OVERRIDES.format("zero=stage3 offload=nvme"))
    command.add_argument("--hostfile", type=Path, help="DeepSpeed's: lines of `host slots=N`")
    command.add_argument("--world", type=int, help="ranks on this host, without a hostfile (default: its GPUs, or 2)")
    command.add_argument("--master-addr", help="the first host's address (default: the first of its `hostname -I`)")
    command.add_argument("--no-build", action="store_true", help="only say which ops are not built")
    command.add_argument("--json", action="store_true", help="a JSON object instead of the table")

    command = add(
        commands, launch, "print what starts a recipe on a cluster (script, command or manifest), or submit it",
        "toolkit launch recipes/pretrain.py --on slurm",
        "toolkit launch recipes/pretrain.py zero=stage3 cluster.hostfile=hosts --on deepspeed --submit",
    )  # fmt: skip
    command.add_argument("recipe", type=Path, help="e.g. recipes/pretrain.py")
    command.add_argument("overrides", nargs="*", help=OVERRIDES.format("zero=stage3 cluster.hostfile=hosts"))
    command.add_argument("--on", required=True, help=", ".join(LAUNCHERS))
    command.add_argument("--submit", action="store_true", help="start it, and pass its exit code on")
    command.add_argument("--out", type=Path, help="where files go (default: <run>/launch; a folder that all nodes see)")


def doctor(
    overrides: list[str], hostfile: Path | None, world: int | None, master_addr: str | None, no_build: bool, json: bool
) -> None:
    from toolkit.cluster.doctor.examine import Host, examine
    from toolkit.cluster.launchers.job import slots
    from toolkit.config.compose import compose

    config = compose(overrides)
    file = hostfile or config.cluster.hostfile
    if file and world is not None:
        raise ConfigError(f"--world {world}: the hostfile's slots say how many ranks there are. Drop --world.")
    named = slots("--hostfile" if hostfile else "cluster.hostfile", Path(file)) if file else {}
    hosts = [Host(*h) for h in named.items()] or [Host("this host", _ranks_here(world), remote=False)]
    told = console(stderr=True, soft_wrap=True)
    report = examine(config, hosts, build=not no_build, address=master_addr, told=lambda x: told.print(x, markup=False))
    if json:
        print(report.as_json())
    else:
        console().print(report.listing(), report.verdict, sep="\n")
    if not report.fits:
        sys.exit(2)


def _ranks_here(given: int | None) -> int:
    """Raises ConfigError."""
    from toolkit.job import ranks

    if given is not None:
        if given < 1:
            raise ConfigError(f"--world {given}: a job has at least one rank.")
        return given
    if ranks.device() != "cuda":
        return 2
    import torch

    return max(1, torch.cuda.device_count())


def launch(recipe: Path, overrides: list[str], on: str, submit: bool, out: Path | None) -> None:
    from toolkit.cluster.launchers.job import start

    start(recipe, overrides, on=on, submit=submit, out=out)
