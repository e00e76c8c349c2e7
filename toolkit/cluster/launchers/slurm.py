"""A batch script for Slurm: one task a rank, bare or in a pyxis or apptainer container.

    slurm(job).shown     # job.sbatch, for `sbatch runs/<name>/launch/job.sbatch`

Each rank is a task of Slurm's own, so that signals reach it; toolkit.job.ranks takes RANK from srun.
"""

import re
import shlex
import sys
from pathlib import Path

from toolkit.cluster.launchers.job import LAUNCH, Job, Launch
from toolkit.errors import ConfigError

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


def slurm(job: Job) -> Launch:
    """job.sbatch. Raises ConfigError for a container without an image."""
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
