"""A real calibration on two CPU ranks: what it stores, against measurements of its own, and what plans make of it."""

import json
import os
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from statistics import median
from typing import Any
from unittest import mock

import psutil
import pytest
import torch
from composing import compose
from launching import ROOT, build_ops, data_cache, launch, toolkit_command

from toolkit.cluster.calibrate import _with_earlier_steps, capped
from toolkit.config.schema import Machine, cache_dir
from toolkit.plan.machines import here, known, measured_tflops, parsed, stored

pytestmark = pytest.mark.alone
MINI = (
    "experiment=demo", "model=bert_mini", "tokenizer.vocab_size=512", "data.max_length=128", "data.max_predictions=20",
    "batch.micro_size=8", "batch.global_size=16",
)  # fmt: skip


def plan(*arguments: str, cwd: Path = ROOT) -> subprocess.CompletedProcess[str]:
    return toolkit_command("plan", *arguments, cwd=cwd)


def planned(*arguments: str) -> dict[str, Any]:
    done = plan(*MINI, *arguments, "--json")
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)  # type: ignore[no-any-return]


def shares(found: dict[str, Any]) -> dict[str, float]:
    return {s["name"]: s["seconds"] for s in found["speed"]["shares"]}


@pytest.fixture(scope="module", autouse=True)
def calibration(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """What `toolkit plan … --calibrate --json` printed, and how busy others kept the cores before.

    The cache of rates is an empty one, that of ops the user's.
    """
    build_ops()
    busy = psutil.cpu_percent(interval=1)
    folder = tmp_path_factory.mktemp("calibrate")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TORCH_EXTENSIONS_DIR", os.environ.get("TORCH_EXTENSIONS_DIR") or str(cache_dir("ops")))
        patch.setenv("XDG_CACHE_HOME", str(folder / "cache"))
        arguments = (*MINI, f"data.cache_dir={data_cache()}", "--calibrate", "--json")
        command = [str(Path(sys.executable).parent / "toolkit"), "plan", *arguments, f"output_dir={folder}/out"]
        done = subprocess.run(command, capture_output=True, text=True, check=False, cwd=folder)
        assert done.returncode == 0, done.stderr
        assert [p.name for p in folder.iterdir()] == ["cache"], "the job's folder is gone"
        yield done, busy


@pytest.fixture
def file() -> Path:
    return stored(Machine(device="cpu", devices_per_node=2))


def test_it_stores_a_machine_and_plans_with_it(calibration: Any, file: Path) -> None:
    machine = parsed(file.read_text())
    assert [p.name for p in file.parent.iterdir()] == [file.name], "nothing of another name"
    done, _ = calibration
    found = json.loads(done.stdout)
    assert found["layout"]["data"] == machine.devices_per_node == 2 and found["speed"]["step_seconds"] > 0
    rate = machine.peak_tflops["fp32"] * machine.efficiency["fp32"] * 1e12
    assert shares(found)["computing"] == pytest.approx(found["speed"]["flops"] / 2 / rate)
    assert f"reach {machine.efficiency['fp32']:.0%} of their rate in fp32" in found["assumptions"][0]
    assert "measured by toolkit plan --calibrate" in found["assumptions"][0] and str(file) in done.stderr
    assert set(machine.measured) == {
        "peak_tflops", "launch_us", "efficiency", "bandwidth_gbs", "link_gbs", "pcie_gbs", "nvme_gbs"
    }  # fmt: skip


def test_its_rates_are_those_that_one_process_measures(file: Path) -> None:
    """Within a factor of two: other work on the machine comes and goes."""
    machine = parsed(file.read_text())
    source = torch.ones(2**26)
    target = torch.zeros(2**26)
    seconds = []
    for _ in range(5):
        start = time.perf_counter()
        target.copy_(source)
        seconds.append(time.perf_counter() - start)
    copied = source.nbytes / min(seconds) / 1e9
    torch.set_num_threads(1)
    assert 0.5 < machine.peak_tflops["fp32"] / measured_tflops("fp32", 1024) < 2
    assert machine.pcie_gbs and machine.bandwidth_gbs and machine.link_gbs and machine.nvme_gbs
    assert machine.device == "cpu" and machine.launch_us and 0.1 < machine.launch_us < 1000
    assert machine.pcie_gbs == pytest.approx(machine.bandwidth_gbs / 2)
    assert copied / 4 < machine.pcie_gbs < 2 * copied, "both ranks copy at once, and may share one memory's rate"
    assert machine.link_gbs < machine.bandwidth_gbs


def test_a_plan_of_another_layout_tells_the_time_of_a_real_run(calibration: Any, tmp_path: Path) -> None:
    """Seen on two idle cores: 1.04 to 1.08 of the run's; while other jobs came and went, down to 0.51."""
    other = (*MINI, "zero=stage1", "batch.global_size=32")
    predicted = planned("--world", "2", *other)["speed"]["step_seconds"]
    busy = [calibration[1], psutil.cpu_percent(interval=1)]
    run = launch(tmp_path, *other, "train.steps=7", "train.log_every=1", "train.eval_samples=8", "schedule.warmup=2",
                 f"output_dir={tmp_path}", bare=True)  # fmt: skip
    measured = median(r["step_seconds"] for r in run.steps if "step_seconds" in r)
    if max(*busy, psutil.cpu_percent(interval=1)) > 25:
        pytest.skip("other jobs keep the cores busy: neither the calibration nor the run tells anything")
    assert 1 / 2 < predicted / measured < 2


def test_what_is_given_wins() -> None:
    found, slow = (planned("--world", "2", *more) for more in ((), ("machine.link_gbs=0.001",)))
    before, after = shares(found), shares(slow)
    assert after["computing"] == before["computing"]
    rate = found["machine"]["link_gbs"]
    reduced = "gradients, all-reduce"
    assert after[reduced] / before[reduced] == pytest.approx(rate / (0.001 * 0.8)), "a sheet's links need an allowance"


def test_another_number_of_ranks_on_a_cpu_is_not_calibrated() -> None:
    done = plan(*MINI, "--world", "1")
    assert "No time without machine.peak_tflops.fp32: machine=this does not say." in done.stdout
    assert "Measure it: toolkit plan … --world 1 --calibrate." in done.stdout


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("name: [", "while parsing"),
        ("name: this\nspeed: 3\n", "machine.speed: unknown key"),
        ("- 1\n", "machine=[1]: Input should be"),
        ("", "machine=None: Input should be"),
        ("device_name: NVIDIA L4\nmeasured: [link_gbs]\n", "it is of NVIDIA L4"),
        ("name: this\n", "says measured: []"),
        ("peak_tflops:\n  fp32: ${oc.env:HOME}\n", "machine.peak_tflops.fp32='${oc.env:HOME}'"),
    ],
    ids=["no YAML", "an unknown key", "a list", "empty", "of another device", "no rates", "an interpolation"],
)
def test_a_damaged_file_is_one_clear_line(text: str, said: str, file: Path) -> None:
    good = file.read_text()
    try:
        file.write_text(text)
        done = plan(*MINI, "--world", "2")
    finally:
        file.write_text(good)
    assert done.returncode == 2 and done.stderr.count("\n") == 1
    assert done.stderr.startswith(f"error: {file}: not a calibration of this machine: ") and said in done.stderr
    assert done.stderr.endswith("Delete it, or plan with --calibrate to measure again.\n")


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["machine=h100"], "machine=h100 with --calibrate: only this host can be measured. Drop one."),
        (["batch.global_size=17"], "batch.global_size=17 is no multiple of batch.micro_size=8 x 2 ranks"),
        (["--world", "0"], "--world 0: must be 1 or more."),
        (["output_dir=/proc/none"], "output_dir=/proc/none: /proc: "),
    ],
    ids=lambda x: x[0] if isinstance(x, list) else "",
)
def test_what_cannot_run_is_refused_before_anything_starts(
    arguments: Sequence[str], said: str, tmp_path: Path, file: Path
) -> None:
    before = file.read_text()
    done = plan(*MINI, *arguments, "--calibrate", cwd=tmp_path)
    assert done.returncode == 2 and done.stderr.startswith(f"error: {said}") and done.stderr.count("\n") == 1
    assert file.read_text() == before and not list(tmp_path.iterdir())


def test_a_cache_that_cannot_be_written_is_refused_first(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", "/proc/none")
    done = plan(*MINI, "--calibrate", cwd=tmp_path)
    assert done.returncode == 2 and done.stderr.startswith("error: /proc/none/deepspeed-toolkit/machines: No such file")
    assert "Measuring" not in done.stderr


@pytest.fixture
def two_gpus(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A driver's tool that lists two GPUs, which PyTorch does not see."""
    tool = tmp_path / "bin" / "nvidia-smi"
    tool.parent.mkdir()
    tool.write_text("#!/bin/sh\nprintf 'NVIDIA L4\\nNVIDIA L4\\n'\n")
    tool.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tool.parent}:{os.environ['PATH']}")


def test_gpus_that_pytorch_does_not_see_are_refused_and_nothing_is_left(two_gpus: None, tmp_path: Path) -> None:
    done = plan(*MINI, "--world", "3", "--calibrate", cwd=tmp_path)
    assert done.stderr == "error: --world 3: this host has 2 GPUs. Lower it, or leave it out.\n"
    done = plan(*MINI, "--calibrate", cwd=tmp_path)
    errors = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
    assert done.returncode == 2 and len(errors) == 1
    assert errors[0].startswith("error: DeepSpeed's device is cpu, but a plan's is L4:")
    assert [p.name for p in tmp_path.iterdir()] == ["bin"]


def test_gpus_that_are_hidden_do_not_count(two_gpus: None, monkeypatch: pytest.MonkeyPatch) -> None:
    for visible, count in (("0,1", 2), ("1", 1), ("GPU-8f3b", 1), ("", 0)):
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
        found = here()
        assert (found.devices_per_node if found.device_name else 0) == count


def test_steps_in_another_type_keep_what_they_reached(tmp_path: Path) -> None:
    path = tmp_path / "this.yaml"
    path.write_text("efficiency: {fp32: 0.5, bf16: 0.3}\n")
    machine = Machine(measured=("efficiency",), efficiency={"bf16": 0.4})
    assert _with_earlier_steps(machine, path).efficiency == {"fp32": 0.5, "bf16": 0.4}
    path.write_text("{")
    assert _with_earlier_steps(machine, path).efficiency == {"bf16": 0.4}


@pytest.mark.parametrize(
    ("overrides", "accumulation", "kept"),
    [((), 8, 8), (("batch.global_size=4096",), 128, 8), (("batch.global_size=48",), 1, 1),
     (("batch.global_size=4096", "pipeline=two", "pipeline.stages=4", "zero=stage1"), 128, 16),
     (("batch.global_size=4096", "deepspeed.train_batch_size=4096"), 128, 8)],
)  # fmt: skip
def test_a_step_has_few_micro_batches_of_the_same_size(overrides: Sequence[str], accumulation: int, kept: int) -> None:
    """Of thousands a CPU would work for hours; whether a step has three or five hundred does not change its rate."""
    config = compose(*overrides)
    found = capped(config, accumulation)
    assert found.batch.micro_size == config.batch.micro_size and "train_batch_size" not in found.deepspeed
    assert found.batch.global_size * accumulation == config.batch.global_size * kept


def test_a_step_of_tokens_is_cut_as_well() -> None:
    found = capped(compose("task=translate", "model=transformer_tiny", "batch.tokens=32000"), 16)
    assert (found.batch.tokens, found.batch.global_size) == (16000, 128)


def test_what_was_measured_elsewhere_is_no_data_sheet() -> None:
    own = Machine(name="mine", device_name="H100 80GB HBM3", peak_tflops={"bf16": 700}, measured=("peak_tflops",))
    sheet = known.__wrapped__("NVIDIA H100 80GB HBM3")
    with mock.patch("toolkit.plan.machines.table", lambda: [own, sheet]):
        assert known.__wrapped__("NVIDIA H100 80GB HBM3") == sheet


def test_a_hosts_gpus_are_one_machine_for_any_number_of_ranks(two_gpus: None) -> None:
    file = stored(Machine(device_name="L4"))
    try:
        file.write_text("device_name: L4\npeak_tflops: {fp16: 100}\nmeasured: [peak_tflops]\nsource: measured\n")
        for world in ("1", "2"):
            found = planned("--world", world, "precision=fp16")
            (computing,) = (s["formula"] for s in found["speed"]["shares"] if s["name"] == "computing")
            assert "(100 TFLOP/s x" in computing and found["machine"]["memory_gib"] == 24
            assert found["speed"]["peak_tflops"] == 121, "MFU is the sheet's"
            assert found["machine"]["devices_per_node"] == 2
    finally:
        file.unlink()
