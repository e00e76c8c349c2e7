"""Hydra's part: the defaults as its base config, overrides let through to our own checks, composition.

config = compose(["zero=stage3", "batch.global_size=64"])     # as a recipe would
"""

import re
from contextlib import nullcontext
from pathlib import Path
from typing import Any

from toolkit.config.schema import RunConfig, conf_dir, load, schema
from toolkit.errors import ConfigError, nearest


def compose(overrides: list[str], model: type[RunConfig] = RunConfig) -> RunConfig:
    """The checked configuration of these command-line overrides. Raises ConfigError."""
    return load(_composed(overrides, model), model)


def options(overrides: list[str]) -> dict[str, str]:
    """Which option of each group these overrides lead to. Raises ConfigError."""
    return dict(_composed(overrides, RunConfig, return_hydra_config=True).hydra.runtime.choices)


def _composed(overrides: list[str], model: type[RunConfig], *, return_hydra_config: bool = False) -> Any:
    from hydra import compose as hydra_compose
    from hydra import initialize_config_dir
    from hydra.core.global_hydra import GlobalHydra
    from hydra.errors import HydraException

    register_schema(model)
    within = GlobalHydra.instance().is_initialized()  # a recipe that composes further runs
    with nullcontext() if within else initialize_config_dir(str(conf_dir()), version_base="1.3"):
        try:
            return hydra_compose("config", permissive(overrides), return_hydra_config=return_hydra_config)
        except HydraException as error:
            raise ConfigError(str(error)) from error


def typed() -> list[str]:
    """The overrides of the command line, which recipes that compose further runs begin from. Raises ConfigError."""
    from hydra.core.hydra_config import HydraConfig

    own = HydraConfig.get()
    places = [s.path for s in own.runtime.config_sources if s.provider == "main"]
    if own.job.config_name != "config" or any(Path(p) != conf_dir() for p in places):
        raise ConfigError("a saved config: this recipe starts further runs from overrides. Give those it was run with.")
    return list(own.overrides.task)


def register_schema(model: type[RunConfig] = RunConfig) -> None:
    """Give Hydra the defaults (schema.py, and a recipe's own node) as the base of the composition."""
    from hydra.core.config_store import ConfigStore

    ConfigStore.instance().store("schema", schema(model))


def permissive(arguments: list[str]) -> list[str]:
    """Let every key through Hydra (``a.b=1`` as ``++a.b=1``), so that one place judges keys: ours.

    Hydra refuses keys that no option mentions yet, which would bar valid DeepSpeed keys, and names no
    nearest key for a typo. The options of a group are checked here for the same reason.
    """
    return [_permissive(a) for a in arguments]


def _permissive(argument: str) -> str:
    match = re.match(r"([A-Za-z_][\w./]*)=(.*)$", argument, re.DOTALL)
    if not match or match[1].startswith("hydra"):
        return argument
    key, value = match.groups()
    folder = conf_dir() / key
    if "." in key or not folder.is_dir():
        return f"++{argument}"
    options = sorted(f.relative_to(folder).with_suffix("").as_posix() for f in folder.rglob("*.yaml"))
    for option in value.strip("[]").split(","):
        if option.strip() not in options:
            hint = nearest(option, options)
            raise ConfigError(f"{argument}: no such option.{hint} {key} has: {', '.join(options)}.")
    return argument
