"""Hydra's part: the defaults as its base config, and composition.

config = compose(["zero=stage3", "batch.global_size=64"])                  # as a recipe would
rebased(config, compose(["zero=stage3"]), compose(["zero=stage1"]))        # the same, at another stage
"""

from typing import Any

from toolkit.config.overrides import keys, permissive, told
from toolkit.config.schema import RunConfig, conf_dir, load, schema
from toolkit.errors import ConfigError

_schemas: dict[type[RunConfig], Any] = {}  # Hydra's node of each


def compose(overrides: list[str], model: type[RunConfig] = RunConfig) -> RunConfig:
    """The checked configuration of these command-line overrides. Raises ConfigError."""
    return load(_composed(overrides, model), model, keys(overrides))


def options(overrides: list[str]) -> dict[str, str]:
    """Which option of each group these overrides lead to. Raises ConfigError."""
    return dict(_composed(overrides, RunConfig, return_hydra_config=True).hydra.runtime.choices)


def rebased(config: RunConfig, before: RunConfig, after: RunConfig) -> RunConfig:
    """``after`` with all that ``config`` has changed of ``before``: its own settings on other presets.

    What a saved configuration was composed of is not known; what differs from its presets is.
    """
    trees = (one.model_dump(mode="json") for one in (after, before, config))
    return load(changed(*trees), type(config))


def changed(tree: Any, before: Any, after: Any) -> Any:
    """``tree`` with what differs between the other two."""
    if not all(isinstance(one, dict) for one in (tree, before, after)):
        return tree if before == after else after
    kept = [k for k in tree | after if k in (tree if before.get(k) == after.get(k) else after)]
    return {k: changed(tree.get(k), before.get(k), after.get(k)) for k in kept}


def register_schema(model: type[RunConfig] = RunConfig) -> None:
    """Give Hydra the defaults (schema.py, and a recipe's own node) as the base of the composition."""
    from hydra.core.config_store import ConfigStore

    store = ConfigStore.instance()
    if model not in _schemas:  # to build one is a fifth of a composition
        store.store("schema", schema(model))
        _schemas[model] = store.repo["schema.yaml"]
    store.repo["schema.yaml"] = _schemas[model]


def _composed(overrides: list[str], model: type[RunConfig], *, return_hydra_config: bool = False) -> Any:
    """From our own folder of groups, whichever config the recipe around us was started from."""
    from hydra import compose as hydra_compose
    from hydra import initialize_config_dir
    from hydra.core.global_hydra import GlobalHydra
    from hydra.errors import HydraException
    from hydra.initialize import get_gh_backup, restore_gh_from_backup

    given = permissive(overrides, sweep=False)
    register_schema(model)
    around = get_gh_backup()
    GlobalHydra.instance().clear()
    try:
        with initialize_config_dir(str(conf_dir()), version_base="1.3"):
            return hydra_compose("config", given, return_hydra_config=return_hydra_config)
    except HydraException as error:
        raise ConfigError(told(error)) from error
    finally:
        restore_gh_from_backup(around)
