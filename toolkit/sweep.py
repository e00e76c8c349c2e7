"""A --multirun: every combination a training of its own; what fails is recorded, and the same command goes on.

    python recipes/pretrain.py --multirun seed=1,2,3                                # one after another
    deepspeed recipes/pretrain.py --multirun zero=stage1,stage2                     # each on all ranks of the launch
    python recipes/pretrain.py --multirun hydra/launcher=submitit_slurm \\
        hydra.launcher.tasks_per_node=8 hydra.launcher.gpus_per_node=8 seed=1,2,3   # each a Slurm job, a rank a task

A job is named by its overrides, so that started again it resumes its checkpoints; one that is done is left out.
``<output_dir>/sweep`` (or hydra.sweep.dir) holds a file for each job, and the table of them all, sweep.csv.
"""

import csv
import hashlib
import io
import json
import os
import platform
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from hydra.experimental.callback import Callback

from toolkit.errors import ConfigError, OutOfMemory
from toolkit.run import replace
from toolkit.watchdog import LOST

KILLED = "killed (out of memory?)"
STATES = {0: "done", ConfigError.code: "refused", OutOfMemory.code: "out of memory", LOST: "lost", 75: "stopped"}


def job(script: str, given: list[str], folder: Path, number: int) -> None:
    """One training, in a process of its own: no state of one reaches the next. Ranks of one launch each call it."""
    overrides = [o.lstrip("+") for o in given]
    name, key = _named(overrides)
    record = folder / "jobs" / f"{key}.json"
    told = " ".join(overrides)
    found = json.loads(record.read_text()) if record.exists() else {}
    if found.get("state") == "done":
        _say(f"--- {told}\ndone before, in {found['run']}")
        _write(record, found | {"number": number})
        return
    _say(f"--- {told}")
    mine = {"number": number, "overrides": overrides, "run": name, "host": platform.node(), "state": "running"}
    _write(record, mine)
    start = time.monotonic()
    arguments = [o for o in overrides if not o.startswith("name=")]
    code = subprocess.run([sys.executable, script, *arguments, f"name={name}"], check=False).returncode
    state = STATES.get(code, KILLED if code == -signal.SIGKILL else "failed")
    _write(record, mine | {"state": state, "code": code, "seconds": round(time.monotonic() - start, 1)})
    if state == "stopped":
        sys.exit(code)
    if code:
        _say(f"{state}: exit code {code}; the sweep goes on")


class Begin(Callback):  # type: ignore[misc]
    """Hydra calls it where a sweep is started from."""

    folder: Path | None = None
    since = 0.0

    def on_multirun_start(self, config: Any, **_: Any) -> None:
        Begin.folder, Begin.since = Path(config.hydra.sweep.dir), time.time()


def finish() -> int:
    """Write sweep.csv of the jobs of this sweep and say what became of them; how many are not done."""
    if Begin.folder is None or not _first():
        return 0
    files = [p for p in (Begin.folder / "jobs").glob("*.json") if p.stat().st_mtime >= Begin.since]
    records = sorted((json.loads(p.read_text()) for p in files), key=lambda r: r["number"])
    common = set.intersection(*(set(r["overrides"]) for r in records)) if len(records) > 1 else set()
    for record in records:
        record["overrides"] = " ".join(o for o in record["overrides"] if o not in common)
    text = io.StringIO()
    columns = ("number", "state", "code", "seconds", "host", "run", "overrides")
    writer = csv.DictWriter(text, columns, restval="")
    writer.writeheader()
    writer.writerows(records)
    replace(Begin.folder / "sweep.csv", text.getvalue())
    wrong = [r for r in records if r["state"] != "done"]
    print(f"{len(records) - len(wrong)} of {len(records)} jobs done: {Begin.folder / 'sweep.csv'}")
    for record in wrong:
        print(f"{record['state']}: {record['overrides']}")
    if wrong:
        print("Start the same command again to run these again, from their checkpoints.")
    return len(wrong)


def _named(overrides: list[str]) -> tuple[str, str]:
    """The run's name and the record's: what is the same however often the sweep is started."""
    key = hashlib.sha256(json.dumps(sorted(overrides)).encode()).hexdigest()[:8]
    given = [o.removeprefix("name=") for o in overrides if o.startswith("name=")]
    return f"{given[-1] if given else 'sweep'}-{key}", key


def _first() -> bool:
    """Ranks of one launch, tasks of one Slurm job: only one of them writes and speaks."""
    return os.environ.get("RANK", os.environ.get("SLURM_PROCID", "0")) == "0"


def _say(text: str) -> None:
    if _first():
        print(text, flush=True)


def _write(path: Path, record: dict[str, Any]) -> None:
    if _first():
        path.parent.mkdir(parents=True, exist_ok=True)
        replace(path, json.dumps(record, indent=2) + "\n")
