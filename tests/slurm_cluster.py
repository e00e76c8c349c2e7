"""Slurm as a small cluster on this machine: munged, slurmctld and two slurmd, for as long as a test needs them.

with slurm_cluster() as cluster:                # SLURM_CONF for whatever is started meanwhile: cluster.environment
    cluster.run("sbatch", "job.sbatch")
    cluster.job(1)["ExitCode"]                  # what scontrol says of a job, as a dict
"""

import os
import shutil
import socket
import subprocess
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import pytest

from toolkit.job.ranks import free_port

TOOLS = ("munged", "slurmctld", "slurmd", "sbatch", "scontrol", "srun")
PATH = f"{os.environ['PATH']}:/usr/sbin"
missing = [tool for tool in TOOLS if shutil.which(tool, path=PATH) is None]
needs_slurm = pytest.mark.skipif(
    bool(missing) or os.geteuid() != 0, reason=f"needs root and Debian's slurm-wlm and munge; missing: {missing}"
)
CONF = """\
ClusterName=test
SlurmctldHost={host}(127.0.0.1)
SlurmUser=root
AuthType=auth/munge
AuthInfo=socket={dir}/munge.socket,cred_expire=5
CredType=cred/munge
StateSaveLocation={dir}/state
SlurmdSpoolDir={dir}/spool.%n
SlurmctldPidFile={dir}/slurmctld.pid
SlurmdPidFile={dir}/slurmd.%n.pid
SlurmctldPort={port}
SwitchType=switch/none
MpiDefault=none
ProctrackType=proctrack/pgid
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/none
AccountingStorageType=accounting_storage/none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
ReturnToService=2
SlurmdParameters=config_overrides
KillWait=5
SchedulerParameters=batch_sched_delay=0,sched_interval=2
"""
NODE = "NodeName={name} NodeHostname={host} NodeAddr=127.0.0.1 Port={port} CPUs=4 State=UNKNOWN\n"
PARTITION = "PartitionName=test Nodes={nodes} Default=YES MaxTime=60 State=UP OverSubscribe=FORCE:4\n"


@dataclass(frozen=True)
class Cluster:
    """A running cluster; its files and logs are in ``directory``."""

    directory: Path

    @property
    def environment(self) -> dict[str, str]:
        own = {k: v for k, v in os.environ.items() if not k.startswith(("SLURM_", "SBATCH_", "SRUN_"))}
        return own | {"SLURM_CONF": str(self.directory / "slurm.conf"), "PATH": PATH}

    def run(self, *command: str) -> str:
        """The output of a command that must succeed."""
        done = subprocess.run(command, env=self.environment, capture_output=True, text=True, check=False, timeout=60)
        assert done.returncode == 0, f"{command}\n{done.stdout}\n{done.stderr}"
        return done.stdout

    def job(self, number: int) -> dict[str, str]:
        words = self.run("scontrol", "show", "job", "--oneliner", str(number)).split()
        return dict(word.split("=", 1) for word in words if "=" in word)

    def logs(self) -> str:
        """The ends of the daemons' logs."""
        return "\n".join(f"--- {p.name}\n{p.read_text()[-3000:]}" for p in self.directory.glob("*.log"))


@contextmanager
def slurm_cluster(names: tuple[str, ...] = ("n1", "n2")) -> Iterator[Cluster]:
    """Bring it up in about three seconds, and take all of it down."""
    directory = Path(tempfile.mkdtemp(prefix="slurm-"))
    directory.chmod(0o755)  # munge wants its socket within reach of everybody
    cluster = Cluster(directory)
    host = socket.gethostname().split(".")[0]
    nodes = "".join(NODE.format(name=name, host=host, port=free_port()) for name in names)
    conf = CONF.format(dir=directory, host=host, port=free_port())
    (directory / "slurm.conf").write_text(conf + nodes + PARTITION.format(nodes=",".join(names)))
    (directory / "munge.key").write_bytes(os.urandom(1024))
    (directory / "munge.key").chmod(0o400)
    files = [f"--{k}={directory}/munge.{k.split('-')[0]}" for k in ("key-file", "socket", "pid-file", "log-file")]
    munged = ["munged", "--foreground", *files, f"--seed-file={directory}/munge.seed"]
    daemons = [munged, ["slurmctld", "-D"], *(["slurmd", "-D", "-N", name] for name in names)]
    started: list[subprocess.Popen[bytes]] = []
    try:
        for command in daemons:
            with (directory / f"daemon{len(started)}.log").open("wb") as log:
                started.append(subprocess.Popen(command, env=cluster.environment, stdout=log, stderr=log))
            if command is munged:
                _until(lambda: (directory / "munge.socket").exists(), cluster)
        _until(lambda: _idle(cluster) == len(names), cluster)
        yield cluster
    finally:
        _stop(cluster, started)
        shutil.rmtree(directory, ignore_errors=True)


def _idle(cluster: Cluster) -> int:
    command = ["sinfo", "--noheader", "--Node", "--format=%t"]
    done = subprocess.run(command, env=cluster.environment, capture_output=True, text=True, check=False)
    return done.stdout.split().count("idle")


def _until(condition: object, cluster: Cluster, seconds: float = 30) -> None:
    end = time.monotonic() + seconds
    assert callable(condition)
    while not condition():
        assert time.monotonic() < end, f"Slurm did not come up\n{cluster.logs()}"
        time.sleep(0.1)


def _stop(cluster: Cluster, daemons: list[subprocess.Popen[bytes]]) -> None:
    """Jobs first: their slurmstepd processes outlive slurmd."""
    if len(daemons) > 1:
        subprocess.run(["scancel", "--state=RUNNING"], env=cluster.environment, capture_output=True, check=False)
        end = time.monotonic() + 10
        busy = ["squeue", "--noheader"]
        while (
            time.monotonic() < end
            and subprocess.run(
                busy, env=cluster.environment, capture_output=True, text=True, check=False
            ).stdout.strip()
        ):
            time.sleep(0.2)
    for daemon in reversed(daemons):
        daemon.terminate()
    for daemon in reversed(daemons):
        try:
            daemon.wait(10)
        except subprocess.TimeoutExpired:
            daemon.kill()
