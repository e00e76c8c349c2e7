"""compose("zero=stage3", "deepspeed.bf16.enabled=true") as the command line composes it."""

from toolkit.config import compose as hydra_part
from toolkit.config.schema import RunConfig


def compose(*overrides: str) -> RunConfig:
    return hydra_part.compose(list(overrides))
