"""The image, really built and run: `make image-test`.

Debian's buildah builds the CPU variant without a Docker engine, on a base that debootstrap makes. What this host's pip
is configured with (certificates, local folders of wheels) goes into that base or is mounted, never into the Dockerfile.
"""

import json
import os
import shutil
import signal
import ssl
import subprocess
import time
from collections import defaultdict
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import psutil
import pytest
from launching import ROOT, read

FOLDER = os.environ.get("TOOLKIT_IMAGE_TEST")  # where the image, its layers and its caches are kept
if not FOLDER:
    pytest.skip("it takes many minutes: make image-test", allow_module_level=True)
for name in ("buildah", "debootstrap", "unshare", "ip", "ssh-keygen"):
    if shutil.which(name) is None:
        pytest.skip(f"{name} is not installed", allow_module_level=True)
if os.geteuid() != 0:
    pytest.skip("debootstrap and buildah's chroot isolation need root", allow_module_level=True)

STORE = Path(FOLDER).resolve()
ENV = os.environ | {
    "BUILDAH_FORMAT": "docker",  # OCI's has no health check
    "BUILDAH_ISOLATION": "chroot",
    "CONTAINERS_STORAGE_CONF": str(STORE / "storage.conf"),
    "TMPDIR": str(STORE),
}
BASE, IMAGE = "localhost/base", "localhost/toolkit"
SMALL = ["experiment=demo", "train.steps=20", "train.save_every=10", "train.log_every=1", "train.eval_samples=64"]


def buildah(*arguments: object) -> str:
    done = subprocess.run(["buildah", *map(str, arguments)], cwd=ROOT, env=ENV, stdout=subprocess.PIPE, text=True)
    assert done.returncode == 0, f"buildah {' '.join(map(str, arguments))}\n{done.stdout[-5000:]}"
    return done.stdout.strip()


def pip_settings() -> dict[str, set[str]]:
    """What this host's pip is configured with, by files and environment."""
    settings = defaultdict(set)
    for line in subprocess.run(
        ["pip", "config", "list"], capture_output=True, text=True, check=True
    ).stdout.splitlines():
        key, _, value = line.partition("=")
        settings[key.rsplit(".", 1)[1]] |= set(value.strip("'").split())
    return settings


def make_base() -> None:
    container = buildah("from", "scratch")
    root = Path(buildah("mount", container))
    subprocess.run(
        ["debootstrap", "--variant=minbase", "--include=ca-certificates", "bookworm", root], check=True, stdout=2
    )
    settings = pip_settings()
    files = {Path(word) for words in settings.values() for word in words if Path(word).is_file()}
    for file in files | {Path(ssl.get_default_verify_paths().cafile or "/dev/null")}:
        if file.is_file():
            (root / file.relative_to("/")).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(file, root / file.relative_to("/"))
    lines = [f"{key} = {' '.join(sorted(words))}" for key, words in settings.items()]
    (root / "etc/pip.conf").write_text("\n".join(["[global]", *lines, ""]))
    buildah("commit", container, BASE)
    buildah("rm", container)


def mounts() -> list[str]:
    """This host's own folders of packages, for the build alone."""
    folders = set()
    for word in set().union(*pip_settings().values()):
        if (folder := Path(word.removeprefix("file://"))).is_dir():
            folders.add(folder.parent if word.startswith("file://") else folder)  # an index links to files beside it
    return [option for folder in sorted(folders) for option in ("--volume", f"{folder}:{folder}:ro")]


@pytest.fixture(scope="module")
def container() -> Iterator[str]:
    STORE.mkdir(parents=True, exist_ok=True)
    paths = f'graphroot = "{STORE}/graph"\nrunroot = "{STORE}/run"'
    (STORE / "storage.conf").write_text(f'[storage]\ndriver = "overlay"\n{paths}\n')
    if not buildah("images", "--quiet", "--filter", f"reference={BASE}"):
        make_base()
    chosen = {"BASE_IMAGE": BASE, "RUNTIME_IMAGE": BASE, "ACCELERATOR": "cpu"}
    arguments = [word for key, value in chosen.items() for word in ("--build-arg", f"{key}={value}")]
    start = time.monotonic()
    buildah("build", "--layers", "-f", "docker/Dockerfile", "-t", IMAGE, *mounts(), *arguments, ".")
    print(f"built in {time.monotonic() - start:.0f} s")
    name = buildah("from", IMAGE)
    yield name
    buildah("rm", name)


def settings() -> dict[str, Any]:
    config: dict[str, Any] = json.loads(buildah("inspect", "--type", "image", IMAGE))["Docker"]["config"]
    return config


def start(container: str, *command: str, options: Sequence[str] = ()) -> subprocess.Popen[str]:
    """``command`` as the image's user, in namespaces for processes and network of its own."""
    alone = ["unshare", "--pid", "--fork", "--kill-child", "--mount-proc", "--net"]
    inner = ["buildah", "run", *options, container, "--", *command]
    return subprocess.Popen(
        [*alone, "sh", "-c", 'ip link set lo up && exec "$@"', "sh", *inner],
        env=ENV,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def run(container: str, *command: str, options: Sequence[str] = (), timeout: float = 300) -> str:
    process = start(container, *command, options=options)
    out = process.communicate(timeout=timeout)[0]
    assert process.returncode == 0, out
    return out


def train(*overrides: str) -> list[str]:
    return [*settings()["Entrypoint"], "deepspeed", "--num_gpus", "2", "recipes/pretrain.py", *SMALL, *overrides]


@pytest.fixture
def runs(tmp_path: Path) -> Path:
    """What the host mounts as /workspace/runs, for user 1000 to write."""
    tmp_path.chmod(0o777)
    return tmp_path


def test_the_health_check_passes_and_tells_of_ops_that_do_not_fit(container: str) -> None:
    kind, check = settings()["Healthcheck"]["Test"]
    assert kind == "CMD-SHELL"
    assert "/opt/toolkit/ops/torch" in run(container, "bash", "-c", check)
    sick = start(container, "bash", "-c", f"TOOLKIT_CPU_ARCH=x86-64-v9; {check}")
    assert "but this is torch" in sick.communicate(timeout=60)[0] and sick.returncode != 0


def find(container: str, *arguments: str) -> set[str]:
    """What the image's user finds; what it may not look into is nothing."""
    return set(run(container, "sh", "-c", 'find "$@" 2> /dev/null || true', "sh", *arguments).split())


def test_the_user_has_a_number_and_can_write_nothing_but_runs_and_caches(container: str) -> None:
    assert settings()["User"] == "1000:0"
    writable = find(container, "/", "-xdev", "-writable", "-type", "d")
    assert {path for path in writable if not path.startswith("/home/trainer/")} == {
        "/cache",
        "/home/trainer",
        "/run/lock",
        "/tmp",
        "/var/tmp",
        "/workspace/runs",
    }


def test_no_compiler_no_key_and_nothing_of_the_building_machine_is_in_the_image(container: str) -> None:
    config = settings()
    assert not [x for x in config["Env"] if x.startswith(("PIP_", "SSL_"))]
    assert config["Labels"]["org.opencontainers.image.title"] == "deepspeed-toolkit"
    assert find(container, "/opt/venv/bin/toolkit") and not find(container, "/usr/bin/g++")
    names = (".git", ".ssh", "ssh_host_*_key", "build.ninja", "*.o")
    wanted = [word for name in names for word in ("-o", "-name", name)][1:]
    assert find(container, "/opt", "/workspace", "/etc", "/home", *wanted) == set()


def test_two_ranks_pretrain_without_a_compiler(container: str, runs: Path) -> None:
    began = time.monotonic()
    mount = ["--volume", f"{runs}:/workspace/runs"]
    process = start(container, *train("name=demo", "zero=stage2", "offload=cpu"), options=mount)
    while process.poll() is None and not read(runs / "demo" / "metrics.jsonl"):
        time.sleep(0.2)
    print(f"first step after {time.monotonic() - began:.1f} s")
    out = process.communicate(timeout=300)[0]
    assert process.returncode == 0, out
    assert "DeepSpeed's op" not in out, "neither built nor waited for"
    assert [r["step"] for r in read(runs / "demo" / "metrics.jsonl") if "loss" in r] == list(range(1, 21))


def test_a_stopped_container_saves_and_says_so(container: str, runs: Path) -> None:
    process = start(container, *train("name=stop", "train.steps=5000"), options=["--volume", f"{runs}:/workspace/runs"])
    while process.poll() is None and len(read(runs / "stop" / "metrics.jsonl")) < 5:
        time.sleep(0.1)
    (tini,) = [p for p in psutil.Process(process.pid).children(recursive=True) if p.name() == "tini"]
    tini.send_signal(signal.SIGTERM)
    out = process.communicate(timeout=120)[0]
    assert process.returncode == 75, out
    assert list((runs / "stop" / "checkpoints").glob("step-*"))


def test_a_node_trains_over_ssh_and_lets_no_other_key_in(container: str, runs: Path) -> None:
    """pdsh, sshd, key and hostfile as on two hosts; `--force_multi` takes that road with one."""
    for name in ("cluster_key", "other"):
        subprocess.run(["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", runs / name], check=True)
        (runs / name).chmod(0o444)  # not user 1000's: ssh reads it whatever its mode
    (runs / "hosts").write_text("localhost slots=2\n")
    node = ["--volume", f"{runs}:/workspace/runs", "--volume", f"{runs}/cluster_key:/run/secrets/cluster_key:ro"]
    entry = settings()["Entrypoint"]
    ssh = "ssh -F none -p 2222 -o BatchMode=yes"
    own = run(container, *entry, "sh", "-c", f"{ssh} -i ~/.ssh/cluster_key localhost id -u", options=node)
    assert own.splitlines()[-1] == "1000"
    other = start(container, *entry, *f"{ssh} -i runs/other localhost id -u".split(), options=node)
    assert "Permission denied (publickey)" in other.communicate(timeout=60)[0]
    launcher = ["deepspeed", "--force_multi", "--hostfile", "runs/hosts", "--master_addr", "127.0.0.1"]
    run(container, *entry, *launcher, "recipes/pretrain.py", *SMALL, "name=ssh", options=node)
    assert len([r for r in read(runs / "ssh" / "metrics.jsonl") if "loss" in r]) == 20
