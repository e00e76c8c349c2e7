"""The ZeRO paper's tables, cell by cell, from its own accounting of 16 bytes a parameter."""

import math

import pytest

from toolkit.errors import ConfigError
from toolkit.plan.paper import published, zero_bytes, zero_largest, zero_volume

TABLE1, TABLE2 = published("zero_table1"), published("zero_table2")
CELLS = [
    (world, model, stage, printed)
    for world, row in TABLE1["gb"].items()
    for model, numbers in row.items()
    for stage, printed in enumerate(numbers, start=1)
]


def as_printed(value: float, printed: float) -> float:
    """``value`` to as many digits as the paper prints: integers are cut off, decimals rounded half up."""
    places = len(str(printed).partition(".")[2])
    return math.floor(value * 10**places + (0.5 if places else 0)) / 10**places


@pytest.mark.parametrize(("world", "model", "stage", "printed"), CELLS)
def test_a_cell_of_table_1(world: int, model: str, stage: int, printed: float) -> None:
    gb = zero_bytes(TABLE1["parameters"][model], stage=stage, world=world) / 1e9
    assert as_printed(gb, printed) == printed


def test_table_1_is_whole() -> None:
    assert len(CELLS) == 54 and list(TABLE1["gb"]) == [4**n for n in range(6)]


@pytest.mark.parametrize("stage", range(4))
def test_the_largest_models_of_table_2(stage: int) -> None:
    memory, world = TABLE2["device_gb"] * 1e9, TABLE2["data_parallel"]
    first = TABLE2["billions"][1][stage]
    assert round(zero_largest(memory, stage=stage, world=world) / 1e9, 1) == first
    for split, row in TABLE2["billions"].items():
        # 512, 1024 and 2048 are printed as 0.5T, 1T and 2T
        assert row[stage] == pytest.approx(split * first, rel=1e-9 if row[stage] < 500 else 0.025)


def test_figure_1() -> None:
    figure = published("zero_figure1")
    for stage, printed in enumerate(figure["gb"]):
        gb = zero_bytes(figure["parameters"], stage=stage, world=figure["data_parallel"]) / 1e9
        assert as_printed(gb, printed) == printed


def test_communication_volumes() -> None:
    assert [zero_volume(1, stage=stage) for stage in range(4)] == published("zero_communication")["volume"]


def test_every_published_number_has_its_source() -> None:
    for name in ("zero_table1", "zero_table2", "zero_figure1", "zero_communication"):
        assert "1910.02054" in published(name)["source"]
    with pytest.raises(ConfigError, match="Did you mean 'zero_table1'"):
        published("zero_tabel1")
