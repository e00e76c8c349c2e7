"""A run that is checked, named and saved once, before any launcher starts it.

    job = prepare(Path("recipes/pretrain.py"), ["model=bert_base", "cluster.hostfile=hosts"])
    job.arguments(job.directory)     # what every rank runs: the recipe on the saved configuration

`<output_dir>/<name>/launch/` holds config.yaml and what the launcher needs beside it.
"""

import json
import re
import runpy
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from toolkit.cluster.hostfile import slots
from toolkit.config.compose import compose
from toolkit.config.schema import Cluster, RunConfig
from toolkit.deepspeed import ds_config
from toolkit.errors import ConfigError
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
    recipe.refuse_task(config, str(path))
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


def manifest(job: Job, name: str, documents: Sequence[Mapping[str, Any]], *submit: str) -> Launch:
    """``documents`` as a YAML file, in the order of their keys; ``submit`` is the command, ``name`` in it its path."""
    plain = json.loads(json.dumps(documents))  # no anchors for what stands there twice
    text = yaml.safe_dump_all(plain, sort_keys=False, width=120)
    command = [str(job.directory / name) if word == name else word for word in submit]
    return Launch(text, command, {name: text})
