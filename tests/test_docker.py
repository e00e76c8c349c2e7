"""What docker/ holds is well-formed and keeps the rules of images: no secrets, nothing that does not belong there."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml
from launching import ROOT

DOCKER = ROOT / "docker"
DOCKERFILE = (DOCKER / "Dockerfile").read_text()
BIN = Path(sys.executable).parent


def tool(name: str, *arguments: object) -> None:
    if not (BIN / name).exists():
        pytest.skip(f"{name} is not installed: pip install -e '.[dev]'")
    done = subprocess.run([BIN / name, *map(str, arguments)], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr


def test_the_dockerfile_passes_hadolint_and_declares_no_secret() -> None:
    tool("hadolint", DOCKER / "Dockerfile")


def test_the_entrypoint_passes_shellcheck() -> None:
    tool("shellcheck", DOCKER / "entrypoint.sh")


class Loader(yaml.SafeLoader):
    """Knows compose's tag that takes a key of another file away."""


Loader.add_constructor("!reset", lambda loader, node: None)


def compose_file(name: str) -> dict[str, Any]:
    tree: dict[str, Any] = yaml.load((DOCKER / name).read_text(), Loader)
    return tree


@pytest.mark.parametrize("name", sorted(path.name for path in DOCKER.glob("compose*.yaml")))
def test_a_compose_file_keeps_the_specification(name: str, tmp_path: Path) -> None:
    (tmp_path / "compose.json").write_text(json.dumps(compose_file(name)))
    tool("check-jsonschema", "--builtin-schema", "vendor.compose-spec", tmp_path / "compose.json")


def test_every_service_has_memory_limits_gpus_and_mounts() -> None:
    services = compose_file("compose.yaml")["services"]
    for service in services.values():
        assert service["ulimits"]["memlock"] == -1 and service["ulimits"]["stack"] and service["shm_size"]
        assert service["deploy"]["resources"]["reservations"]["devices"][0]["capabilities"] == ["gpu"]
        targets = {re.sub(r":ro$", "", mount).rsplit(":", 1)[1] for mount in service["volumes"]}
        assert targets == {"/data", "/workspace/runs", "/cache"}
    assert set(compose_file("compose.cpu.yaml")["services"]) == set(services)


def test_the_two_nodes_are_those_of_the_hostfile_and_share_one_key() -> None:
    tree = compose_file("compose.yaml")
    nodes = {n: s for n, s in tree["services"].items() if "cluster" in s.get("profiles", [])}
    assert {line.split()[0] for line in tree["configs"]["hostfile"]["content"].splitlines()} == set(nodes)
    assert all(s["hostname"] == n and s["secrets"] == ["cluster_key"] for n, s in nodes.items())


def test_only_what_is_copied_goes_to_the_builder() -> None:
    """No .git, no runs, no caches, no keys: all is left out but what the Dockerfile copies."""
    lines = [x for x in (ROOT / ".dockerignore").read_text().splitlines() if not x.startswith("#")]
    assert lines[0] == "*"
    sent = {line[1:] for line in lines if line.startswith("!")}
    copies = [line.split() for line in re.findall(r"^COPY (.*)$", DOCKERFILE, re.MULTILINE) if "--from=" not in line]
    copied = {word for words in copies for word in words[:-1] if not word.startswith("--")}
    assert sent == copied
    assert all((ROOT / source).exists() for source in copied)


LAUNCHER = """#!{python}
import subprocess, sys
sys.exit(subprocess.run([sys.executable, sys.argv[1], "--local_rank=0"]).returncode)
"""
RANK = """
import signal, sys, time
signal.signal(signal.SIGTERM, lambda *_: (time.sleep(1), print("saved", flush=True), sys.exit(75)))
print("started", flush=True)
time.sleep(60)
"""
STOP = 'out=$1; shift; "$@" > "$out" & until [ -s "$out" ]; do sleep 0.1; done; kill -TERM $!; wait $!'


def test_a_stopped_container_lets_its_ranks_save(tmp_path: Path) -> None:
    """SIGTERM reaches the ranks; the launcher, which would end at once, ends after them and with their code."""
    if subprocess.run(
        ["unshare", "--pid", "--fork", "--mount-proc", "true"], capture_output=True, check=False
    ).returncode:
        pytest.skip("a process namespace, which a container has, needs root and its rights")
    (tmp_path / "deepspeed").write_text(LAUNCHER.format(python=sys.executable))
    (tmp_path / "deepspeed").chmod(0o755)
    (tmp_path / "rank.py").write_text(RANK)
    container = ["unshare", "--pid", "--fork", "--kill-child", "--mount-proc", "sh", "-c", STOP, "sh", tmp_path / "out"]
    env = os.environ | {"PATH": f"{tmp_path}:{os.environ['PATH']}", "CLUSTER_KEY": "none"}
    command = [*container, DOCKER / "entrypoint.sh", "deepspeed", tmp_path / "rank.py"]
    done = subprocess.run(command, env=env, check=False, timeout=30)
    assert (done.returncode, (tmp_path / "out").read_text().split()) == (75, ["started", "saved"])
