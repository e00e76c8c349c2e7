"""A run tells its plan, refuses what cannot fit, and sets what it measured beside it."""

import json
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
from launching import Many, launch, launch_many, read
from omegaconf import OmegaConf
from rich.console import Console

from toolkit.cli import main as cli
from toolkit.config.compose import compose
from toolkit.config.schema import load
from toolkit.deepspeed.ds_config import complete
from toolkit.errors import PlanError
from toolkit.job import ranks
from toolkit.plan.plan import Plan, place_of_job, plan, plan_on
from toolkit.plan.shapes import model_shape
from toolkit.run.directory import Run
from toolkit.train import own_plan

LARGE = ("model=bert_large", "precision=bf16", "machine=a100_80gb", "batch.global_size=1024", "data.max_length=512")
SMALL = ("data.workers=0", "train.steps=4", "train.save_every=null", "train.eval_samples=8")
HEAVY = (  # activations enough to stand out of what a process holds besides tensors
    "model.hidden_size=128", "model.num_attention_heads=4", "model.intermediate_size=512", "data.max_length=128",
    "data.max_predictions=20", "batch.micro_size=32", "batch.global_size=64", "zero=stage0",
)  # fmt: skip
TOO_SMALL = "machine.host_memory_gib=0.002"
RUNS = {
    "planned": HEAVY,
    "refused": (TOO_SMALL, "zero=stage0"),
    "forced": (TOO_SMALL, "zero=stage0", "plan.enforce=false"),
    "dualpipev": (
        "zero=stage1", "pipeline=two", "pipeline.schedule=dualpipev", "pipeline.partition=uniform",
        "model.num_hidden_layers=6",
    ),
    "linear": ("task=linear", "data=synthetic", "data.rows=200", "zero=stage0"),
    "second": HEAVY,  # a training after others in one process
}  # fmt: skip


def judged(run: Run, device_gib: float = 0) -> Plan | None:
    """The verdict on a single rank."""
    ds = complete(run.config, world=1, device=ranks.device())
    return own_plan._judge(run, ds, 0, 1, device_gib)


ANYWAY = "; `toolkit plan … --search` lists what fits, plan.enforce=false tries it anyway."
REFUSAL = (
    "machine=this: the plan does not fit: a rank needs 0.00157 GiB at batch.micro_size=4 and length 32 (activations "
    "0.000712 of it) and has 0.001. Use batch.micro_size=1 (the largest that fits), activation=recompute or fewer "
    f"ranks on a host{ANYWAY}"
)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("run_plan")


@pytest.fixture(scope="module")
def done(folder: Path) -> Many:
    return launch_many(folder, {name: (*SMALL, *given) for name, given in RUNS.items()})


def written(run: Path) -> dict[str, Any]:
    return dict(json.loads((run / "plan.json").read_text()))


def test_plan_json_is_what_toolkit_plan_says_of_the_config(done: Many, folder: Path) -> None:
    found = written(folder / "planned")
    of_config = plan(load(OmegaConf.load(folder / "planned" / "config.yaml")), world=2)
    assert found["fits"] and found["parameters"] == of_config.parameters
    assert json.loads(json.dumps(of_config.as_json())).items() <= found.items()
    assert found["planned"]["peak_gib"] == of_config.memory.peak / 2**30


@pytest.mark.parametrize("name", ["planned", "second"])
def test_measured_stands_beside_planned(name: str, done: Many, folder: Path) -> None:
    found, records = written(folder / name), read(folder / name / "metrics.jsonl")
    planned, measured = found["planned"], found["measured"]
    if name == "planned":
        assert 0.7 * planned["peak_gib"] < measured["peak_gib"] < planned["peak_gib"] + 0.2
    else:
        assert measured["peak_gib"] is None, "the process has memory to spare of the training before"
    seconds = [r["step_seconds"] for r in records if "step_seconds" in r]
    assert min(seconds) <= measured["step_seconds"] <= max(seconds)
    assert measured["tokens_per_second"] == pytest.approx(64 * 128 / measured["step_seconds"])
    assert 0 < measured["mfu"] < 1.5
    assert "seconds of a step" in done.stdout


def test_toolkit_plan_of_a_run_shows_both(done: Many, folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    cli.main(["plan", str(folder / "planned")])
    row = next(x for x in capsys.readouterr().out.splitlines() if "seconds of a step" in x)
    assert f"{written(folder / 'planned')['measured']['step_seconds']:.3g} " in row
    with pytest.raises(SystemExit):
        cli.main(["plan", str(folder)])
    assert "plan.json: no plan of a run" in capsys.readouterr().err


def test_a_run_tells_its_plan_in_one_line(done: Many, folder: Path) -> None:
    first = next(x for x in done.stdout.splitlines() if x.startswith("plan: "))
    found = written(folder / "planned")
    assert first.startswith(f"plan: {found['device_gib']:.3g} of ") and "largest micro-batch 32" in first


def test_what_cannot_fit_is_refused_on_every_rank_before_training(done: Many, folder: Path) -> None:
    assert done.errors == {"refused": [f"PlanError: {REFUSAL}"] * 2}
    assert written(folder / "refused")["fits"] is False
    assert not read(folder / "refused" / "metrics.jsonl") and not (folder / "refused" / "checkpoints").exists()


def test_enforce_false_tries_it_anyway(done: Many, folder: Path) -> None:
    assert written(folder / "forced")["fits"] is False and read(folder / "forced" / "metrics.jsonl")
    assert sum("does not fit" in x for x in done.stdout.splitlines()) == 1


@pytest.mark.parametrize(("name", "reason"), [("dualpipev", "pipeline.schedule=dualpipev"), ("linear", "linear")])
def test_what_cannot_be_planned_runs_without_a_plan(name: str, reason: str, done: Many, folder: Path) -> None:
    assert read(folder / name / "metrics.jsonl") and not (folder / name / "plan.json").exists()
    (told,) = (x for x in (folder / name / "log.rank0.txt").read_text().splitlines() if "no plan of this run" in x)
    assert reason in told


def test_the_recipe_refuses_in_one_line_with_code_2(tmp_path: Path) -> None:
    result = launch(tmp_path, *RUNS["refused"], check=False)
    assert (result.code, result.error) == (2, f"error: {REFUSAL}")
    assert "plan: " not in result.stdout and not result.records


def test_starting_a_finished_run_again_keeps_what_it_measured(done: Many, folder: Path, tmp_path: Path) -> None:
    old = folder / "planned"
    (tmp_path / "model").symlink_to(old / "model")
    for foreign in ("{}", "[1]", "{"):
        (tmp_path / "plan.json").write_text(foreign)
        assert own_plan._measured_before(tmp_path / "plan.json") is None
    (tmp_path / "plan.json").write_text((old / "plan.json").read_text())
    judged(Run(tmp_path, load(OmegaConf.load(old / "config.yaml")), Console(quiet=True)))
    assert written(tmp_path)["measured"] == written(old)["measured"]


def test_batches_that_may_be_short_are_not_refused(done: Many, folder: Path, tmp_path: Path) -> None:
    """Pretraining fills every sequence, the other tasks pad to the longest of a batch."""
    (tmp_path / "model").symlink_to(folder / "planned" / "model")
    shape = ("zero=stage0", "data.max_length=128", "batch.micro_size=32", "batch.global_size=32")
    for task, limit, refused in (("pretrain", 0.1, True), ("sst2", 0.1, False), ("sst2", 0.001, True)):
        run = Run(tmp_path, compose([f"task={task}", *shape, f"machine.host_memory_gib={limit}"]), Console(quiet=True))
        with pytest.raises(PlanError) if refused else nullcontext():
            found = judged(run)
            assert found and found.fits is False
        assert written(tmp_path)["fits"] is False


def test_buffers_that_are_never_written_are_no_reason_to_refuse_on_a_cpu(
    done: Many, folder: Path, tmp_path: Path
) -> None:
    (tmp_path / "model").symlink_to(folder / "planned" / "model")
    bucket = "deepspeed.zero_optimization.reduce_bucket_size=2e9"
    config = compose(["zero=stage2", "data.max_length=128", bucket, "machine.host_memory_gib=4"])
    run = Run(tmp_path, config, Console(quiet=True))
    found = judged(run)
    assert found and found.fits is False


def test_a_gpus_memory_is_what_its_driver_says(
    done: Many, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ranks, "device", lambda: "cuda")
    (tmp_path / "model").symlink_to(folder / "planned" / "model")
    run = Run(tmp_path, compose(["data.max_length=128", "machine=h100"]), Console(quiet=True))
    found = judged(run, 79.1)
    assert found and found.device_limit_gib == 79.1


def on_gpus(*overrides: str) -> Plan:
    return plan(compose([*LARGE, *overrides]))


def test_the_line_of_gpus() -> None:
    rest = "largest micro-batch 128; 0.944 s a step, 555,678 tokens/s, MFU 44%, 0.9 h"
    assert own_plan.line(on_gpus("train.steps=3600")) == f"plan: 9.18 of 80 GiB a device (activations 6.6), {rest}"
    offloaded = own_plan.line(on_gpus("zero=stage3", "offload=cpu", "machine.host_memory_gib=5"))
    assert " 6.26 of 5 GiB of host, does not fit at 512 tokens a sequence; " in offloaded


@pytest.mark.parametrize(
    ("overrides", "text"),
    [
        (
            ("batch.micro_size=128", "machine.memory_gib=40"),
            "a device needs 57.8 GiB at batch.micro_size=128 and length 512 (activations 52.8 of it) and has 40. Use "
            "batch.micro_size=64 (the largest that fits), activation=recompute or more devices",
        ),
        (
            ("zero=stage3", "offload=cpu", "machine.host_memory_gib=5"),
            "the host needs 6.26 GiB and has 5. Use less offload or more nodes",
        ),
        (
            ("zero=stage1", "pipeline.stages=4", "batch.micro_size=1", "machine.memory_gib=1.5"),
            "a device needs 2.41 GiB at batch.micro_size=1 and length 512 (optimizer 0.539 of it) and has 1.5. Use "
            "offload=cpu or more devices",
        ),
    ],
    ids=["device", "host", "pipeline"],
)
def test_a_refusal_names_what_lacks_and_only_what_helps(overrides: tuple[str, ...], text: str) -> None:
    assert own_plan.refusal(on_gpus(*overrides)) == f"machine=a100_80gb: the plan does not fit: {text}{ANYWAY}"


def test_ranks_of_several_hosts_share_each_hosts_memory() -> None:
    config = compose(["model=bert_tiny", "machine.host_memory_gib=8", "machine.devices_per_node=8"])
    machine = place_of_job(config, world=4, per_node=2, device="cpu")
    assert (machine.nodes, machine.devices_per_node) == (2, 2)
    ds = complete(config, world=4, device="cpu")
    assert plan_on(machine, config, ds, model_shape(config), ranks=4, device="cpu").device_limit_gib == 4


def test_a_gpu_named_for_a_run_on_cpus_is_not_its_memory() -> None:
    machine = place_of_job(compose(["machine=a100_80gb"]), world=2, per_node=2, device="cpu")
    assert machine.memory_gib is None and machine.host_memory_gib and not machine.peak_tflops
