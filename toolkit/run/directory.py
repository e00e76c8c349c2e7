"""The run directory and everything written into it.

run = Run.open(config)          # runs/<name>/, the same on every rank
run.log({"step": 1, "loss": 9})  # one flat line in metrics.jsonl

runs/<name>/  config.yaml  ds_config.json  plan.json  env.json  metrics.jsonl  log.rank0.txt  checkpoints/  export/
"""

import json
import math
import os
import platform
import shutil
import sys
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from rich.console import Console

from toolkit.config.schema import RunConfig
from toolkit.errors import CheckpointError, ConfigError, command
from toolkit.job import fingerprint, ranks
from toolkit.run.files import as_csv, as_json, as_yaml, read_metrics, replace
from toolkit.run.terminal import Terminal


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


def unfinished(config: RunConfig) -> str:
    """A line on the newest run of this very configuration that ended before its last evaluation; empty if none did."""

    def settings(text: str) -> list[str]:
        return [line for line in text.splitlines() if not line.startswith("name:")]

    mine, found = settings(as_yaml(config.model_dump(mode="json"))), []
    for path in Path(config.output_dir).glob("*/config.yaml"):
        with suppress(OSError):  # other people's
            if settings(path.read_text()) == mine and not _running(path.with_name("env.json")):
                last: dict[str, Any] = next(reversed(read_metrics(path.with_name("metrics.jsonl"))), {})
                ended = any(key.startswith("eval_") for key in last)
                if not ended and 0 < (step := last.get("step", 0)) < (config.train.steps or math.inf):
                    found.append((path.stat().st_mtime, path.parent, step))
    if not found:
        return ""
    _, run, step = max(found)
    return f"{run} has the same configuration and ended at step {step}: name={run.name} would go on with it."


def _running(env: Path) -> bool:
    """Whether the process that wrote ``env`` is there; that of another host is taken to be."""
    import psutil

    found = json.loads(env.read_text()) if env.exists() else {}
    return found.get("host") != platform.node() or psutil.pid_exists(found.get("process", 0))


class Run:
    """One run directory. Every rank holds one; only rank 0 writes, and only rank 0 speaks."""

    def __init__(self, directory: Path, config: RunConfig, console: Console) -> None:
        self.dir = directory
        self.config = config
        self.console = console
        self.replica = ranks.replica(stages=config.pipeline.stages, tensor=config.tensor_size)
        self.metrics = directory / "metrics.jsonl"

    @classmethod
    def open(cls, config: RunConfig) -> "Run":
        """Make or reopen the run directory; its name is settled on rank 0."""
        hint = unfinished(config) if ranks.rank() == 0 and config.name is None else ""
        directory = ranks.from_rank0(settled(config) if ranks.rank() == 0 else None)
        if config.name is None and command:
            command.append(f"name={directory.name}")
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
        if hint:
            run.console.print(hint, markup=False, highlight=False)
        run.write_yaml("config.yaml", config.model_dump(mode="json"))
        run.write_json("env.json", environment())
        return run

    def warn(self, line: str) -> None:
        """Say what makes this run's results doubtful, with its figure and the way out."""
        self.console.print(f"Warning: {line}", style="yellow", highlight=False, markup=False)

    def write_text(self, name: str, text: str) -> None:
        """Rank 0 writes ``name`` whole or not at all."""
        if ranks.rank() == 0:
            replace(self.dir / name, text)

    def write_json(self, name: str, tree: Any) -> None:
        self.write_text(name, as_json(tree))

    def write_csv(self, name: str, rows: Sequence[Mapping[str, Any]]) -> None:
        """``rows`` of the same keys, which become the header."""
        self.write_text(name, as_csv(rows))

    def write_yaml(self, name: str, tree: Any) -> None:
        self.write_text(name, as_yaml(tree))

    def write_model(self, config: Any, architecture: str, tokenizer: Path | None = None) -> None:
        """``model/``: a Hugging Face folder but for the weights, which ``toolkit export`` adds."""
        if ranks.rank() == 0:
            folder = self.dir / "model"
            folder.mkdir(exist_ok=True)
            if tokenizer is not None:
                shutil.copytree(tokenizer, folder, dirs_exist_ok=True)
            described = config.to_diff_dict() | {"architectures": [architecture]}
            replace(folder / "config.json", as_json(described))

    def log(self, record: Mapping[str, Any]) -> None:
        """Append one flat record to metrics.jsonl."""
        if ranks.rank() == 0:
            finite = {k: v if not isinstance(v, float) or math.isfinite(v) else None for k, v in record.items()}
            with self.metrics.open("a") as file:
                file.write(json.dumps(finite) + "\n")

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


def environment() -> dict[str, Any]:
    """Versions, code and devices of this run; no environment variables, for they hold secrets."""
    import torch

    commit, status = fingerprint.git("rev-parse", "HEAD"), fingerprint.git("status", "--porcelain")
    return {
        "command": command or sys.argv,
        "devices": [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())] or _cpu(),
        "git": None if commit is None or status is None else {"commit": commit, "modified": bool(status)},
        "host": platform.node(),
        "process": os.getpid(),
        "python": platform.python_version(),
        "started": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
        "versions": fingerprint.versions(),
        "world_size": ranks.world(),
    }


def _cpu() -> list[str]:
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    models = [line.split(":")[1].strip() for line in lines if "model name" in line]
    return [f"{len(models) or os.cpu_count()} x {models[0] if models else 'CPU'}"]


def weights_folder(weights: str) -> str:
    """A run directory stands for its export; anything else is a folder or a hub name."""
    export = Path(weights) / "export"
    if export.is_dir():
        return str(export)
    if (Path(weights) / "metrics.jsonl").exists():
        raise CheckpointError(f"model.weights={weights}: this run has no export yet. Run: toolkit export {weights}")
    return weights
