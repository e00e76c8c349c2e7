"""The DeepSpeed JSON of every preset, completed for two ranks, as it was last looked at.

UPDATE_GOLDEN=1 pytest tests/test_golden.py     # after a wanted change; then read the diff
"""

import json
import os
from pathlib import Path

import pytest

from toolkit.config.compose import compose
from toolkit.config.schema import conf_dir
from toolkit.deepspeed.ds_config import complete

GOLDEN = Path(__file__).parent / "golden"
# What a preset needs beside it to be legal on its own.
COMPANIONS = {
    "offload=cpu_params": ["zero=stage3"],
    "offload=nvme": ["zero=stage3"],
    "optimizer=lamb": ["zero=stage0"],
    "parallel=features": ["task=linear"],
}
PRESETS = [
    f"{group}={path.stem}"
    for group in ("zero", "offload", "parallel", "precision", "optimizer", "experiment")
    for path in sorted((conf_dir() / group).glob("*.yaml"))
]


@pytest.mark.parametrize("preset", PRESETS)
def test_a_preset_gives_the_deepspeed_json_that_was_looked_at(preset: str) -> None:
    config = compose([preset, *COMPANIONS.get(preset, [])])
    ds = complete(config, world=2, device="cuda", run_dir=Path("runs/golden"))
    text = json.dumps(ds, indent=2, sort_keys=True) + "\n"
    file = GOLDEN / f"{preset.replace('=', '_')}.json"
    if os.environ.get("UPDATE_GOLDEN"):
        file.write_text(text)
    assert text == file.read_text(), f"{file.name} differs: UPDATE_GOLDEN=1 pytest tests/test_golden.py rewrites it"


def test_no_golden_file_is_left_over_from_a_preset_that_is_gone() -> None:
    assert {p.stem for p in GOLDEN.glob("*_*.json")} >= {p.replace("=", "_") for p in PRESETS}
