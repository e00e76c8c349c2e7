"""Memory as it is: bytes by category against closed forms, and the recipe that compares configurations."""

import csv
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from launching import ROOT, launch
from studies import step_memory
from studies.step_memory import MIB, Tracker, combinations, label
from torch import nn

from toolkit.cluster.launchers.job import load_recipe
from toolkit.config.compose import compose


def test_weights_gradients_and_states_are_counted_once_each() -> None:
    model = nn.Sequential(nn.Linear(64, 128), nn.Linear(128, 64, bias=False))
    model[1].weight = nn.Parameter(model[0].weight.detach().T)  # a storage shared is a storage
    size = 4 * (64 * 128 + 128)
    optimizer = torch.optim.AdamW(model.parameters())
    ds = SimpleNamespace(module=model, optimizer=optimizer, config={}, _take_model_step=optimizer.step)
    for _ in range(2):
        optimizer.zero_grad()
        inputs = torch.randn(10, 64)
        with Tracker(ds) as tracker:
            model(inputs).sum().backward()
            ds._take_model_step()
    states = 2 * 4 * (2 * 64 * 128 + 128) + 3 * 4  # two for each parameter, tied or not, and a step count
    assert tracker.peak["weights"] == size
    assert tracker.peak["gradients"] == 4 * (2 * 64 * 128 + 128)
    assert tracker.peak["optimizer"] == states
    assert tracker.peak["activations"] == 4 * 10 * (64 + 128)
    assert ds._take_model_step == optimizer.step, "the tracker leaves the engine as it was"


def test_weights_gathered_for_a_step_are_no_activations_and_gradients_no_workspace() -> None:
    model = nn.Sequential(nn.Linear(64, 64), nn.Linear(64, 64))
    ds = SimpleNamespace(module=model, optimizer=torch.optim.SGD(model.parameters()), config={}, _take_model_step=None)
    inputs = torch.randn(10, 64, requires_grad=True)
    with Tracker(ds) as tracker:
        for layer in model:
            layer.weight.data = layer.weight.data.clone()  # as ZeRO 3 does
        gathered = tracker.peak["workspace"]
        model(inputs).sum().backward()
    assert tracker.peak["activations"] == 2 * inputs.nbytes
    assert gathered == 2 * 4 * 64 * 64 and tracker.peak["gradients"] == gathered + 2 * 4 * 64
    assert tracker.peak["workspace"] < 1.8 * gathered


def test_the_layouts_to_compare_are_all_or_the_one_given() -> None:
    recipe = load_recipe(ROOT / "recipes/memory.py")

    def compared(*typed: str) -> list[dict[str, str]]:
        return combinations(compose(recipe.completed(list(typed)), recipe.config))

    every = compared("model=bert_mini")
    assert len(every) == len(step_memory.LAYOUTS) * len(step_memory.ACTIVATIONS)
    assert every[0] == {"zero": "stage0", "offload": "none", "activation": "none"}
    assert label(every[-1]) == {"layout": "stage3 + nvme", "activation": "recompute_offload"}
    assert every == compared("activation=null")
    for offload in ("none", "cpu", "cpu_params", "nvme"):
        one = {"zero": "stage3", "offload": offload, "activation": "offload_cpu"}
        assert compared(*step_memory.overrides(one)) == [one]
    given = compared("offload='cpu'")
    assert [one["activation"] for one in given] == list(step_memory.ACTIVATIONS)
    assert {label(one)["layout"] for one in given} == {"stage2 + cpu"}


def test_the_recipe_measures_every_way_to_keep_activations(tmp_path: Path) -> None:
    result = launch(tmp_path, "zero=stage2", "offload=cpu", "model.num_hidden_layers=6", recipe="memory")
    rows = {r["activation"]: r for r in csv.DictReader((result.dir / "memory.csv").open())}
    assert list(rows) == list(step_memory.ACTIVATIONS)
    none, recompute, moved, both = (
        {k: float(v) for k, v in r.items() if k.endswith(("_mib", "_seconds"))} for r in rows.values()
    )
    for row in (none, recompute, moved, both):
        assert row["peak_mib"] == pytest.approx(sum(row[f"{c}_mib"] for c in step_memory.DEVICE))
        assert row["weights_mib"] == none["weights_mib"] > 0
        assert row["optimizer_mib"] == 0 and row["offloaded_mib"] > 1.5 * row["weights_mib"], "a half of 12 bytes"
        assert row["step_seconds"] > 0
    assert none["saved_mib"] > 2 * max(r["saved_mib"] for r in (recompute, moved, both))
    assert none["moved_mib"] == recompute["moved_mib"] == 0
    assert moved["moved_mib"] > 4 * both["moved_mib"] > 0
    assert both["moved_mib"] * MIB == 6 * 4 * 32 * 32 * 4, "six layers' inputs: 4 x 32 x 32 floats"
    assert all((result.dir / f"memory.{kind}").stat().st_size > 5000 for kind in ("png", "svg"))
    assert "recompute_offload" in result.stdout


@pytest.mark.parametrize("keys", [["peak_mib"], ["peak_mib", *(f"{c}_mib" for c in step_memory.DEVICE)]])
def test_what_a_gpu_tells_is_plotted_as_well(keys: list[str], tmp_path: Path) -> None:
    rows: list[dict[str, Any]] = [
        {"layout": layout, "activation": "none", "step_seconds": 0.1, **dict.fromkeys(keys, 5.0)}
        for layout in ("stage0", "stage3")
    ]
    step_memory.plot(rows, tmp_path / "memory", "two layouts")
    assert "stage3   none" in (tmp_path / "memory.svg").read_text()
    assert step_memory.listing(rows).row_count == 2
