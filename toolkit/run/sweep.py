"""Several trainings, one after another: each has a record of how it went, and the same command goes on where it ended.

    python recipes/pretrain.py --multirun seed=1,2,3                                # one after another
    deepspeed recipes/pretrain.py --multirun zero=stage1,stage2                     # each on all ranks of the launch
    python recipes/pretrain.py --multirun hydra/launcher=submitit_slurm \\
        hydra.launcher.tasks_per_node=8 hydra.launcher.gpus_per_node=8 seed=1,2,3   # each a Slurm job, a rank a task

A job of a --multirun is a process of its own, named by its overrides; what fails is recorded, and the others are run.
``<output_dir>/sweep`` (or hydra.sweep.dir) holds a record for each, and sweep.csv. What starts further runs itself
(seeds, tasks of GLUE, numbers of ranks) keeps the record in the directory of each, job.json.
"""

import hashlib
import json
import os
import platform
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from hydra.core.hydra_config import HydraConfig
from hydra.experimental.callback import Callback
from omegaconf import OmegaConf

from toolkit.config.overrides import parse, values
from toolkit.errors import BUG, LOST, OutOfMemory, Stopped, ToolkitError
from toolkit.run.files import as_csv, as_json, replace

STATES = {
    0: "done", ToolkitError.code: "refused", OutOfMemory.code: "out of memory", LOST: "lost", Stopped.code: "stopped",
    -signal.SIGKILL: "killed (out of memory?)",
}  # fmt: skip


def read(record: Path) -> dict[str, Any]:
    """How a training went, and of which configuration (its fingerprint); {} if it was never begun."""
    found: dict[str, Any] = json.loads(record.read_text()) if record.exists() else {}
    return found


def done(found: dict[str, Any], config: str | None = None) -> bool:
    return found.get("state") == "done" and found.get("config") == config


@contextmanager
def recorded(record: Path, about: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """Write ``about`` and how the body ends to ``record``: by its error, or by the exit code that it puts in."""
    found = about | {"host": platform.node(), "state": "running"}
    _write(record, found)
    start = time.monotonic()
    try:
        yield found
        found.setdefault("code", 0)
    except BaseException as error:
        found["code"] = getattr(error, "code", BUG)
        raise
    finally:
        state = STATES.get(found["code"], "failed")
        _write(record, found | {"state": state, "seconds": round(time.monotonic() - start, 1)})


def job(script: str) -> None:
    """The job of a --multirun that Hydra is at: no state of one reaches the next. Ranks of one launch each call it.

    A signal lets the training save before it is answered.
    """
    hydra = HydraConfig.get()
    mark = {"number": hydra.job.num, "sweep": hydra.callbacks.sweep.started}
    task: Any = OmegaConf.to_container(hydra.overrides.task, resolve=False)  # ${…} is of the configuration
    overrides = [o.lstrip("+") for o in task]
    key = hashlib.sha256(json.dumps(sorted(overrides)).encode()).hexdigest()[:8]  # the same whenever it is started
    name = f"{values(overrides).get('name') or 'sweep'}-{key}"
    record = Path(hydra.sweep.dir) / "jobs" / f"{key}.json"
    _say(f"--- {' '.join(overrides)}")
    if done(found := read(record)):
        _say(f"done before, in {found['run']}")
        _write(record, found | mark)
        return
    own = os.environ.get("SUBMITIT_EXECUTOR") == "slurm"  # not the allocation that all of the sweep runs in
    slurm = os.environ.get("SLURM_ARRAY_JOB_ID", os.environ.get("SLURM_JOB_ID")) if own else None
    arguments = [o for o in overrides if parse(o).key_or_group != "name"]
    with recorded(record, {"overrides": overrides, "run": name, "slurm": slurm} | mark) as found:
        code, received = _run([sys.executable, script, *arguments, f"name={name}"])
        found["code"] = code
    for number in received[:1]:
        os.kill(os.getpid(), number)  # as if it came now: submitit queues the job again, Ctrl-C ends the sweep
    if code == Stopped.code:
        sys.exit(code)
    if code:
        _say(f"{STATES.get(code, 'failed')}: exit code {code}; the sweep goes on")


def _run(command: list[str]) -> tuple[int, list[int]]:
    """The exit code, and the signals that came meanwhile: they are passed on as SIGTERM, for which ranks save."""
    received: list[int] = []
    with subprocess.Popen(command) as process:

        def stop(number: int, _: Any) -> None:
            received.append(number)
            process.terminate()

        before = {s: signal.signal(s, stop) for s in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR2)}
        code = process.wait()
    for number, handler in before.items():
        signal.signal(number, handler)
    return code, received


class Begin(Callback):  # type: ignore[misc]
    """Hydra calls it where a sweep is started from."""

    folder: Path | None = None
    started = 0

    def __init__(self, started: int) -> None:
        Begin.started = started

    def on_multirun_start(self, config: Any, **_: Any) -> None:
        Begin.folder = Path(config.hydra.sweep.dir)


def finish(wait: bool = True) -> int:
    """Write sweep.csv of the jobs of this sweep and say what became of them; how many are not done.

    ``wait`` for those of Slurm's that still are to run: Hydra ends at the first that left no result.
    """
    if Begin.folder is None or not _first():
        return 0
    slurm = {str(r["slurm"]) for r in _records(Begin.folder, Begin.started) if r.get("slurm")}
    while wait and slurm and _queued(slurm):
        time.sleep(2)
    records = _records(Begin.folder, Begin.started)
    common = set.intersection(*(set(r["overrides"]) for r in records)) if len(records) > 1 else set()
    for record in records:
        if wait and record["state"] == "running" and record["slurm"]:
            record["state"] = "ended by Slurm (memory, time or host)"
        record["overrides"] = " ".join(o for o in record["overrides"] if o not in common)
    columns = ("number", "state", "code", "seconds", "host", "run", "overrides")
    replace(Begin.folder / "sweep.csv", as_csv(records, columns))
    wrong = [r for r in records if r["state"] != "done"]
    print(f"{len(records) - len(wrong)} of {len(records)} jobs done: {Begin.folder / 'sweep.csv'}")
    for record in wrong:
        print(f"{record['state']}: {record['overrides']}")
    if wrong:
        print("Start the same command again to run these again, from their checkpoints.")
    return len(wrong)


def _records(folder: Path, started: int) -> list[dict[str, Any]]:
    found = map(read, (folder / "jobs").glob("*.json"))
    return sorted((r for r in found if r["sweep"] == started), key=lambda r: r["number"])


def _queued(jobs: set[str]) -> bool:
    """Whether Slurm still has any of these to run; False where it does not answer."""
    command = ["squeue", "--noheader", "--format=%i", f"--jobs={','.join(jobs)}"]
    return bool(subprocess.run(command, capture_output=True, text=True, check=False).stdout.strip())


def _first() -> bool:
    """Ranks of one launch, tasks of one Slurm job: only one of them writes and speaks."""
    return os.environ.get("RANK", os.environ.get("SLURM_PROCID", "0")) == "0"


def _say(text: str) -> None:
    if _first():
        print(text, flush=True)


def _write(path: Path, record: dict[str, Any]) -> None:
    if _first():
        path.parent.mkdir(parents=True, exist_ok=True)
        replace(path, as_json(record))
