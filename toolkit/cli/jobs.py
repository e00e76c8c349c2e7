"""Before a job: DeepSpeed's files and ops, whether a configuration runs on the hosts, and what starts it there.

toolkit check ds_config.json --world 8
toolkit build-ops zero=stage2 offload=cpu
toolkit doctor offload=nvme --hostfile hosts
toolkit launch recipes/pretrain.py --on slurm
"""

import sys
from pathlib import Path

from toolkit.cli import OVERRIDES, Commands, add, console
from toolkit.cluster.launchers import LAUNCHERS
from toolkit.errors import ConfigError


def add_to(commands: Commands) -> None:
    command = add(
        commands, check, "what is wrong with a DeepSpeed JSON file, of whatever project, line by line",
        "toolkit check ds_config.json --world 8", "toolkit check ds_config.json --parameters 7e9 --json",
        note="Exit code 0: nothing wrong, notes or not. 2: DeepSpeed would refuse the file, or do otherwise.",
    )  # fmt: skip
    command.add_argument("file", type=Path, help="e.g. ds_config.json")
    command.add_argument("--world", type=int, help="all ranks, by pipe stages if there are any (default: unknown)")
    command.add_argument("--device", choices=("cuda", "cpu"), default="cuda", help="to train on (default: cuda)")
    size = command.add_mutually_exclusive_group()
    size.add_argument("--model", help="a preset of conf/model or a local Hugging Face folder, for its size")
    size.add_argument("--parameters", type=float, help="of the model, e.g. 7e9")
    command.add_argument("--json", action="store_true", help="a JSON object instead of lines")

    command = add(
        commands, build_ops, "build DeepSpeed's C++ ops that a configuration needs, ahead of the first run",
        "toolkit build-ops zero=stage2 offload=cpu", "toolkit build-ops --all      # for an image",
    )  # fmt: skip
    command.add_argument("overrides", nargs="*", help=OVERRIDES.format("offload=cpu"))
    command.add_argument("--world", type=int, default=2, help="ranks the job will have (default: 2)")
    command.add_argument("--all", action="store_true", help="all that the presets can need, for an image")

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


def check(file: Path, world: int | None, device: str, model: str | None, parameters: float | None, json: bool) -> None:
    from toolkit.deepspeed.check import as_json, check, told
    from toolkit.plan.shapes import named_shape

    for option, value in (("world", world), ("parameters", parameters)):
        if value is not None and not 1 <= value < float("inf"):
            raise ConfigError(f"--{option} {value}: there is one at least. Leave it out where it is not known.")
    count, largest = int(parameters) if parameters else None, None
    if model:
        shape = named_shape(model)
        count = shape.parameters
        largest = max(p.size for layer in shape.layers for p in layer.parameters if p.trained)
    found = check(file, world=world, device=device, parameters=count, largest=largest)
    print(as_json(file, found) if json else "\n".join(told(file, found)))
    if any(f.level == "problem" for f in found):
        sys.exit(2)


def build_ops(overrides: list[str], world: int, all: bool) -> None:
    from toolkit.config.compose import compose
    from toolkit.deepspeed import ds_config
    from toolkit.job import ops, ranks

    if all and overrides:
        raise ConfigError(f"--all with {' '.join(overrides)}: all ops are for every configuration. Leave one out.")
    config, device = compose(overrides), ranks.device()
    ds = ds_config.complete(config, world=world, device=device)
    builders = ds_config.every_op(device) if all else ds_config.required_ops(ds, device=device, world=world)
    ops.ensure(builders, console())
    print(f"Ready in {ops.prebuilt() or ops.directory()}: {', '.join(builders)}")


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
    if not named and world is not None and world < 1:
        raise ConfigError(f"--world {world}: a job has at least one rank.")
    hosts = [Host(*h) for h in named.items()] or [Host("this host", world or _devices(), remote=False)]
    told = console(stderr=True, soft_wrap=True)
    report = examine(config, hosts, build=not no_build, address=master_addr, told=lambda x: told.print(x, markup=False))
    if json:
        print(report.as_json())
    else:
        console().print(report.listing(), report.verdict, sep="\n")
    if not report.fits:
        sys.exit(2)


def _devices() -> int:
    """This host's GPUs, or 2 ranks on its CPUs."""
    from toolkit.job import ranks

    if ranks.device() != "cuda":
        return 2
    import torch

    return max(1, torch.cuda.device_count())


def launch(recipe: Path, overrides: list[str], on: str, submit: bool, out: Path | None) -> None:
    from toolkit.cluster.launchers.job import start

    start(recipe, overrides, on=on, submit=submit, out=out)
