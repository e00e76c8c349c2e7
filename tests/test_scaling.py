"""Bytes of the collectives against the ZeRO paper, the balance of ranks, and the recipe that compares worlds."""

import csv
import json
from pathlib import Path
from statistics import median

import pytest
import torch
import yaml
from launching import launch, launch_many, read
from studies import scaling
from transformers import BertConfig, BertForPreTraining

from toolkit.config.schema import Batch, RunConfig
from toolkit.engine.collectives import WIRE, _message, _size
from toolkit.errors import ConfigError
from toolkit.train.meter import Worked, conditions

MIB = 2**20
KEEPS_NOTHING = (
    "zero=stage3",
    *(
        f"deepspeed.zero_optimization.stage3_{key}=0"
        for key in ("param_persistence_threshold", "max_reuse_distance", "max_live_parameters")
    ),
)


def test_equal_ranks_are_balanced_and_unequal_ones_are_not() -> None:
    equal = conditions([Worked(sent=MIB, held=0.1, busy=2.0, peak=3.0)] * 4)
    assert equal == {"comm_mib": 1, "comm_share": 0.1, "work_balance": 1, "memory_balance": 1}
    unequal = conditions([Worked(MIB, 0.5, 1.0, 4.0), Worked(3 * MIB, 0.1, 2.0, 1.0)])
    assert unequal == {"comm_mib": 2, "comm_share": 0.1, "work_balance": 0.75, "memory_balance": 0.625}


def test_the_message_of_every_kind_of_call_is_found() -> None:
    one, two = torch.zeros(3), torch.zeros(5)
    assert _size(_message("all_reduce", (one, None, None, False), {})) == 12
    assert _size(_message("all_gather_into_tensor", (), {"output_tensor": two, "input_tensor": one})) == 12
    assert _size(_message("all_gather", (), {"tensor_list": [two], "tensor": one})) == 12
    assert _size(_message("all_gather_coalesced", ([two, two], [one, two]), {})) == 32
    assert _size(_message("reduce_scatter", (), {"output": one, "input_list": [one, two]})) == 32
    assert WIRE["all_reduce"](4) == WIRE["reduce_scatter"](4) + WIRE["all_gather"](4) / 4
    assert all(WIRE[name](1) == 0 for name in WIRE if "send" not in name)


def test_the_bytes_are_those_of_the_paper(tmp_path: Path) -> None:
    """ZeRO paper, section 7, in fp32 on two ranks: P parameters are P scattered, then as many gathered, and so on."""
    layouts = {"stage0": ("zero=stage0",), "stage2": ("zero=stage2",), "stage3": KEEPS_NOTHING}
    more = ("train.communication=true", "train.steps=4", "batch.global_size=8")
    launch_many(tmp_path, {name: [*layout, *more] for name, layout in layouts.items()})
    config = BertConfig(**json.loads((tmp_path / "stage0/model/config.json").read_text()))
    sizes = {name: p.nbytes / MIB for name, p in BertForPreTraining(config).named_parameters()}
    all_, table = sum(sizes.values()), sizes["bert.embeddings.word_embeddings.weight"]
    half = 1 / 2  # (n - 1) / n
    expected = {
        "stage0": 2 * half * all_,
        "stage2": 3 * half * all_,  # the paper's reduce-scatter is an all-reduce in DeepSpeed (0.19.8)
        "stage3": 3 * half * all_ + 2 * half * table,  # the decoder's tied weight is gathered for itself
    }
    for name, size in expected.items():
        sent = [r["comm_mib"] for r in read(tmp_path / name / "metrics.jsonl") if "comm_mib" in r]
        assert len(sent) == 2 and sent == pytest.approx([size] * 2, abs=500 / MIB), name  # and a few scalars
        held = [r["comm_share"] for r in read(tmp_path / name / "metrics.jsonl") if "comm_share" in r]
        assert all(0 < share < 1 for share in held)


def test_the_recipe_compares_numbers_of_ranks(tmp_path: Path) -> None:
    overrides = ("scaling.mode=both", "zero=stage2", "train.log_every=2", "task.objective=mlm")
    result = launch(tmp_path, *overrides, ranks=0, recipe="scaling")
    rows = list(csv.DictReader((result.dir / "scaling.csv").open()))
    assert [(r["mode"], r["ranks"], r["global_size"]) for r in rows] == [
        ("strong", "1", "16"), ("strong", "2", "16"), ("weak", "1", "16"), ("weak", "2", "32"),
    ]  # fmt: skip
    assert len(list(result.dir.glob("ranks-*.txt"))) == 3, "both modes begin with the same run"
    for first, row in zip([rows[0], rows[0], rows[2], rows[2]], rows, strict=True):
        child = result.dir / f"ranks-{row['ranks']}-batch-{row['global_size']}"
        records = [r for r in read(child / "metrics.jsonl") if "comm_mib" in r]
        config = yaml.safe_load((child / "config.yaml").read_text())
        assert config["task"]["objective"] == "mlm" and config["batch"]["global_size"] == int(row["global_size"])
        assert json.loads((child / "env.json").read_text())["world_size"] == int(row["ranks"])
        for name in ("step_seconds", "samples_per_second", "peak_gib", "work_balance", "memory_balance", "comm_share"):
            assert float(row[name]) == pytest.approx(median(r[name] for r in records)), name
        speedup = float(row["samples_per_second"]) / float(first["samples_per_second"])
        assert float(row["speedup"]) == pytest.approx(speedup)
        assert float(row["efficiency"]) == pytest.approx(speedup / int(row["ranks"]))
        assert 0 < float(row["work_balance"]) <= 1 and 0.5 < float(row["memory_balance"]) <= 1
        assert (float(row["comm_mib"]) > 0) == (row["ranks"] == "2")
    assert [r["step"] for r in result.records] == [1, 2, 1, 2]
    assert all((result.dir / f"scaling.{kind}").stat().st_size > 5000 for kind in ("png", "svg"))
    assert [float(r["ideal"]) for r in rows] == [1, 2, 1, 2]

    ends = {p: p.stat().st_mtime_ns for p in result.dir.glob("ranks-*/metrics.jsonl")}
    again = launch(tmp_path, *overrides, ranks=0, recipe="scaling")
    assert ends == {p: p.stat().st_mtime_ns for p in result.dir.glob("ranks-*/metrics.jsonl")}, "nothing runs again"
    assert [r["step"] for r in again.records] == [1, 2, 1, 2]
    other = launch(tmp_path, *overrides, "seed=3", ranks=0, recipe="scaling", check=False)
    assert other.code == 2 and "name=x: it began with other overrides. Choose another name." in other.error


def test_the_weak_batch_grows_with_the_ranks_from_the_fewest() -> None:
    config = RunConfig(batch=Batch(global_size=32, tokens=1000))
    children = scaling.plan(config, ("strong", "weak"), (4, 2), Path("x"))
    sizes = [(c.mode, c.ranks, c.config.batch.global_size, c.config.batch.tokens) for c in children]
    assert sizes == [("strong", 2, 32, 1000), ("strong", 4, 32, 1000), ("weak", 2, 32, 1000), ("weak", 4, 64, 2000)]
    assert children[3].dir == Path("x/ranks-4-batch-64") and children[3].config.train.communication
    assert children[0].config == children[2].config, "both modes begin with the same run"


def test_only_recipes_that_train_once_are_compared() -> None:
    recipes = Path(__file__).parents[1] / "recipes"
    with pytest.raises(ConfigError, match="There are: finetune, linear_regression, pretrain, translate"):
        scaling.find_recipe("spatial_conv", recipes)


@pytest.mark.parametrize("overrides, message", [
    (["scaling.ranks=[0]"], "scaling.ranks.0=0: Input should be greater than 0"),
    (["scaling.ranks=[]"], "scaling.ranks=[]: there is nothing to start"),
    (["scaling.recipe=pretain"], "scaling.recipe=pretain: no recipe that trains with DeepSpeed's engine. "
     "Did you mean 'pretrain'? There are: "),
    (["scaling.recipe=scaling"], "no recipe that trains"),
    (["scaling.ranks=[1,3]"], "ranks-3-batch-16: batch.global_size=16 is no multiple of batch.micro_size=4 x 3 ranks"),
    (["scaling.rank=[1]"], "scaling.rank: unknown key. Did you mean 'ranks'?"),
    (["scaling.ranks=[1]", "scaling.launcher=python", "train.steps=2"], "has no timed step. Raise train.steps"),
])  # fmt: skip
def test_what_cannot_be_compared_is_refused(overrides: list[str], message: str, tmp_path: Path) -> None:
    result = launch(tmp_path, *overrides, ranks=0, recipe="scaling", check=False)
    assert result.code == 2 and message in result.error and len(result.error.splitlines()) == 1
