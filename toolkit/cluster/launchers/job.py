"""`toolkit launch`: a run is checked, named and saved once, and what its launcher needs is printed, or submitted.

    start(Path("recipes/pretrain.py"), ["zero=stage3"], on="slurm", submit=True)
    job = prepare(Path("recipes/pretrain.py"), ["model=bert_base", "cluster.hostfile=hosts"])
    job.arguments(job.directory)     # what every rank runs: the recipe on the saved configuration

`<output_dir>/<name>/launch/` holds config.yaml and what the launcher needs beside it.
"""

import os
import re
import runpy
import shlex
import shutil
import sys
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from importlib import import_module
from pathlib import Path

from toolkit.cluster.launchers import LAUNCHERS
from toolkit.config.compose import compose
from toolkit.config.schema import SECRET, Cluster, RunConfig
from toolkit.deepspeed import ds_config
from toolkit.errors import ConfigError, nearest
from toolkit.run.directory import settled
from toolkit.run.files import as_yaml, replace
from toolkit.run.recipe import Recipe

LAUNCH = "/launch"  # where a container sees the launch directory


@dataclass(frozen=True)
class Job:
    """One run and the hosts for it: what every launcher starts from."""

    name: str
    recipe: Path  # as typed
    config: RunConfig
    hosts: tuple[str, ...]  # the hostfile's; () where the cluster chooses
    nodes: int
    devices: int  # ranks on each node
    directory: Path  # absolute: the launch directory

    @property
    def cluster(self) -> Cluster:
        return self.config.cluster

    @property
    def world(self) -> int:
        return self.nodes * self.devices

    @property
    def port(self) -> int:
        return self.cluster.master_port or 29500

    def arguments(self, directory: Path | str) -> list[str]:
        """The recipe on the configuration that was saved in ``directory``."""
        return [str(self.recipe), "--config-path", str(directory), "--config-name", "config"]

    @property
    def saved(self) -> str:
        """The text of config.yaml."""
        return as_yaml(self.config.model_dump(mode="json"))

    @property
    def known_hosts(self) -> tuple[str, ...]:
        """The hostfile's, or the only one. Raises ConfigError where several are meant and none is named."""
        if self.nodes > 1 and not self.hosts:
            raise ConfigError(
                f"cluster.nodes={self.nodes}: which hosts? Set cluster.hostfile, with lines of `host slots=8`, "
                "or for torchrun cluster.master_addr."
            )
        return self.hosts or (self.cluster.master_addr or "127.0.0.1",)

    @property
    def master(self) -> str:
        """The first host's address. Raises ConfigError."""
        return self.cluster.master_addr or self.known_hosts[0]

    @property
    def image(self) -> str:
        """Raises ConfigError without one."""
        if not self.cluster.image:
            raise ConfigError("cluster.image is not set, and these ranks run in containers. Name the image.")
        return self.cluster.image

    @property
    def runs(self) -> str:
        """output_dir as a container sees it."""
        return str(Path(self.cluster.workdir) / self.config.output_dir)

    @property
    def mounts(self) -> list[str]:
        """What containers on hosts see of the shared folders, as ``host:container``. Raises ConfigError."""
        shared = {Path(self.config.output_dir).absolute(): self.runs, self.directory: LAUNCH}
        for folder in shared:
            if re.search(r"[\s,:]", str(folder)):
                raise ConfigError(f"{folder}: blanks, commas and colons do not pass a list of mounts. Rename it.")
        return [*(f"{outside}:{inside}" for outside, inside in shared.items()), *self.cluster.mounts]

    @property
    def label(self) -> str:
        """The name as Kubernetes and Compose take one. Raises ConfigError where it would have to be cut."""
        plain = re.sub(r"[^a-z0-9]+", "-", self.name.lower()).strip("-")
        if not 0 < len(plain) <= 40:  # a pod's name, with what operators append, has at most 63
            raise ConfigError(f"name={self.name}: Kubernetes takes 1 to 40 letters, digits and dashes. Choose another.")
        return plain


@dataclass(frozen=True)
class Launch:
    """What a launcher makes of a job: files beside config.yaml, what is printed, and the command that submits."""

    shown: str
    command: Sequence[str]
    files: Mapping[str, str] = field(default_factory=dict)
    environment: Mapping[str, str] = field(default_factory=dict)


def prepare(path: Path, overrides: Sequence[str], out: Path | None = None) -> Job:
    """Compose and check the configuration as the recipe would on its ranks, and settle its name. Raises ConfigError."""
    recipe = load_recipe(path)
    config = compose(recipe.completed(list(overrides)), recipe.config)
    recipe.refuse(config, str(path))
    cluster = config.cluster
    hosts = slots("cluster.hostfile", Path(cluster.hostfile)) if cluster.hostfile else {}
    nodes = cluster.nodes or len(hosts) or config.machine.nodes
    devices = cluster.devices_per_node or next(iter(hosts.values()), 1)
    if hosts and len(hosts) != nodes:
        raise ConfigError(f"cluster.nodes={nodes}: {cluster.hostfile} has {len(hosts)} hosts. Drop one of the two.")
    if odd := next((host for host, ranks in hosts.items() if ranks != devices), None):
        raise ConfigError(
            f"{cluster.hostfile}: {odd} slots={hosts[odd]}, but {devices} ranks start on each host. "
            "Give all hosts the same slots; cluster.devices_per_node may say so, or stay unset."
        )
    if recipe.engine:
        ds_config.complete(config, world=nodes * devices, device=cluster.accelerator)
    run = settled(config)
    config = config.model_copy(update={"name": run.name})
    return Job(run.name, path, config, tuple(hosts), nodes, devices, (out or run / "launch").absolute())


def slots(option: str, path: Path) -> dict[str, int]:
    """Ranks by host of a hostfile, DeepSpeed's format; ``option`` named it. Raises ConfigError with file and line.

    A name is neither an option of ssh nor anything for a shell; users and ports belong into ~/.ssh/config.
    """
    try:
        lines = path.read_text().splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"{option} {path}: {error}. Give a file with lines of `host slots=8`.") from error
    hosts: dict[str, int] = {}
    for number, line in enumerate(lines, 1):
        text = line.split("#")[0].strip()
        if not text:
            continue
        match = re.fullmatch(r"([A-Za-z0-9][\w.-]*)\s+slots=([1-9]\d*)", text, re.ASCII)
        if not match or match[1] in hosts:
            rule = "a second line for this host" if match else "must be `host slots=8`"
            raise ConfigError(f"{path}, line {number}: {text!r}: {rule}. Correct it.")
        hosts[match[1]] = int(match[2])
    if not hosts:
        raise ConfigError(f"{option} {path}: no host in it. Give lines of `host slots=8`.")
    return hosts


def load_recipe(path: Path) -> Recipe:
    """The recipe that ``path`` defines as ``main``."""
    if not path.is_file():
        raise ConfigError(f"{path}: no such recipe. Name its file, e.g. recipes/pretrain.py.")
    sys.path.insert(0, str(path.parent))
    found = runpy.run_path(str(path)).get("main")
    if not isinstance(found, Recipe):
        raise ConfigError(f"{path}: it has no function main with @recipe. See recipes/pretrain.py.")
    return found


def save(job: Job, launch: Launch) -> None:
    """Write the configuration and the launcher's files, each whole or not at all."""
    try:
        job.directory.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ConfigError(f"{job.directory}: {error.strerror}. Choose another place with --out.") from error
    for name, text in {"config.yaml": job.saved, **launch.files}.items():
        replace(job.directory / name, text)


def start(recipe: Path, overrides: Sequence[str], *, on: str, submit: bool = False, out: Path | None = None) -> None:
    """Print the command, script or manifest; with ``submit`` become the process that submits it. Raises ConfigError."""
    if on not in LAUNCHERS:
        raise ConfigError(f"--on {on}: no such launcher.{nearest(on, LAUNCHERS)} Known: {', '.join(LAUNCHERS)}.")
    job = prepare(recipe, overrides, out)
    try:
        launch: Launch = getattr(import_module(f"toolkit.cluster.launchers.{LAUNCHERS[on]}"), on)(job)
        tool = launch.command[0]
        if submit and shutil.which(tool) is None:
            raise ConfigError(
                f"{tool}: not found on this host. Install it, or run without --submit and take it where it is."
            )
    except ConfigError:
        with suppress(OSError):  # not empty, or never made
            (Path(job.config.output_dir) / job.name).rmdir()
        raise
    save(job, launch)
    hint = f"; start it with: {shlex.join(launch.command)}" if launch.shown in launch.files.values() else ""
    print(f"Saved for {job.world} ranks: {job.directory}{hint}", file=sys.stderr, flush=True)
    if submit:
        # DeepSpeed writes MLFLOW* into the remote command line and its log (EXPORT_ENVS, launcher/runner.py).
        kept = {k: v for k, v in os.environ.items() if not (k.startswith("MLFLOW") and re.search(SECRET, k))}
        os.execvpe(tool, list(launch.command), {**kept, **launch.environment})
    print(launch.shown, end="")
