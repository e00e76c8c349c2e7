"""The run directory and everything written into it; the terminal and the log files.

run = Run.open(config)          # runs/<name>/, the same on every rank
run.log({"step": 1, "loss": 9})  # one flat line in metrics.jsonl

runs/<name>/  config.yaml  ds_config.json  plan.json  env.json  metrics.jsonl  log.rank0.txt  checkpoints/  export/
"""

import csv
import io
import json
import logging
import math
import os
import shutil
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from types import TracebackType
from typing import Any

from rich.console import Console

from toolkit.config.schema import RunConfig
from toolkit.deepspeed import ds_config
from toolkit.errors import CheckpointError, ConfigError, ToolkitError
from toolkit.job import fingerprint, ranks
from toolkit.plan.plan import Plan


class Terminal:
    """Keeps the terminal for rank 0's own words; all other output of this process goes to its log.

    Redirects the file descriptors, not sys.stdout: DeepSpeed's C++ code prints too. What is printed
    before the run directory exists is spooled and then copied to the head of the log.
    """

    current: "Terminal | None" = None

    def __init__(self, *, quiet: bool = True) -> None:
        self.quiet = quiet
        self.console = Console(quiet=ranks.rank() != 0, soft_wrap=True)

    def __enter__(self) -> "Terminal":
        Terminal.current = self
        if self.quiet:
            self._saved = (os.dup(1), os.dup(2))
            out = os.fdopen(os.dup(1), "w", buffering=1)
            self.console = Console(file=out, quiet=ranks.rank() != 0, soft_wrap=True)
            self._spool = tempfile.TemporaryFile()
            self._redirect(self._spool.fileno())
            logging.captureWarnings(True)
            logging.basicConfig(format="%(asctime)s %(name)s %(levelname)s %(message)s", stream=sys.stderr)
        return self

    def log_to(self, path: Path) -> None:
        """Send this process's output to ``path``, beginning with what was spooled."""
        if not self.quiet:
            return
        _flush()
        self._spool.seek(0)
        with path.open("ab") as log:
            shutil.copyfileobj(self._spool, log)
            log.flush()
            self._redirect(log.fileno())

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        Terminal.current = None
        if not self.quiet:
            return
        bug = error is not None and not isinstance(error, ToolkitError | SystemExit)
        if bug:
            traceback.print_exception(error)  # into the log; the caller shows it on the terminal
        _flush()
        for number, saved in zip((1, 2), self._saved, strict=True):
            os.dup2(saved, number)
            os.close(saved)
        self._spool.close()

    def say(self, text: str) -> None:
        """An error on the real standard error, from any thread; the process may end right after."""
        lines = "".join(f"error: {line}\n" for line in text.splitlines())
        with suppress(OSError):  # the terminal may be given back just now
            os.write(self._saved[1] if self.quiet else 2, lines.encode())

    @staticmethod
    def _redirect(target: int) -> None:
        _flush()
        os.dup2(target, 1)
        os.dup2(target, 2)


def _flush() -> None:
    sys.stdout.flush()
    sys.stderr.flush()


def settled(config: RunConfig) -> Path:
    """The run's directory: as named, or made for it alone, however many start in the same second."""
    folder = Path(config.output_dir)
    if config.name:
        return folder / config.name
    folder.mkdir(parents=True, exist_ok=True)
    stamp = f"{config.task.name}-{time.strftime('%Y%m%d-%H%M%S')}"
    for name in (stamp, *(f"{stamp}-{i}" for i in range(2, 100))):
        with suppress(FileExistsError):
            (folder / name).mkdir()
            return folder / name
    raise ConfigError(f"output_dir={folder}: a hundred runs named {stamp}. Give this one a name=….")


class Run:
    """One run directory. Every rank holds one; only rank 0 writes, and only rank 0 speaks."""

    def __init__(self, directory: Path, config: RunConfig, console: Console) -> None:
        self.dir = directory
        self.config = config
        self.console = console
        self.replica = ranks.replica(stages=config.pipeline.stages, tensor=config.tensor_size)
        self.monitor: Any = None  # DeepSpeed's MonitorMaster, once the engine has one
        self.notes: dict[str, float] = {}  # numbers to show beside the held-out results
        self.plan: Plan | None = None  # on rank 0, where there can be one
        self.resident_gib: float | None = None  # of this process before the model, where its peak was then forgotten
        self.metrics = directory / "metrics.jsonl"
        self.steps = config.train.steps or 0  # optimizer steps of the whole run, once lasts() is called
        self.epoch_steps: int | None = None

    def lasts(self, steps_of: Callable[[float], int]) -> None:
        """Settle how many steps the run has: a task says how many optimizer steps so many epochs are."""
        train = self.config.train
        self.epoch_steps = steps_of(1)
        by_epochs = train.epochs and steps_of(train.epochs)
        self.steps = min(n for n in (train.steps, by_epochs) if n)
        if self.config.schedule.name != "none" and self.config.schedule.warmup > self.steps:
            raise ConfigError(
                f"schedule.warmup={self.config.schedule.warmup:g} steps is above the {self.steps} steps of this "
                "run: the rate would never be reached. Lower it; below 1 it is a share of the steps."
            )
        reason = f"train.epochs={train.epochs:g}" if self.steps == by_epochs else f"train.steps={train.steps}"
        self.console.print(f"{self.steps:,} steps ({reason}), {self.epoch_steps:,} an epoch.", highlight=False)

    @property
    def eval_every(self) -> int | None:
        every = self.config.train.eval_every
        return self.epoch_steps if every == "epoch" else every  # with batch.tokens later epochs differ by a step or so

    def deepspeed(self, vocab_size: int) -> dict[str, Any]:
        """Exactly what DeepSpeed gets."""
        return ds_config.complete(
            self.config,
            world=ranks.world(),
            device=ranks.device(),
            vocab_size=vocab_size,
            run_dir=self.dir,
        )

    @classmethod
    def open(cls, config: RunConfig) -> "Run":
        """Make or reopen the run directory; its name is settled on rank 0."""
        directory = ranks.from_rank0(settled(config) if ranks.rank() == 0 else None)
        config = config.model_copy(update={"name": directory.name})
        if config.resume == "never" and (directory / "metrics.jsonl").exists():
            raise ConfigError(
                f"resume=never with name={directory.name}: {directory} already holds a run. "
                "Choose another name, remove the directory, or use resume=auto to go on with it."
            )
        directory.mkdir(parents=True, exist_ok=True)
        terminal = Terminal.current or Terminal(quiet=False)
        terminal.log_to(directory / f"log.rank{ranks.rank()}.txt")
        run = cls(directory, config, terminal.console)
        run.write_yaml("config.yaml", config.model_dump(mode="json"))
        run.write_json("env.json", environment())
        return run

    def write_text(self, name: str, text: str) -> None:
        """Rank 0 writes ``name`` whole or not at all."""
        if ranks.rank() == 0:
            replace(self.dir / name, text)

    def write_json(self, name: str, tree: Any) -> None:
        self.write_text(name, json.dumps(tree, indent=2, sort_keys=True) + "\n")

    def write_csv(self, name: str, rows: Sequence[Mapping[str, Any]]) -> None:
        """``rows`` of the same keys, which become the header."""
        text = io.StringIO()
        writer = csv.DictWriter(text, list(rows[0]) if rows else [])
        writer.writeheader()
        writer.writerows(rows)
        self.write_text(name, text.getvalue())

    def write_yaml(self, name: str, tree: Any) -> None:
        from omegaconf import OmegaConf

        self.write_text(name, OmegaConf.to_yaml(OmegaConf.create(tree)))

    def write_model(self, config: Any, architecture: str, tokenizer: Path | None = None) -> None:
        """``model/``: a Hugging Face folder but for the weights, which ``toolkit export`` adds."""
        if ranks.rank() == 0:
            folder = self.dir / "model"
            folder.mkdir(exist_ok=True)
            if tokenizer is not None:
                shutil.copytree(tokenizer, folder, dirs_exist_ok=True)
            described = config.to_diff_dict() | {"architectures": [architecture]}
            replace(folder / "config.json", json.dumps(described, indent=2, sort_keys=True) + "\n")

    def log(self, record: Mapping[str, Any]) -> None:
        """Append one flat record to metrics.jsonl and to DeepSpeed's monitors."""
        if ranks.rank() != 0:
            return
        finite = {k: v if not isinstance(v, float) or math.isfinite(v) else None for k, v in record.items()}
        with self.metrics.open("a") as file:
            file.write(json.dumps(finite) + "\n")
        if self.monitor is not None and self.monitor.enabled:
            step = record["step"]
            numbers = {k: v for k, v in finite.items() if isinstance(v, int | float) and k != "step"}
            self.monitor.write_events([(f"toolkit/{key}", value, step) for key, value in numbers.items()])

    def records(self) -> list[dict[str, Any]]:
        """What metrics.jsonl holds; a last line cut off by a kill is left out."""
        return read_metrics(self.metrics)

    def rewind(self, step: int) -> None:
        """Forget what came after the checkpoint of ``step``: the run goes on from there and writes it again."""
        if ranks.rank() == 0 and self.metrics.exists():
            kept = [r for r in self.records() if r.get("step", 0) <= step]
            saved = [i for i, r in enumerate(kept) if "checkpoint" in r and r["step"] == step]
            kept = kept[: saved[-1] + 1] if saved else kept
            replace(self.metrics, "".join(json.dumps(r) + "\n" for r in kept))


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """The records of a metrics.jsonl, in order; [] if there is none."""
    records = []
    for line in path.read_text().splitlines() if path.exists() else []:
        try:
            records.append(json.loads(line))
        except json.JSONDecodeError:
            break  # only the last line can be cut: lines are appended whole
    return records


def weights_folder(weights: str) -> str:
    """A run directory stands for its export; anything else is a folder or a hub name."""
    export = Path(weights) / "export"
    if export.is_dir():
        return str(export)
    if (Path(weights) / "metrics.jsonl").exists():
        raise CheckpointError(f"model.weights={weights}: this run has no export yet. Run: toolkit export {weights}")
    return weights


def replace(path: Path, text: str) -> None:
    """Write ``path`` under a temporary name, sync it to the disk and rename it."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    with temporary.open("w") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    temporary.replace(path)


def environment() -> dict[str, Any]:
    """Versions, code and devices of this run; no environment variables, for they hold secrets."""
    import platform
    from importlib.metadata import version

    import torch

    packages = ("torch", "deepspeed", "transformers", "datasets", "tokenizers", "hydra-core", "pydantic")
    return {
        "command": sys.argv,
        "devices": [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())] or _cpu(),
        "git": _git(),
        "host": platform.node(),
        "python": platform.python_version(),
        "started": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
        "versions": {name: version(name) for name in packages},
        "world_size": ranks.world(),
    }


def _cpu() -> list[str]:
    info = Path("/proc/cpuinfo")
    models = (
        [line.split(":")[1].strip() for line in info.read_text().splitlines() if "model name" in line]
        if info.exists()
        else []
    )
    return [f"{len(models) or os.cpu_count()} x {models[0] if models else 'CPU'}"]


def _git() -> dict[str, Any] | None:
    commit, status = fingerprint.git("rev-parse", "HEAD"), fingerprint.git("status", "--porcelain")
    return None if commit is None or status is None else {"commit": commit, "modified": bool(status)}
