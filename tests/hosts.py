"""Network namespaces as the hosts of a cluster: each has an address, a name, an sshd, a /dev/shm of its own.

with hosts("n1", "n2") as (first, second):
    start_on(first, command)                            # as if logged in there; `ssh n2` works
    second.cut()                                        # its cable is pulled

Needs root, iproute2, util-linux, openssh and pdsh; `needs_hosts` skips without. The file system is shared.
"""

import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

import psutil
import pytest

NEEDED = ("ip", "nsenter", "unshare", "ssh", "ssh-keygen", "sshd", "pdsh")
SSHD = shutil.which("sshd") or "/usr/sbin/sshd"


def _lacking() -> str:
    if sys.platform != "linux" or os.getuid() != 0:
        return "network namespaces as hosts need root on Linux"
    missing = [name for name in NEEDED if not shutil.which(name, path=os.environ["PATH"] + ":/usr/sbin:/sbin")]
    if missing:
        return f"needs {', '.join(missing)}"
    allowed = subprocess.run(["unshare", "--net", "--mount", "--uts", "true"], capture_output=True, check=False)
    return f"this root may make no namespaces: {allowed.stderr.decode().strip()}" if allowed.returncode else ""


needs_hosts = pytest.mark.skipif(bool(_lacking()), reason=_lacking() or "-")


@dataclass(frozen=True)
class Host:
    """One namespace; ``pid`` is its sshd's."""

    name: str
    address: str
    namespace: str
    pid: int

    def inside(self, *command: str) -> list[str]:
        """``command`` as on this host, in this directory."""
        return ["nsenter", "-t", str(self.pid), "-n", "-m", "-u", "env", "-C", str(Path.cwd()), *command]

    def run(self, *command: str) -> None:
        _run(*self.inside(*command))

    def processes(self) -> list[psutil.Process]:
        return [psutil.Process(int(pid)) for pid in _pids(self.namespace) if psutil.pid_exists(int(pid))]

    def cut(self) -> None:
        _run("ip", "-n", self.namespace, "link", "set", "eth0", "down")

    def join(self) -> None:
        _run("ip", "-n", self.namespace, "link", "set", "eth0", "up")


@contextmanager
def hosts(*names: str) -> Iterator[list[Host]]:
    """Up, connected by a bridge, and away again with all that ran there."""
    tag = f"tk{os.getpid() % 100000}"
    folder = Path(tempfile.mkdtemp(prefix="hosts-"))
    addresses = {name: f"10.213.77.{i}" for i, name in enumerate(names, 1)}
    with ExitStack() as stack:
        stack.callback(shutil.rmtree, folder, ignore_errors=True)
        _write_keys(folder, addresses)
        for namespace in (f"{tag}-switch", *(f"{tag}-{n}" for n in names)):
            _run("ip", "netns", "add", namespace)
            stack.callback(_run, "ip", "netns", "del", namespace)
            stack.callback(_end_all, namespace)
        _run("ip", "-n", f"{tag}-switch", "link", "add", "br0", "type", "bridge")
        _run("ip", "-n", f"{tag}-switch", "link", "set", "br0", "up")
        yield [_host(tag, folder, name, address) for name, address in addresses.items()]


def _host(tag: str, folder: Path, name: str, address: str) -> Host:
    namespace, switch, port = f"{tag}-{name}", f"{tag}-switch", f"{name}-port"[-15:]
    _run("ip", "-n", switch, "link", "add", port, "type", "veth", "peer", "name", "eth0", "netns", namespace)
    _run("ip", "-n", switch, "link", "set", port, "master", "br0", "up")
    for link in ("lo", "eth0"):
        _run("ip", "-n", namespace, "link", "set", link, "up")
    _run("ip", "-n", namespace, "addr", "add", f"{address}/24", "dev", "eth0")
    script = f"""set -e
        hostname {name}
        mount --bind {folder}/hosts /etc/hosts
        mkdir -p {Path.home()}/.ssh /run/sshd
        mount --bind {folder}/ssh {Path.home()}/.ssh
        mount -t tmpfs shm /dev/shm
        exec {SSHD} -D -e -f {folder}/sshd_config"""
    command = ["ip", "netns", "exec", namespace, "unshare", "--mount", "--uts", "bash", "-c", script]
    with (folder / f"{name}.log").open("wb") as log:
        process = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=log, stderr=log, start_new_session=True)
    host = Host(name, address, namespace, process.pid)  # ip, unshare and bash exec one another
    for _ in range(100):
        if "listening" in (folder / f"{name}.log").read_text():
            return host
        time.sleep(0.05)
    raise AssertionError(f"no sshd on {name}:\n{(folder / f'{name}.log').read_text()}")


def _write_keys(folder: Path, addresses: dict[str, str]) -> None:
    (folder / "ssh").mkdir(mode=0o700)
    _run("ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", str(folder / "ssh/id_ed25519"))
    _run("ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", str(folder / "host_key"))
    public = (folder / "ssh/id_ed25519.pub").read_text()
    (folder / "ssh/authorized_keys").write_text(public)
    (folder / "ssh/config").write_text("StrictHostKeyChecking no\nUserKnownHostsFile /dev/null\nLogLevel ERROR\n")
    (folder / "hosts").write_text(
        "127.0.0.1 localhost\n" + "".join(f"{address} {name}\n" for name, address in addresses.items())
    )
    (folder / "sshd_config").write_text(
        f"HostKey {folder}/host_key\nPidFile none\nUsePAM no\nStrictModes no\nPermitRootLogin prohibit-password\n"
        "PasswordAuthentication no\nPrintMotd no\n"
    )


def _pids(namespace: str) -> list[str]:
    command = ["ip", "netns", "pids", namespace]
    return subprocess.run(command, capture_output=True, text=True, check=False).stdout.split()


def _end_all(namespace: str) -> None:
    for _ in range(50):
        alive = [int(pid) for pid in _pids(namespace) if psutil.pid_exists(int(pid))]
        if not alive:
            return
        for pid in alive:
            with suppress(psutil.NoSuchProcess):
                psutil.Process(pid).kill()
        time.sleep(0.05)


def _run(*command: str) -> None:
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, f"{' '.join(command)}: {done.stderr}"
