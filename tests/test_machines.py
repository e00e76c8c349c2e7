"""The table of devices: complete, found by the names that torch gives them, and printed."""

import re
import subprocess
import sys

import pytest
from launching import ROOT
from omegaconf import OmegaConf

from toolkit.cli.main import main
from toolkit.config.compose import compose
from toolkit.config.schema import Machine
from toolkit.errors import ConfigError, nearest
from toolkit.plan.machines import balance, known, peak_tflops, table

TABLE = {m.name: m for m in table()}

# torch.cuda.get_device_name() of real devices
NAMES = {
    "Tesla K80": "k80",
    "Tesla P100-PCIE-16GB": "p100_pcie",
    "Tesla P100-SXM2-16GB": "p100",
    "Tesla V100-SXM2-16GB": "v100_16gb",
    "Tesla V100-SXM2-32GB": "v100_32gb",
    "Tesla V100-PCIE-16GB": "v100_pcie_16gb",
    "Tesla V100-PCIE-32GB": "v100_pcie_32gb",
    "Tesla T4": "t4",
    "A100-SXM4-40GB": "a100_40gb",
    "NVIDIA A100-SXM4-40GB": "a100_40gb",
    "NVIDIA A100-PCIE-40GB": "a100_40gb",
    "NVIDIA A100-SXM4-80GB": "a100_80gb",
    "NVIDIA A100-SXM-80GB": "a100_80gb",
    "NVIDIA A100 80GB PCIe": "a100_pcie_80gb",
    "NVIDIA A10": "a10",
    "NVIDIA L4": "l4",
    "NVIDIA L40S": "l40s",
    "NVIDIA H100 80GB HBM3": "h100",
    "NVIDIA H100 PCIe": "h100_pcie",
    "NVIDIA H100 NVL": "h100_nvl",
    "NVIDIA H200": "h200",
    "NVIDIA H200 NVL": "h200_nvl",
    "NVIDIA B200": "b200",
    "AMD Instinct MI250X": "mi250x",
    "AMD Instinct MI250X / MI250": "mi250x",
    "AMD Instinct MI300X": "mi300x",
    # Like one of the table's, but slower or faster than it
    "NVIDIA A10G": None,
    "NVIDIA L40": None,
    "NVIDIA GH200 480GB": None,
    "NVIDIA GB200": None,
    "NVIDIA A100-SXM4-40GB MIG 3g.20gb": None,
    "NVIDIA GeForce RTX 4090": None,
    "NVIDIA T400 4GB": None,
}


@pytest.mark.parametrize("name", NAMES)
def test_a_device_is_found_by_torchs_name_of_it(name: str) -> None:
    found = known(name)
    assert (found.name if found else None) == NAMES[name]


def test_every_device_with_a_name_is_looked_up_above() -> None:
    assert {m.name for m in TABLE.values() if m.device_name} == set(NAMES.values()) - {None}


def test_every_file_is_complete_and_named_as_its_machine() -> None:
    files = {p.stem: OmegaConf.to_container(OmegaConf.load(p)) for p in (ROOT / "conf" / "machine").glob("*.yaml")}
    assert set(files) == {*TABLE, "this"}
    for stem, keys in files.items():
        machine = Machine.model_validate(keys)
        assert machine.name == stem
        if stem != "this":
            assert machine.year and machine.memory_gib and machine.bandwidth_gbs and machine.peak_tflops["fp32"]
            assert machine.source and re.search(r"\b20[12]\d\b", machine.source), "a sheet and its year"


def test_rates_grow_as_inputs_shrink() -> None:
    for m in TABLE.values():
        peaks = [m.peak_tflops[d] for d in ("fp32", "tf32", "fp16") if d in m.peak_tflops]  # type: ignore[index]
        assert peaks == sorted(peaks), m.name
        assert m.peak_tflops.get("bf16", peaks[-1]) == peaks[-1], m.name


def test_the_ridge_is_flop_per_second_over_bytes_per_second() -> None:
    assert balance(TABLE["a100_40gb"], "bf16") == pytest.approx(312e12 / 1555e9)
    assert balance(TABLE["v100_32gb"], "bf16") is None
    assert balance(Machine(peak_tflops={"fp32": 1}), "fp32") is None


def test_a_peak_is_that_of_the_device_or_of_the_machine_chosen() -> None:
    assert peak_tflops(Machine(), "bf16", "NVIDIA L4") == 121
    assert peak_tflops(Machine(), "bf16", "Tesla T4") is None
    assert peak_tflops(Machine(), "bf16", "NVIDIA L40") is None
    chosen = compose(["machine=h100"]).machine
    assert peak_tflops(chosen, "bf16", "NVIDIA L4") == 989.4
    assert (peak_tflops(Machine(), "fp32", None) or 0) > 0


def command(*arguments: str) -> subprocess.CompletedProcess[str]:
    code = "import sys; from toolkit.cli.main import main; main(sys.argv[1:]); assert 'torch' not in sys.modules"
    run = [sys.executable, "-c", code, "machines", *arguments]
    return subprocess.run(run, capture_output=True, text=True, check=False, env={"PYTHONPATH": str(ROOT)})


def test_the_command_prints_all_of_them_in_eighty_columns() -> None:
    done = command("--dtype", "fp16")
    assert done.returncode == 0, done.stderr
    lines = done.stdout.split("k80 (Tesla K80): ")[0].splitlines()
    rows = {line.split()[0]: line.split() for line in lines if line.strip()}
    assert set(TABLE) < set(rows) and max(map(len, lines)) <= 80 and "…" not in done.stdout
    assert rows["h200"] == ["h200", "2024", "141", "4,800", "67", "494.7", "989.4", "989.4", "206.1"]
    assert rows["ipu_gc2"][:3] == ["ipu_gc2", "2018", "0.3"], "what is unknown is blank"
    assert all(f": {m.source}" in done.stdout for m in TABLE.values())
    years = [rows[name][1] for name in rows if name in TABLE]
    assert years == sorted(years)


def test_the_command_prints_one_with_its_source(capsys: pytest.CaptureFixture[str]) -> None:
    main(["machines", "h100"])
    out = capsys.readouterr().out
    assert "h100 (H100 80GB HBM3): NVIDIA H100 data sheet" in out and "h200" not in out
    with pytest.raises(SystemExit) as ended:
        main(["machines", "h10"])
    error = f"error: h10: no such machine.{nearest('h10', TABLE)} Known: k80"
    assert ended.value.code == 2 and capsys.readouterr().err.startswith(error)


def test_bad_numbers_are_refused() -> None:
    with pytest.raises(ConfigError, match=r"machine.bandwidth_gbs=0"):
        compose(["machine=h100", "machine.bandwidth_gbs=0"])
