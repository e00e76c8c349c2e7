"""Launches a recipe as a person would, on ranks of a CPU, with a tiny model unless overrides say otherwise.

result = launch(tmp_path, "zero=stage3", "train.steps=4")       # runs/x is tmp_path/x
result.records                                                  # metrics.jsonl
with start(tmp_path, ranks=2) as job: job.ranks(); job.wait()   # to send signals meanwhile
"""

import atexit
import json
import os
import re
import shlex
import shutil
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import psutil
import pytest
import rank_server

from toolkit.config.compose import compose
from toolkit.config.kinds import KINDS, Kind
from toolkit.config.overrides import values
from toolkit.deepspeed.run_rules import OF_WEIGHTS
from toolkit.job.ranks import free_port

ROOT = Path(__file__).parents[1]
TINY = (
    "experiment=demo",
    "tokenizer.vocab_size=512",
    "model.hidden_size=32",
    "model.num_hidden_layers=2",
    "model.num_attention_heads=2",
    "model.intermediate_size=64",
    "data.max_length=32",
    "data.max_predictions=5",
    "data.workers=0",  # a fork server takes seconds to import what its workers need
    "batch.global_size=16",
    "batch.micro_size=4",
    "train.steps=8",
    "train.log_every=1",
    "train.save_every=4",
    "train.hang_minutes=3",
    "train.eval_samples=64",
    "schedule.warmup=2",
)

NVME = Path("/usr/include/libaio.h").exists()
needs_nvme = pytest.mark.skipif(not NVME, reason="NVMe offload needs libaio-dev, which is not installed")


def layouts(table: Mapping[str, Sequence[str]]) -> list[Any]:
    """The names of ``table`` (name -> overrides) as parameters; what this machine cannot run is skipped."""
    return [pytest.param(n, marks=needs_nvme) if "offload=nvme" in o else n for n, o in table.items()]


def runnable(table: Mapping[str, Sequence[str]]) -> dict[str, Sequence[str]]:
    """What of ``table`` this machine can run."""
    return {n: o for n, o in table.items() if NVME or "offload=nvme" not in o}


@dataclass(frozen=True)
class Result:
    """What a finished launch left: the launcher's exit code and output, and metrics.jsonl."""

    code: int
    stdout: str
    stderr: str
    dir: Path

    @property
    def records(self) -> list[dict[str, Any]]:
        return read(self.dir / "metrics.jsonl")

    @property
    def steps(self) -> list[dict[str, Any]]:
        """The training records: step, loss, grad_norm, lr, …"""
        return [r for r in self.records if "loss" in r]

    @property
    def error(self) -> str:
        """The lines that start with ``error:``."""
        return "\n".join(x for x in self.stderr.splitlines() if x.startswith("error: "))


@dataclass(frozen=True)
class Many:
    """What :func:`launch_many` left: which runs were refused, in the words of each rank; the terminal."""

    errors: dict[str, list[str]]
    stdout: str


class Job:
    """A launch under way, in a session of its own so that all of it can be found and ended."""

    def __init__(self, command: list[str], output: Path, run_dir: Path, forked: int | None = None) -> None:
        """Start ``command``; with ``forked`` it is a recipe and its arguments, for as many ranks of the server."""
        build_ops()
        self.dir, self.output = run_dir, output
        self.process: Forked | subprocess.Popen[bytes]
        with (output / "stdout").open("wb") as out, (output / "stderr").open("wb") as err:
            if forked is not None:
                self.process = Forked(command, forked, out.fileno(), err.fileno())
                return
            self.process = subprocess.Popen(
                command,
                stdout=out,
                stderr=err,
                stdin=subprocess.DEVNULL,
                cwd=ROOT,
                env=os.environ | {"OMP_NUM_THREADS": "1"},  # the same sums under every launcher
                start_new_session=True,
            )

    def wait(self, timeout: float = 240) -> Result:
        """Until the launcher and all ranks have ended; past ``timeout`` seconds all is killed and it is an error."""
        end = time.monotonic() + timeout
        try:
            code = self.process.wait(timeout)
            while self.alive():
                if time.monotonic() > end:
                    raise subprocess.TimeoutExpired(self.process.args, timeout)
                time.sleep(0.1)
        except subprocess.TimeoutExpired:
            self.kill()
            out, err = self._text()
            raise TimeoutError(f"no end after {timeout} s\n{out}\n{err}\n{logs(self.dir)}") from None
        out, err = self._text()
        return Result(code, out, err, self.dir)

    def until(self, condition: Callable[[], Any], what: str, timeout: float = 120, every: float = 0.01) -> None:
        """Wait for ``condition()`` while the job runs."""
        end = time.monotonic() + timeout
        while not condition():
            if self.process.poll() is not None or time.monotonic() > end:
                raise AssertionError(f"{what} did not happen\n{self._text()}\n{logs(self.dir)}")
            time.sleep(every)

    def until_step(self, step: int) -> None:
        """Wait until metrics.jsonl holds ``step``."""
        self.until(lambda: any(r["step"] >= step for r in read(self.dir / "metrics.jsonl")), f"step {step}")

    def processes(self) -> list[psutil.Process]:
        """Everything in the job's session, the launcher's orphans too."""
        return [p for p in psutil.process_iter() if _session(p.pid) == self.process.pid]

    def alive(self) -> list[psutil.Process]:
        found = []
        for process in self.processes():
            with suppress(psutil.NoSuchProcess):
                found += [process] if process.status() != psutil.STATUS_ZOMBIE else []
        return found

    def ranks(self) -> list[psutil.Process]:
        """The processes that train (not the launchers, not the data loaders' workers), in rank order."""
        if isinstance(self.process, Forked):
            return [psutil.Process(rank) for rank in self.process.ranks if psutil.pid_exists(rank)]
        found: dict[int, psutil.Process] = {}
        for process in sorted(self.processes(), key=lambda p: p.pid):
            try:
                rank = process.environ().get("RANK")
                command = process.cmdline()
            except (psutil.NoSuchProcess, psutil.AccessDenied):
                continue
            if rank is not None and any("recipes" in a for a in command) and "--master_port" not in " ".join(command):
                found.setdefault(int(rank), process)  # the lowest pid: workers are forked later
        return [found[r] for r in sorted(found)]

    def kill(self) -> None:
        """SIGKILL to all of the job at once."""
        for _ in range(50):
            alive = self.alive()
            for process in alive:
                with suppress(psutil.NoSuchProcess):
                    process.kill()
            if not alive:
                break
            time.sleep(0.05)
        self.process.wait()

    def _text(self) -> tuple[str, str]:
        out, err = ((self.output / name).read_text(errors="replace") for name in ("stdout", "stderr"))
        return out, err


@contextmanager
def start(
    tmp_path: Path,
    *overrides: str,
    ranks: int = 2,
    launcher: str = "forked",
    recipe: str = "pretrain",
    bare: bool = False,
) -> Iterator[Job]:
    """Start ``recipes/<recipe>.py`` or a file of another path; ``bare``: without the overrides that make a BERT tiny.

    ``forked``: ranks of the warm server, with what a launcher gives them; without a launcher for ``ranks=0``. The
    real ones, ``deepspeed``, ``torchrun`` and plain ``python`` (one rank), take seconds to import.
    """
    arguments = [*_defaults(overrides, bare), f"output_dir={tmp_path}", *overrides]
    name = next(o.split("=")[1] for o in arguments if o.startswith("name="))
    output = Path(tempfile.mkdtemp(prefix="launch-", dir=tmp_path))
    script = recipe if recipe.endswith(".py") else f"recipes/{recipe}.py"
    command, forked = [script, *arguments], launcher == "forked"
    command = command if forked else [*_launcher(launcher, ranks), *command]
    job = Job(command, output, tmp_path / name, ranks if forked else None)
    try:
        yield job
    finally:
        job.kill()


def launch(
    tmp_path: Path,
    *overrides: str,
    ranks: int = 2,
    check: bool = True,
    launcher: str = "forked",
    recipe: str = "pretrain",
    bare: bool = False,
    timeout: float = 240,
) -> Result:
    """Run a recipe to its end. With ``check`` any other exit code than 0 is an assertion error."""
    with start(tmp_path, *overrides, ranks=ranks, launcher=launcher, recipe=recipe, bare=bare) as job:
        result = job.wait(timeout)
    if check:
        assert result.code == 0, f"exit code {result.code}\n{result.stdout}\n{result.stderr}\n{logs(result.dir)}"
    return result


def launch_many(
    output_dir: Path, runs: Mapping[str, Sequence[str]], *, ranks: int = 2, memory: bool = False, bare: bool = False
) -> Many:
    """All ``runs`` (name -> overrides) in one launch; with ``memory`` each leaves a peak.json."""
    overrides = {name: [*_defaults(given, bare), *given] for name, given in runs.items()}
    output_dir.mkdir(parents=True, exist_ok=True)
    output = Path(tempfile.mkdtemp(prefix="launch-", dir=output_dir))
    (output / "runs.json").write_text(json.dumps(overrides))
    command = ["tests/many_runs.py", str(output_dir), str(output / "runs.json"), *(["memory"] if memory else [])]
    job = Job(command, output, output_dir, ranks)
    try:
        result = job.wait(900)
    finally:
        job.kill()
    if result.code:
        newest = max((output_dir / name for name in runs), key=lambda d: d.stat().st_mtime if d.exists() else 0)
        raise AssertionError(f"exit code {result.code}\n{result.stdout}\n{result.stderr}\n{newest}\n{logs(newest)}")
    errors = {name: output_dir / f"{name}.error.json" for name in runs}
    return Many({n: json.loads(p.read_text()) for n, p in errors.items() if p.exists()}, result.stdout)


def python(
    *command: str, ranks: int = 0, cwd: Path = ROOT, env: Mapping[str, str] | None = None
) -> subprocess.CompletedProcess[str]:
    """``python <command>``, a file, -m or -c, in a process that has imported everything: not for what imports are."""
    with tempfile.TemporaryFile() as out, tempfile.TemporaryFile() as err:
        code = Forked(list(command), ranks, out.fileno(), err.fileno(), cwd, env).wait(600)
        for file in (out, err):
            file.seek(0)
        return subprocess.CompletedProcess(command, code, out.read().decode(), err.read().decode())


def toolkit_command(
    *arguments: str, cwd: Path = ROOT, env: Mapping[str, str] | None = None
) -> subprocess.CompletedProcess[str]:
    """``toolkit <arguments>``, in such a process."""
    return python("-m", "toolkit.cli", *arguments, cwd=cwd, env=env)


def typed(line: str, cwd: Path) -> subprocess.CompletedProcess[str]:
    """A command as a reader types it: toolkit and Python on one host in such processes, others in bash."""
    words = shlex.split(line)
    plain = not re.search(r"[$|;&<>]|--multirun| -m |--hostfile", line)
    if plain and words[0] == "toolkit":
        return toolkit_command(*words[1:], cwd=cwd)
    if plain and words[0] == "python":
        return python(*words[1:], cwd=cwd)
    if plain and words[0] in (numbers := {"deepspeed": "--num_gpus", "torchrun": "--nproc_per_node"}):
        script = next(i for i, word in enumerate(words) if word.endswith(".py"))
        options, number = words[1:script], numbers[words[0]]
        ranks = int(options[options.index(number) + 1]) if number in options else 1
        return python(*words[script:], ranks=ranks, cwd=cwd)
    env = os.environ | {"PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"}
    return subprocess.run(["bash", "-c", line], cwd=cwd, env=env, capture_output=True, text=True, check=False)


class Forked:
    """A job of the warm server, with as much of Popen as is used here."""

    def __init__(
        self, command: list[str], ranks: int, out: int, err: int, cwd: Path = ROOT, env: Mapping[str, str] | None = None
    ) -> None:
        self.args = command
        self._answers, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        job = rank_server.Job(command, ranks, free_port(), str(cwd), dict(env or os.environ))
        with theirs:
            socket.send_fds(server(), [job.message()], [theirs.fileno(), out, err])
        started = self._answer(None)
        assert isinstance(started, list), "the server of ranks has ended; its standard error says why"
        self.pid, *self.ranks = started
        self.returncode: int | None = None

    def poll(self) -> int | None:
        with suppress(subprocess.TimeoutExpired):
            self.wait(0)
        return self.returncode

    def wait(self, timeout: float | None = None) -> int:
        if self.returncode is None:
            self.returncode = self._answer(timeout)
        return self.returncode

    def _answer(self, timeout: float | None) -> Any:
        self._answers.settimeout(timeout)
        try:
            answer = self._answers.recv(4096)
        except (TimeoutError, BlockingIOError):
            raise subprocess.TimeoutExpired(self.args, timeout or 0) from None
        return json.loads(answer) if answer else -9  # the leader was killed


@cache
def server() -> socket.socket:
    """Where the warm server takes its jobs; it ends with this process."""
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    with theirs:
        subprocess.Popen(
            [sys.executable, rank_server.__file__, str(theirs.fileno())],
            pass_fds=[theirs.fileno()],
            stdin=subprocess.DEVNULL,
            cwd=ROOT,
            env=os.environ | rank_server.ENVIRONMENT,
            start_new_session=True,
        )
    return ours


@cache
def build_ops() -> None:
    """Compile DeepSpeed's ops once, before the clock of any launch runs."""
    presets = ["zero=stage2", "zero=stage2 offload=cpu", "zero=stage2 offload=cpu optimizer=lion"]
    for overrides in [*presets, "zero=stage3 offload=nvme"] if NVME else presets:
        built = toolkit_command("build-ops", *overrides.split())
        assert built.returncode == 0, built.stderr


def _launcher(kind: str, ranks: int) -> list[str]:
    port = str(free_port())
    first, *rest = {
        "deepspeed": ["deepspeed", "--num_gpus", str(ranks), "--log_level", "error", "--master_port", port],
        "torchrun": ["torchrun", "--nproc-per-node", str(ranks), "--master-port", port],
        "python": ["python"],
    }[kind]
    return [str(Path(sys.executable).parent / first), *rest]


def _defaults(overrides: Sequence[str], bare: bool) -> list[str]:
    given = {o.split("=")[0] for o in overrides}
    none = tuple(o.removesuffix("=none") + "." for o in overrides if o.endswith("=none"))  # no keys for these groups
    defaults = [*(() if bare else TINY), "name=x", f"data.cache_dir={data_cache()}"]
    return read_by(overrides, [o for o in defaults if o.split("=")[0] not in given and not o.startswith(none)])


def read_by(overrides: Sequence[str], defaults: Sequence[str]) -> list[str]:
    """Those of ``defaults`` that have an effect beside ``overrides``: what the kind of task reads, and weights lack."""
    given = values(o for o in overrides if o.startswith(("task", "experiment=", "model.weights=", "tokenizer.path=")))
    kind = KINDS.get(str(given.get("task.kind")), _kind(*(f"{k}={v}" for k, v in given.items() if "." not in k)))
    weights = given.get("model.weights") not in (None, "none")
    own = set(OF_WEIGHTS.split() if weights else ())
    if given.get("tokenizer.path") or (weights and "masks" not in kind.can):
        own.add("tokenizer.vocab_size")
    return [o for o in defaults if (key := o.split("=")[0]) not in own and not kind.ignores(key)]


@cache
def _kind(*options: str) -> Kind:
    return KINDS[compose([*options]).task.kind]


@cache
def data_cache() -> Path:
    """One cache of prepared data for the whole test session; removed at its end."""
    folder = Path(tempfile.mkdtemp(prefix="toolkit-data-"))
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    return folder


def read(path: Path) -> list[dict[str, Any]]:
    """The whole lines of a JSON-lines file that may still be written."""
    text = path.read_text() if path.exists() else ""
    return [json.loads(line) for line in text.splitlines(keepends=True) if line.endswith("\n")]


def logs(run_dir: Path) -> str:
    """The ends of the ranks' logs."""
    return "\n".join(f"--- {p.name}\n{p.read_text(errors='replace')[-3000:]}" for p in run_dir.glob("log.rank*.txt"))


def _session(pid: int) -> int | None:
    try:
        return os.getsid(pid)
    except (ProcessLookupError, PermissionError):
        return None


__all__ = ["Job", "Result", "data_cache", "launch", "logs", "read", "start"]
