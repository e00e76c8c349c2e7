"""DeepSpeed's files and ops.

toolkit check ds_config.json --world 8
toolkit build-ops zero=stage2 offload=cpu
"""

import sys
from pathlib import Path

from toolkit.cli.command import OVERRIDES, Commands, add, console
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


def check(file: Path, world: int | None, device: str, model: str | None, parameters: float | None, json: bool) -> None:
    from toolkit.deepspeed.check import as_json, check, told
    from toolkit.plan.shapes import named_shape

    for option, value in (("world", world), ("parameters", parameters)):
        if value is not None and not 1 <= value < float("inf"):
            raise ConfigError(f"--{option} {value}: there is one at least. Leave it out where it is not known.")
    shape = named_shape(model) if model else None
    count = shape.parameters if shape else int(parameters) if parameters else None
    found = check(
        file,
        world=world,
        device=device,
        parameters=count,
        largest=max(p.size for layer in shape.layers for p in layer.parameters if p.trained) if shape else None,
    )
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
