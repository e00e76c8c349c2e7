"""toolkit doctor on one host: every shortage is found, none is invented, and what is measured is true."""

import json
import resource
import subprocess
import sys
import time
from collections import namedtuple
from io import StringIO
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest
from composing import compose
from launching import ROOT, needs_nvme
from rich.console import Console
from safetensors.numpy import save_file
from sshd import needs_mounts

from toolkit.cluster.doctor import disk, host
from toolkit.cluster.doctor.allreduce import bus_gbs
from toolkit.cluster.doctor.examine import MARK, Report
from toolkit.cluster.doctor.host_job import Finding, HostJob
from toolkit.config.schema import Machine
from toolkit.job.ranks import free_port
from toolkit.plan import machines

ZERO = "deepspeed.zero_optimization"
SMI_HEAD = "| NVIDIA-SMI 550.54.15      Driver Version: 550.54.15      CUDA Version: 12.4     |"


def job(*overrides: str, device: str = "cpu", world: int = 2, slots: int = 2, hosts: int = 1) -> HostJob:
    return HostJob(compose("experiment=smoke", *overrides), device, world, slots, hosts, build=False)


@pytest.fixture
def two_ranks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("LOCAL_SIZE", "2")


@needs_mounts
@needs_nvme
def test_every_shortage_of_a_poor_host_is_found(tmp_path: Path) -> None:
    """A process with its own small disks, without compiler, libaio, the right to pin, and files to open."""
    for name in ("nvme", "runs"):
        (tmp_path / name).mkdir()
    overrides = ["zero=stage3", "offload=nvme", f"output_dir={tmp_path / 'runs'}"]
    overrides += [f"{ZERO}.{block}.nvme_path={tmp_path / 'nvme'}" for block in ("offload_optimizer", "offload_param")]
    request = {"config": compose("experiment=smoke", *overrides).model_dump(mode="json"), "environment": {}}
    request |= {"asked": "host", "world": 2, "slots": 2, "hosts": 1, "build": False}
    small = "\n".join(
        f"mount -t tmpfs -o size=1m small {f}" for f in ("/dev/shm", tmp_path / "nvme", tmp_path / "runs")
    )
    poor = f"""set -e
        {small}
        for file in /usr/lib/*/libaio.so.1*; do mount --bind /dev/null $file; done
        setpriv=$(command -v setpriv)
        ulimit -l 64; ulimit -n 500
        export PATH=/nonexistent TORCH_EXTENSIONS_DIR={tmp_path / "ops"} PYTHONPATH={ROOT}
        exec $setpriv --bounding-set -ipc_lock --inh-caps -ipc_lock {sys.executable} -m toolkit.cluster.doctor"""
    done = subprocess.run(
        ["unshare", "-m", "bash", "-c", poor], input=json.dumps(request), cwd=ROOT,
        capture_output=True, text=True, timeout=120, check=False,
    )  # fmt: skip
    answers = [line for line in done.stdout.splitlines() if line.startswith(MARK)]
    assert answers, done.stderr
    found = {f["name"]: f for f in json.loads(answers[0].removeprefix(MARK))["findings"]}
    bad = {name: f["state"] for name, f in found.items() if f["state"] not in ("ok", "skipped")}
    assert bad == {
        "shared memory": "fail", "NVMe space": "fail", "checkpoints": "fail", "compiler": "fail", "libaio": "fail",
        "memlock": "warn", "open files": "warn", "ops": "warn",
    }  # fmt: skip
    assert all(found[name]["way_out"] for name in bad)
    assert "g++: missing" in found["compiler"]["value"] and "apt install g++" in found["compiler"]["way_out"]
    assert found["memlock"]["value"] == "64 KiB" and found["open files"]["value"] == "500"


@pytest.mark.parametrize(
    ("overrides", "written"),  # bytes of checkpoints/step-2, two ranks, seen with DeepSpeed 0.19.8
    [
        ("zero=stage0", 7_606_635),
        ("zero=stage0 optimizer=sgd", 5_081_037),
        ("zero=stage1", 10_101_511),
        ("zero=stage2", 10_101_511),
        ("zero=stage2 offload=cpu optimizer=lion", 10_101_574),
        ("zero=stage2 precision=bf16", 8_845_265),
        ("zero=stage3", 7_611_144),
        ("zero=stage3 precision=bf16", 7_611_410),
        ("zero=stage3 offload=nvme", 7_682_667),
        ("zero=stage1 pipeline=two", 14_738_238),
    ],
)
def test_a_checkpoint_is_as_large_as_those_that_were_written(overrides: str, written: int) -> None:
    assert job(*overrides.split()).checkpoint_bytes == pytest.approx(written, rel=0.02)


def test_parameters_are_those_of_the_model() -> None:
    bert, translator, linear = (
        HostJob(compose(*overrides), "cpu", 2, 2, 1, build=False).parameters
        for overrides in (["model=bert_base"], ["task=translate", "model=transformer_tiny"], ["task=linear"])
    )
    assert bert == 110_106_428  # google-bert/bert-base-uncased, both heads
    assert translator is not None and linear is None


def test_parameters_of_a_model_without_a_plan_are_those_of_its_files(tmp_path: Path) -> None:
    """A file's head alone is read; a host that has no files does not know, and nothing is downloaded."""
    (tmp_path / "config.json").write_text('{"model_type": "roberta"}')
    weights = {"a": np.zeros((3, 4), np.float32), "b": np.zeros(5, np.float16)}
    save_file(weights, tmp_path / "model-00001-of-00002.safetensors")
    save_file({"c": np.zeros((2, 2, 2), np.float32)}, tmp_path / "model-00002-of-00002.safetensors")
    assert job(f"model.weights={tmp_path}").parameters == 12 + 5 + 8
    assert job("model.weights=/nowhere/bert").parameters is None
    assert job("model.weights=nobody/has-this").parameters is None


def test_a_size_that_is_not_known_is_said_and_not_taken_for_good(tmp_path: Path, two_ranks: None) -> None:
    unknown = job("model.weights=/nowhere/bert", "offload=cpu", f"output_dir={tmp_path}")
    for found in (disk.checkpoints(unknown), host.memory(unknown), disk.swap_space(tmp_path, None, named=True)):
        assert found.state == "warn" and found.rule == "the model's size is not known here"


@pytest.mark.alone
def test_a_disk_is_measured_and_left_as_it_was(tmp_path: Path) -> None:
    start = time.monotonic()
    found = disk.speed(tmp_path, 32 * 2**20)
    seconds = time.monotonic() - start
    assert not list(tmp_path.iterdir())
    slowest = 32 * 2**20 / seconds / 1e9  # neither way can have taken longer than both and all the rest
    assert found.write_gbs > slowest and found.read_gbs > slowest


def test_the_op_for_shared_memory_counts_where_all_ranks_share_a_host(two_ranks: None) -> None:
    alone, several = disk.shared_memory(job()), disk.shared_memory(job("batch.micro_size=4", world=4, hosts=2))
    assert alone.rule.startswith("132 MiB") and several.rule.startswith("48 KiB")


def test_a_drive_that_is_not_mounted_is_said(tmp_path: Path) -> None:
    found = disk.swap_space(tmp_path / "nvme0", 1, named=True)
    assert found.state == "warn" and f"on the disk of {tmp_path}" in found.value
    assert disk.swap_space(tmp_path / "run", 1, named=False).state == "ok"


def test_a_disk_that_cannot_be_written_is_named(tmp_path: Path, two_ranks: None) -> None:
    (tmp_path / "file").touch()
    assert disk.checkpoints(job(f"output_dir={tmp_path / 'file' / 'runs'}")).state == "fail"


def test_what_a_configuration_does_not_need_is_not_asked_for(two_ranks: None) -> None:
    found = {f.name: f for f in host.findings(job("zero=stage0"), Console(quiet=True))}
    assert {n for n, f in found.items() if f.state == "skipped"} >= {"libaio", "memlock", "NVMe", "host memory", "GPUs"}
    assert not [f for f in found.values() if f.state == "fail"]


def test_a_configuration_that_suits_no_such_device_is_said() -> None:
    found = host.findings(job("precision=fp16"), None)
    assert found[0].state == "fail" and "fp16" in found[0].value


def test_a_model_too_large_for_the_hosts_memory_does_not_fit(monkeypatch: pytest.MonkeyPatch) -> None:
    memory = namedtuple("memory", "available")
    large = job("offload=cpu", "model=bert_large", "tokenizer.vocab_size=30522")
    # 336 million parameters of 20 bytes and a buffer for the largest: the plan's 6.5 GiB
    for available, state in ((6 * 2**30, "fail"), (7 * 2**30, "ok")):
        monkeypatch.setattr(psutil, "virtual_memory", lambda a=available: memory(a))
        assert host.memory(large).state == state


def test_a_container_has_the_memory_of_its_group(tmp_path: Path) -> None:
    (tmp_path / "memory.max").write_text("3000000\n")
    (tmp_path / "memory.current").write_text("1000000\n")
    assert host._free_memory(tmp_path) == 2_000_000
    (tmp_path / "memory.max").write_text("max\n")
    assert host._free_memory(tmp_path) > 2_000_000
    (tmp_path / "memory").mkdir()  # version 1
    (tmp_path / "memory" / "memory.limit_in_bytes").write_text("3000000\n")
    (tmp_path / "memory" / "memory.usage_in_bytes").write_text("500000\n")
    assert host._free_memory(tmp_path) == 2_500_000


def test_ranks_that_do_not_come_are_named() -> None:
    """Two of three ranks: they end soon, and rank 0 says who is missing."""
    request = {"device": "cpu", "first": 0, "slots": 2, "world": 3, "address": "127.0.0.1", "port": free_port()}
    request |= {"asked": "all-reduce", "output_dir": "runs", "patience": 3, "environment": {}}
    words = [sys.executable, "-m", "toolkit.cluster.doctor"]
    done = subprocess.run(words, input=json.dumps(request), cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout.removeprefix(MARK)) == {"missing": [2]}


def test_bus_bandwidth_is_what_nccl_tests_call_so() -> None:
    assert bus_gbs(10**9, 1.0, 2) == 1.0 and bus_gbs(10**9, 1.0, 8) == 1.75


def test_nvidia_smi_is_read(tmp_path: Path) -> None:
    tool = tmp_path / "nvidia-smi"
    for said, versions in ((SMI_HEAD, ("550.54.15", "12.4")), ("No devices were found", (None, None))):
        tool.write_text(f"#!/bin/sh\necho '{said}'\n")
        tool.chmod(0o755)
        assert host.driver_versions(str(tool)) == versions
    tool.write_text("#!/bin/sh\nexit 9\n")
    assert host.driver_versions(str(tool)) == host.driver_versions("nvidia-smi-is-not-here") == (None, None)


@pytest.mark.parametrize(
    ("machine", "count", "in_use", "state"),
    [("this", 2, False, "ok"), ("h100", 2, False, "ok"), ("this", 1, False, "fail"), ("this", 2, True, "warn"),
     ("a100_80gb", 2, False, "warn")],
)  # fmt: skip
def test_gpus_are_counted_free_and_those_of_the_machine(machine: str, count: int, in_use: bool, state: str) -> None:
    one = job(f"machine={machine}", device="cuda")
    found = host._rated_gpus(one, "GPUs", ["NVIDIA H100 80GB HBM3"], count, in_use)
    assert found.state == state and bool(found.way_out) == (state != "ok")


def test_gpus_that_torch_leaves_idle_are_said_unless_that_is_meant(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(machines, "here", lambda: Machine(device_name="NVIDIA L4", devices_per_node=2))
    monkeypatch.delenv("DS_ACCELERATOR", raising=False)
    found = host.gpus(job())
    assert found.state == "fail" and "torch's build for CUDA" in found.way_out and found.value.startswith("2 x NVIDIA")
    monkeypatch.setenv("DS_ACCELERATOR", "cpu")
    assert host.gpus(job()).state == "skipped"
    assert host.gpus(job("machine=h100")).state == "fail"


def test_a_driver_older_than_torchs_cuda_does_not_fit(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(host, "driver_versions", lambda: ("550.54.15", "12.4"))
    for built, state in (("12.8", "ok"), ("13.0", "fail")):
        monkeypatch.setattr("torch.version.cuda", built)
        assert host.driver(job(device="cuda")).state == state


def test_open_files_are_counted_for_the_whole_job() -> None:
    soft = resource.getrlimit(resource.RLIMIT_NOFILE)[0]
    assert host.open_files(job(world=(soft - 512) // 4)).state == "ok"
    assert host.open_files(job(world=soft)).state == "warn"


def test_the_table_shows_findings_by_host_and_the_verdict_counts_them() -> None:
    findings = [
        ("alpha", Finding("ssh", "ok", "0.1 s")),
        ("beta", Finding("ssh", "fail", "[x] refused", "key", "Mend")),
    ]
    report = Report(2, [*findings, ("beta", Finding("clock", "warn", "+2 s"))])
    console = Console(width=100, file=StringIO())
    console.print(report.listing())
    text = console.file.getvalue()
    assert text.index("alpha") < text.index("beta") and "[x] refused" in text and "Mend" in text
    assert report.verdict == "Does not fit: 1 failed, 1 warning."
    assert json.loads(report.as_json())["fits"] is False


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--world", "0"], "--world 0: a job has at least one rank."),
        (["--world", "2", "--hostfile", "hosts"], "the hostfile's slots say how many"),
        (["--hostfile", "none"], "--hostfile none: "),
        (["zero=stage9"], "zero=stage9: no such option."),
    ],
)
def test_a_wrong_question_is_one_line(arguments: list[str], message: str, capsys: Any) -> None:
    from toolkit.cli.main import main

    with pytest.raises(SystemExit) as ended:
        main(["doctor", *arguments])
    error = capsys.readouterr().err
    assert ended.value.code == 2 and message in error and len(error.splitlines()) == 1
