"""`deepspeed`, `torchrun` and `mpirun`, which start a job on hosts that are there, and `sbatch`, which asks for them.

deepspeed(job).shown     # DS_ENV_FILE=… deepspeed --hostfile … recipes/pretrain.py --config-path … --config-name config
slurm(job).shown         # job.sbatch, for `sbatch runs/<name>/launch/job.sbatch`
"""

import os
import re
import shlex
import shutil
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

from toolkit.cluster.launchers.job import LAUNCH, Job, Launch
from toolkit.errors import ConfigError

# A host that is gone ends its ssh after a minute, and asks for no password on the way there.
SSH = "-o BatchMode=yes -o ConnectTimeout=30 -o ServerAliveInterval=15 -o ServerAliveCountMax=4"
# Else torchrun's agents lend the ranks their store, where a restarted rank finds the address of one that is dead
# (torch 2.13, distributed/rendezvous.py) and waits for it.
ELASTIC = {"TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1"}
# srun's own exit code is the largest: that of the ranks that it killed after the first had failed.
RANK = """\
#!/bin/sh
# One rank. What it fails with is noted: the first note is the job's exit code.
trap : TERM # it is for the rank, which saves
"$@" || {
  code=$?
  echo "$code" >> "$(dirname "$0")/codes.$SLURM_JOB_ID"
  exit "$code"
}
"""
# 2 is a refusal, and would be one again. Anything else goes on from the last checkpoint.
RESTART = """\
if [ "$code" -ne 0 ] && [ "$code" -ne 2 ] && [ "${{SLURM_RESTART_COUNT:-0}}" -lt {restarts} ]; then
  echo "Exit code $code: queued again, to go on from the last checkpoint."
  scontrol requeue "$SLURM_JOB_ID"
fi
"""


def deepspeed(job: Job) -> Launch:
    """DeepSpeed's own launcher: on one host directly, on several over pdsh and ssh."""
    _refuse_restarts(job)
    options, environment = ["--num_gpus", str(job.devices)], job.cluster.variables
    files: dict[str, str] = {}
    if job.nodes > 1 or job.hosts:
        # DeepSpeed writes these into a remote shell's line as they are (PDSHRunner.get_cmd, 0.19.8)
        for path in (Path.cwd(), job.recipe, job.directory, sys.executable):
            if not re.fullmatch(r"[\w@%+=:,./-]+", str(path), re.ASCII):
                raise ConfigError(
                    f"{path}: blanks and shell characters do not pass DeepSpeed's pdsh launcher. Rename it."
                )
        files = {"hostfile": hostfile(job), ".deepspeed_env": deepspeed_env(job)}
        hosts, variables = (str(job.directory / name) for name in files)
        # Its check of the first host takes nothing of PDSH_SSH_ARGS_APPEND, and would wait for a password.
        options = ["--hostfile", hosts, "--no_ssh_check", "--force_multi", "--master_addr", job.master]
        own = {name: value for name, value in environment.items() if name == "DS_ACCELERATOR"}
        environment = {"DS_ENV_FILE": variables, "PDSH_SSH_ARGS_APPEND": _ssh("PDSH_SSH_ARGS_APPEND")} | own
    command = [_beside_python("deepspeed"), *options, "--master_port", str(job.port), *job.arguments(job.directory)]
    return _launch(command, environment, files)


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
    variables = [f"{name}={shlex.quote(value)}" for name, value in environment.items()]
    return Launch(" ".join([*variables, shlex.join(command)]) + "\n", command, files or {}, environment)


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


def slurm(job: Job) -> Launch:
    """A task of Slurm's own for each rank, so that signals reach it, bare or in a pyxis or apptainer container.

    toolkit.job.ranks takes RANK from srun. Raises ConfigError for a container without an image.
    """
    path, options, exports = job.directory / "job.sbatch", _options(job), dict(job.cluster.variables)
    if cpus := options.get("cpus-per-task"):
        exports["SRUN_CPUS_PER_TASK"] = str(cpus)  # since 22.05 srun does not take it from sbatch
    lines = [f"#SBATCH --{name}{'' if value is True else f'={value}'}" for name, value in options.items()]
    lines += [f"export {name}={shlex.quote(value)}" for name, value in exports.items()]
    port = job.cluster.master_port or "$((20000 + SLURM_JOB_ID % 20000))"  # jobs may share a node
    head, restart = "\n".join(lines), RESTART.format(restarts=job.cluster.restarts) if job.cluster.restarts else ""
    text = f"""\
#!/bin/bash
{head}
MASTER_ADDR=$(hostname)
MASTER_PORT={port}
export MASTER_ADDR MASTER_PORT
codes={shlex.quote(str(job.directory))}/codes.$SLURM_JOB_ID
rm -f "$codes"
code=0
srun --kill-on-bad-exit=1 {shlex.join(_task(job))} || code=$?
if [ -s "$codes" ]; then read -r code < "$codes"; fi
{restart}exit "$code"
"""
    return Launch(text, ["sbatch", str(path)], {path.name: text, "rank.sh": RANK})


def _options(job: Job) -> dict[str, str | bool]:
    """Ours, then those of cluster.slurm in their place; false leaves one out."""
    options: dict[str, str | bool] = {
        "job-name": re.sub(r"[^\w.-]", "-", job.name),
        "nodes": str(job.nodes),
        "ntasks-per-node": str(job.devices),
        "gpus-per-node": str(job.devices) if job.cluster.accelerator == "cuda" else False,
        "chdir": shlex.quote(str(Path.cwd())),
        "output": shlex.quote(str(job.directory / "slurm-%j.out")),
        "open-mode": "append",
        "signal": "TERM@120",  # to the ranks, which save and leave with 75
        "requeue" if job.cluster.restarts else "no-requeue": True,
    }
    options |= {name.replace("_", "-"): value for name, value in job.cluster.slurm.items()}
    return {name: value for name, value in options.items() if value is not False}


def _task(job: Job) -> list[str]:
    """srun's options and the command of one rank."""
    cluster, inside = job.cluster, ["python", "-u", *job.arguments(LAUNCH)]
    rank = ["sh", str(job.directory / "rank.sh")]
    if cluster.container == "none":
        if cluster.image:
            raise ConfigError(
                "cluster.image without cluster.container: Slurm starts it by pyxis or apptainer. Choose one."
            )
        return [*rank, sys.executable, "-u", *job.arguments(job.directory)]
    if cluster.container == "pyxis":
        names = ",".join([*cluster.variables, "MASTER_ADDR", "MASTER_PORT"])  # before what the image says of them
        options = [f"--container-image={job.image}", f"--container-mounts={','.join(job.mounts)}"]
        options += [f"--container-workdir={cluster.workdir}", f"--container-env={names}"]
        return [*options, "sh", f"{LAUNCH}/rank.sh", *inside]
    gpus = ["--nv"] if cluster.accelerator == "cuda" else []
    options = ["--bind", ",".join(job.mounts), "--pwd", cluster.workdir]
    return [*rank, "apptainer", "exec", *gpus, *options, job.image, *inside]
