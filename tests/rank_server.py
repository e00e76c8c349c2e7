"""A process that has imported everything and forks the ranks of jobs: an import takes longer than a test's training.

    python tests/rank_server.py <descriptor of a socket>          # launching.py starts it, once a session, when needed

A job is one message, Job as JSON, with three descriptors: where to answer, standard output, standard error. A leader
with a session of its own forks the ranks, answers with all process ids, ends the ranks as DeepSpeed's launcher does
and answers with the exit code. The recipe's file runs in every rank as a launcher would run it.
"""

import atexit
import contextlib
import functools
import gc
import importlib
import json
import os
import pkgutil
import runpy
import signal
import socket
import sys
import threading
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import NoReturn

PACKAGES = ("toolkit", "studies")  # all of their modules
IMPORTS = (  # what these and DeepSpeed import only when it is used
    "datasets deepspeed.module_inject.auto_ep_layer deepspeed.ops.op_builder.all_ops matplotlib.pyplot sacrebleu "
    "deepspeed.runtime.pipe.engine deepspeed.runtime.zero.muon.muon_optimizer scipy.stats seqeval.metrics "
    "sklearn.metrics transformers.generation.utils transformers.models.bert.modeling_bert "
    "transformers.models.marian.modeling_marian "
    "torch.utils.cpp_extension"
)
ENVIRONMENT = {
    "OMP_NUM_THREADS": "1",  # the same sums under every launcher
    "PYTORCH_NVML_BASED_CUDA_CHECK": "1",  # asking the driver itself would bar CUDA from forks
    "JE_ARROW_MALLOC_CONF": "background_thread:false",  # else pyarrow's allocator has a thread, and it does not fork
    "MPLBACKEND": "agg",
}


@dataclass(frozen=True)
class Job:
    """``python <argv>`` on ``ranks`` processes; 0: one without any rank's variables."""

    argv: Sequence[str]
    ranks: int
    port: int
    cwd: str
    environment: dict[str, str]

    def message(self) -> bytes:
        return json.dumps(asdict(self)).encode()


def serve(requests: socket.socket) -> None:
    """Until the other end, the test session, has gone."""
    warm_up()
    threads = [(task / "comm").read_text().strip() for task in Path("/proc/self/task").iterdir()]
    assert len(threads) == 1, f"threads do not survive a fork: {threads}"
    gc.collect()
    gc.freeze()  # else the first collection of every rank copies all of the heap
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # no zombies
    while True:
        message, descriptors, *_ = socket.recv_fds(requests, 1 << 20, 3)
        if not message:
            return
        if os.fork() == 0:
            requests.close()
            lead(Job(**json.loads(message)), *descriptors)
        for descriptor in descriptors:
            os.close(descriptor)


def warm_up() -> None:
    """Import, and fill the caches of Hydra and of its parser."""
    sys.path.append(str(Path(__file__).parents[1] / "recipes"))
    for name in PACKAGES:
        for module in pkgutil.walk_packages(importlib.import_module(name).__path__, f"{name}."):
            if not module.name.endswith("__main__"):
                importlib.import_module(module.name)
    for name in IMPORTS.split():
        importlib.import_module(name)
    import cpuinfo  # a process and a second, each time that DeepSpeed loads an op of a CPU

    from toolkit.config.compose import compose

    cpuinfo.get_cpu_info = functools.cache(cpuinfo.get_cpu_info)
    cpuinfo.get_cpu_info()
    compose(["experiment=demo"])


def lead(job: Job, answer: int, out: int, err: int) -> NoReturn:
    """Fork the ranks, wait for them and leave with the exit code that DeepSpeed's launcher would have."""
    os.setsid()
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    os.dup2(out, 1)
    os.dup2(err, 2)
    os.chdir(job.cwd)
    os.environ.clear()
    os.environ.update(job.environment | ENVIRONMENT)
    with socket.socket(fileno=answer) as told:
        ranks = [fork(job, rank) for rank in range(max(1, job.ranks))]
        told.send(json.dumps([os.getpid(), *ranks]).encode())
        code = ended(ranks)
        told.send(json.dumps(code).encode())
    os._exit(code)


def ended(ranks: Sequence[int]) -> int:
    """The first exit code but 0; as DeepSpeed's launcher does, the other ranks get SIGTERM and a while, here 10 s."""
    code, alive, kill_at = 0, set(ranks), float("inf")
    while alive:
        pid, status = os.waitpid(-1, 0 if kill_at == float("inf") else os.WNOHANG)
        alive.discard(pid)
        if pid and status and not code:
            code, kill_at = abs(os.waitstatus_to_exitcode(status)), time.monotonic() + 10
            signal_all(alive, signal.SIGTERM)
        if not pid:
            time.sleep(0.02)
        if time.monotonic() > kill_at:
            signal_all(alive, signal.SIGKILL)
    return code


def signal_all(processes: set[int], number: signal.Signals) -> None:
    for process in processes:
        with contextlib.suppress(ProcessLookupError):
            os.kill(process, number)


def fork(job: Job, rank: int) -> int:
    """A rank; in the parent its process id."""
    if child := os.fork():
        return child
    if job.ranks:
        os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank)}
        os.environ |= {"WORLD_SIZE": str(job.ranks), "LOCAL_SIZE": str(job.ranks)}
        os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(job.port)}
    script, *arguments = job.argv
    code = run([script, *([f"--local_rank={rank}"] if job.ranks else []), *arguments])
    threading._shutdown()  # type: ignore[attr-defined]  # as the interpreter does at its end
    atexit._run_exitfuncs()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


def run(argv: list[str]) -> int:
    """``python <argv>`` in this process, argv beginning with a file, -m or -c; its exit code."""
    flag = argv[0] if argv[0] in ("-c", "-m") else None
    sys.argv = argv[1:] if flag else argv
    sys.path[0] = "" if flag else str(Path(argv[0]).resolve().parent)
    try:
        if flag == "-c":
            exec(compile(argv[1], "<string>", "exec"), {"__name__": "__main__"})
        elif flag == "-m":
            runpy.run_module(argv[1], run_name="__main__", alter_sys=True)
        else:
            runpy.run_path(argv[0], run_name="__main__")
    except SystemExit as leave:
        if isinstance(leave.code, int | None):
            return leave.code or 0
        print(leave.code, file=sys.stderr)
        return 1
    except BaseException:
        sys.excepthook(*sys.exc_info())
        return 1
    return 0


if __name__ == "__main__":
    serve(socket.socket(fileno=int(sys.argv[1])))
