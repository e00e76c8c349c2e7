"""`deepspeed`, `torchrun` and `mpirun`: the commands that start a job on hosts that are there.

deepspeed(job).shown     # DS_ENV_FILE=… deepspeed --hostfile … recipes/pretrain.py --config-path … --config-name config
"""

import os
import re
import shlex
import shutil
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

from toolkit.cluster.launchers.job import Job, Launch
from toolkit.errors import ConfigError

# A host that is gone ends its ssh after a minute, and asks for no password on the way there.
SSH = "-o BatchMode=yes -o ConnectTimeout=30 -o ServerAliveInterval=15 -o ServerAliveCountMax=4"
# Else torchrun's agents lend the ranks their store, where a restarted rank finds the address of one that is dead
# (torch 2.13, distributed/rendezvous.py) and waits for it.
ELASTIC = {"TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1"}


def deepspeed(job: Job) -> Launch:
    """DeepSpeed's own launcher: on one host directly, on several over pdsh and ssh."""
    _refuse_restarts(job)
    if job.nodes == 1 and not job.hosts:
        options = ["--num_gpus", str(job.devices), "--master_port", str(job.port)]
        return _launch([_beside_python("deepspeed"), *options, *job.arguments(job.directory)], job.cluster.variables)
    _refuse_shell_characters(job)
    hosts, variables = job.directory / "hostfile", job.directory / ".deepspeed_env"
    # Its check of the first host takes nothing of PDSH_SSH_ARGS_APPEND, and would wait for a password.
    options = ["--hostfile", str(hosts), "--no_ssh_check", "--force_multi"]
    options += ["--master_addr", job.master, "--master_port", str(job.port)]
    files = {hosts.name: hostfile(job), variables.name: deepspeed_env(job)}
    environment = {"DS_ENV_FILE": str(variables), "PDSH_SSH_ARGS_APPEND": _ssh("PDSH_SSH_ARGS_APPEND")}
    environment |= {name: value for name, value in job.cluster.variables.items() if name == "DS_ACCELERATOR"}
    return _launch([_beside_python("deepspeed"), *options, *job.arguments(job.directory)], environment, files)


def torchrun(job: Job) -> Launch:
    """The same command on every node; the nodes meet at the first one."""
    command = [_beside_python("torchrun"), *elastic(job, job.master), *job.arguments(job.directory)]
    launch = _launch(command, job.cluster.variables | ELASTIC)
    if job.nodes == 1 or not job.cluster.interface:
        return launch
    address = f'ip -o -4 addr show dev {job.cluster.interface} | awk \'{{sub("/.*", "", $4); print $4; exit}}\''
    line = launch.shown.replace(" --rdzv-id ", f' --local-addr "$({address})" --rdzv-id ', 1)
    return Launch(line, ["sh", "-c", line])


def elastic(job: Job, master: str) -> list[str]:
    """torchrun's options where nodes find their numbers by themselves."""
    sizes = ["--nnodes", str(job.nodes), "--nproc-per-node", str(job.devices)]
    meeting = ["--rdzv-backend", "c10d", "--rdzv-endpoint", f"{master}:{job.port}", "--rdzv-id", job.name]
    return [*sizes, "--max-restarts", str(job.cluster.restarts), *meeting]


def mpi(job: Job) -> Launch:
    """Open MPI starts the processes; the ranks themselves talk over gloo or NCCL, so it needs no CUDA."""
    _refuse_restarts(job)
    variables = job.cluster.variables | {"MASTER_ADDR": job.master, "MASTER_PORT": str(job.port)}
    options = ["-np", str(job.world), "--hostfile", str(job.directory / "hostfile"), "--bind-to", "none"]
    options += ["--mca", "oob_tcp_if_include", job.cluster.interface] if job.cluster.interface else []
    options += [word for name, value in variables.items() for word in ("-x", f"{name}={value}")]
    command = ["mpirun", *options, sys.executable, "-u", *job.arguments(job.directory)]
    environment = {"OMPI_MCA_plm_rsh_args": _ssh("OMPI_MCA_plm_rsh_args")} if job.hosts else {}
    return _launch(command, environment, {"hostfile": hostfile(job)})


def deepspeed_env(job: Job) -> str:
    """What DeepSpeed exports on every host: it forwards few variables by itself, and takes no blank line here."""
    return "".join(f"{name}={value}\n" for name, value in job.cluster.variables.items())


def hostfile(job: Job) -> str:
    """DeepSpeed's and Open MPI's format. Raises ConfigError where it would lack hosts."""
    return "".join(f"{host} slots={job.devices}\n" for host in job.known_hosts)


def _launch(command: Sequence[str], environment: Mapping[str, str], files: Mapping[str, str] | None = None) -> Launch:
    words = [*(f"{name}={value}" for name, value in environment.items()), *command]
    return Launch(" ".join(map(_quoted, words)) + "\n", command, files or {}, environment)


def _quoted(word: str) -> str:
    """For a shell, and so that it still sees a variable that is set in front of a command."""
    name, is_variable, value = word.partition("=")
    return f"{name}={shlex.quote(value)}" if is_variable and name.isidentifier() else shlex.quote(word)


def _beside_python(name: str) -> str:
    return shutil.which(name, path=str(Path(sys.executable).parent)) or name


def _ssh(variable: str) -> str:
    """Ours after those of the shell: ssh takes the first of each option."""
    return f"{os.environ.get(variable, '')} {SSH}".strip()


def _refuse_restarts(job: Job) -> None:
    if job.cluster.restarts:
        raise ConfigError(
            f"cluster.restarts={job.cluster.restarts}: deepspeed and mpirun start a run once. "
            "Drop it, or use torchrun, slurm, kubernetes or compose."
        )


def _refuse_shell_characters(job: Job) -> None:
    """DeepSpeed writes these into a remote shell's line as they are (PDSHRunner.get_cmd, 0.19.8)."""
    for path in (Path.cwd(), job.recipe, job.directory, sys.executable):
        if not re.fullmatch(r"[\w@%+=:,./-]+", str(path), re.ASCII):
            raise ConfigError(f"{path}: blanks and shell characters do not pass DeepSpeed's pdsh launcher. Rename it.")
