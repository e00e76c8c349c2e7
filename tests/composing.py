"""Composes a RunConfig from conf/ and overrides, as the command line does.

config = compose("zero=stage3", "deepspeed.bf16.enabled=true")
"""

from hydra import compose as hydra_compose
from hydra import initialize_config_dir
from hydra.core.config_store import ConfigStore

from toolkit.config import RunConfig, conf_dir, load, schema


def compose(*overrides: str) -> RunConfig:
    """Dotted keys get ``++``, so that unknown ones reach the toolkit's own check."""
    ConfigStore.instance().store("schema", schema())
    permissive = [f"++{o}" if "." in o.split("=")[0] and not o.startswith(("+", "~")) else o for o in overrides]
    with initialize_config_dir(str(conf_dir()), version_base="1.3"):
        return load(hydra_compose("config", overrides=permissive))
