"""Hosts for tests: sshd's of the test's own on 127.0.0.1, let in by key, each in a mount namespace if it wants one.

with hosts(tmp_path, {"alpha": Fake(), "beta": Fake(mounts="mount -t tmpfs -o size=1m tmpfs /dev/shm")}) as environment:
    subprocess.run(["ssh", *shlex.split(environment["PDSH_SSH_ARGS_APPEND"]), "alpha", "hostname"])
"""

import getpass
import os
import socket
import subprocess
import time
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path

import pytest

from toolkit.job.ranks import free_port

SSHD = Path("/usr/sbin/sshd")
needs_sshd = pytest.mark.skipif(not SSHD.exists(), reason="needs openssh-server, which is not installed")


def _may_mount() -> bool:
    try:
        return subprocess.run(["unshare", "-m", "true"], capture_output=True, check=False).returncode == 0
    except OSError:
        return False


needs_mounts = pytest.mark.skipif(not _may_mount(), reason="needs the right to a mount namespace: root")


@dataclass(frozen=True)
class Fake:
    """A host: a shell line of mounts that only it sees, variables of its sessions, whether anybody listens."""

    mounts: str = ""
    environment: str = ""  # sshd's SetEnv: NAME=value …
    listens: bool = True
    known: bool = True  # its key is in known_hosts
    key: str = "user"  # "stranger" is one that no host lets in


@contextmanager
def hosts(folder: Path, fakes: Mapping[str, Fake]) -> Iterator[dict[str, str]]:
    """The environment in which ssh and pdsh reach them by name."""
    folder.mkdir(exist_ok=True)
    if os.getuid() == 0:
        Path("/run/sshd").mkdir(exist_ok=True)  # sshd insists on it as root
    for name in ("server", "user", "stranger"):
        subprocess.run(["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", folder / name], check=True)
    (folder / "authorized").write_text((folder / "user.pub").read_text())
    ports = {name: free_port() for name in fakes}
    server = " ".join((folder / "server.pub").read_text().split()[:2])
    (folder / "known").write_text("".join(f"[127.0.0.1]:{ports[n]} {server}\n" for n, f in fakes.items() if f.known))
    (folder / "config").write_text("".join(_client(folder, n, f, ports[n]) for n, f in fakes.items()))
    with ExitStack() as stack:
        for name, fake in fakes.items():
            if fake.listens:
                stack.enter_context(_served(folder, name, fake, ports[name]))
        yield os.environ | {"PDSH_SSH_ARGS_APPEND": f"-F {folder}/config"}


def _client(folder: Path, name: str, fake: Fake, port: int) -> str:
    return (
        f"Host {name}\n HostName 127.0.0.1\n Port {port}\n User {getpass.getuser()}\n IdentitiesOnly yes\n"
        f" IdentityFile {folder}/{fake.key}\n UserKnownHostsFile {folder}/known\n StrictHostKeyChecking yes\n"
    )


@contextmanager
def _served(folder: Path, name: str, fake: Fake, port: int) -> Iterator[None]:
    config = folder / f"{name}.sshd"
    config.write_text(
        f"ListenAddress 127.0.0.1:{port}\nHostKey {folder}/server\nAuthorizedKeysFile {folder}/authorized\n"
        "StrictModes no\nUsePAM no\nPasswordAuthentication no\nKbdInteractiveAuthentication no\nPidFile none\n"
        "MaxStartups 100\n" + (f"SetEnv {fake.environment}\n" if fake.environment else "")
    )
    start = f"exec {SSHD} -D -e -f {config}"
    words = ["unshare", "-m", "sh", "-ec", f"{fake.mounts}\n{start}"] if fake.mounts else ["sh", "-c", start]
    with (folder / f"{name}.log").open("w") as log:
        process = subprocess.Popen(words, stderr=log, stdin=subprocess.DEVNULL)
    try:
        _await(port, process, folder / f"{name}.log")
        yield
    finally:
        process.terminate()
        process.wait(10)


def _await(port: int, process: subprocess.Popen[bytes], log: Path) -> None:
    for _ in range(100):
        with socket.socket() as probe:
            if probe.connect_ex(("127.0.0.1", port)) == 0:
                return
        assert process.poll() is None, log.read_text()
        time.sleep(0.05)
    raise TimeoutError(log.read_text())
