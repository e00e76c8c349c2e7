"""`make demo` itself, a quarter as long: it learns more than how often each word occurs."""

import json
import subprocess
import sys
import time
from pathlib import Path

import pytest
from launching import ROOT

from toolkit.config.compose import compose
from toolkit.data import text


def test_the_demo_learns(tmp_path: Path) -> None:
    if Path(sys.prefix) != ROOT / ".venv":
        pytest.skip("make demo sets up .venv, and these tests run in another environment")
    entropy = text.prepare(compose(["experiment=demo"])).audit["entropy"]["eval_under_train_unigram"]
    start = time.monotonic()
    command = ["make", "demo", f"OVERRIDES=output_dir={tmp_path} name=demo train.steps=300"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    print(done.stdout, f"\n{time.monotonic() - start:.0f} s")
    assert done.returncode == 0, done.stdout + done.stderr
    records = [json.loads(line) for line in (tmp_path / "demo" / "metrics.jsonl").read_text().splitlines()]
    held_out = next(r for r in reversed(records) if "eval_loss" in r)
    assert held_out["eval_mlm_loss"] < entropy - 0.15
