"""A plan as a whole: what it adds up, what it refuses, and the command that prints it."""

import json
import random
import resource
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
from deepspeed.runtime.utils import partition_balanced
from launching import ROOT
from rich.console import Console

from toolkit.cli.main import main
from toolkit.config.compose import compose
from toolkit.config.units import GIB
from toolkit.errors import ConfigError, PlanError
from toolkit.plan import flops
from toolkit.plan.activations import block_bytes
from toolkit.plan.assumptions import LAUNCH_US
from toolkit.plan.layout import balanced
from toolkit.plan.machines import table
from toolkit.plan.memory import memory_of
from toolkit.plan.paper import zero_bytes
from toolkit.plan.plan import Plan, place_of_job, plan
from toolkit.plan.shapes import model_shape
from toolkit.plan.speed import products
from toolkit.report.plan import show
from toolkit.train.own_plan import line

LARGE = ("model=bert_large", "precision=bf16", "machine=a100_80gb", "batch.global_size=1024", "data.max_length=512")


def planned(*overrides: str, world: int | None = None) -> Plan:
    return plan(compose([*LARGE, *overrides]), world=world)


def command(*arguments: str) -> subprocess.CompletedProcess[str]:
    code = "import sys; from toolkit.cli.main import main; main(sys.argv[1:]); assert 'torch' not in sys.modules"
    run = [sys.executable, "-c", code, "plan", *arguments]
    return subprocess.run(run, capture_output=True, text=True, check=False, cwd=ROOT)


@pytest.mark.parametrize(
    ("zero", "size"), [("stage1", 20), ("stage2", 18), ("stage3", 18)], ids=["ZeRO 1", "ZeRO 2", "ZeRO 3"]
)
def test_one_device_holds_18_to_20_bytes_a_parameter_where_the_paper_counts_16(zero: str, size: int) -> None:
    found = planned(f"zero={zero}", world=1)
    groups = ("weights", "gradients", "optimizer")
    states = sum(p.bytes for p in found.memory.at("o") if p.group in groups)
    assert states / sum(found.parameters.values()) == pytest.approx(size, rel=0.01)


def test_without_zero_half_precision_takes_the_papers_16_and_a_copy_of_the_gradients() -> None:
    found = planned("zero=stage1", "precision=fp16", "batch.micro_size=1", world=1)
    memory = memory_of(model_shape(compose(list(LARGE))), replace(found.layout, stage=0))
    states = sum(p.bytes for p in memory.at("o") if p.group != "workspace")
    assert states == zero_bytes(sum(found.parameters.values()), stage=0, world=1)
    assert sum(p.bytes for p in memory.at("o")) == pytest.approx(states * 20 / 16, rel=0.01)


def test_a_layer_keeps_what_korthikanti_et_al_count() -> None:
    """s·b·h·(34 + 5·a·s/h) bytes in half precision (arXiv 2205.05198, equation 2), and LayerNorm's 16 a token."""
    found = planned("model.attention=eager", "batch.micro_size=4")
    length, batch, hidden, heads = 512, 4, 1024, 16
    expected = length * batch * (hidden * (34 + 5 * heads * length / hidden) + 16)
    assert block_bytes(model_shape(compose(list(LARGE))), found.layout, "encoder") == expected


def test_pipe_stages_are_cut_as_deepspeed_cuts_them() -> None:
    draws = random.Random(0)
    for _ in range(50):
        sizes = [draws.choice([1, 3, 3, 3, 8, 20]) for _ in range(draws.randint(3, 14))]
        count = draws.randint(2, min(5, len(sizes) - 1))
        assert balanced(tuple(sizes), count) == partition_balanced(sizes, count)


def test_the_largest_micro_batch_is_the_last_that_fits() -> None:
    found = planned("machine.nodes=4", "batch.micro_size=1")
    shape, layout = model_shape(compose(list(LARGE))), found.layout
    needs = {
        d: memory_of(shape, replace(layout, micro=d, accumulation=32 // d)).peak / GIB for d in (1, 2, 4, 8, 16, 32)
    }
    assert found.layout.data == 32 and found.largest_micro == 32, "all of a copy's share"
    small = planned("machine.nodes=4", "batch.micro_size=1", "machine.memory_gib=6")
    assert small.largest_micro is not None and needs[small.largest_micro] < 6 < needs[2 * small.largest_micro] + 1
    assert planned("machine.memory_gib=1").fits is False and planned("machine.memory_gib=1").largest_micro is None


def test_the_largest_micro_batch_fits_the_host_too() -> None:
    moved = ("machine.nodes=4", "batch.micro_size=1", "activation=offload_cpu")
    free, tight = planned(*moved), planned(*moved, "machine.host_memory_gib=40")
    assert free.largest_micro == 32 and tight.largest_micro is not None and tight.largest_micro < 32
    above = planned(*moved, "machine.host_memory_gib=40", f"batch.micro_size={2 * tight.largest_micro}")
    assert above.host_gib > 40 and above.device_gib < 40


def test_what_leaves_a_node_is_as_slow_as_its_ports() -> None:
    one, four = planned(), planned("machine.nodes=4")
    reduced = [next(s for s in p.speed.shares if s.name.startswith("gradients")) for p in (one, four)]
    assert "within the node" in reduced[0].formula and "between nodes" in reduced[1].formula
    sent = [next(s for s in p.speed.sent if s.name.startswith("gradients")).bytes for p in (one, four)]
    # 300 GB/s within, 200 GB/s between: a quarter of the micro-batches, 31/32 in place of 7/8 of the bytes
    assert sent[1] / sent[0] == pytest.approx((31 / 32) / (7 / 8) / 4)
    assert reduced[1].seconds / reduced[0].seconds == pytest.approx(sent[1] / sent[0] * 300 / 200)


def test_tensor_ranks_of_a_node_share_its_ports_and_pipe_stages_cross_them_once() -> None:
    tensor = planned("parallel=tensor", "deepspeed.tensor_parallel.autotp_size=8", "machine.nodes=2", "zero=stage1")
    said = {s.name: s.formula for s in tensor.speed.shares}
    assert "within the node" in said["activations, all-reduce"]
    assert "20 GB/s, between nodes, 8 share the ports" in said["gradients, all-reduce"]  # 200 x 0.8 / 8
    piped = planned("pipeline.stages=2", "machine.nodes=2", "zero=stage1", "batch.global_size=1024")
    said = {s.name: s.formula for s in piped.speed.shares}
    assert "within the node" in said["gradients, all-reduce"], "each stage has a node of its own"
    assert "20 GB/s, between nodes, 8 share the ports" in said["activations to the next stage"]


def test_mfu_is_of_the_data_sheet_also_where_rates_are_measured() -> None:
    measured = "machine.peak_tflops={bf16: 156}", "machine.measured=[peak_tflops]", "machine.efficiency={bf16: 1}"
    found, sheet = planned(*measured, world=1), planned(world=1)
    assert found.speed.mfu == pytest.approx(0.5, rel=0.1) and sheet.speed.mfu == pytest.approx(0.45, rel=0.1)


def test_a_pipeline_has_its_bubble() -> None:
    found = planned("zero=stage1", "pipeline.stages=4", "batch.micro_size=16", world=8)
    shares = {s.name: s.seconds for s in found.speed.shares}
    assert found.layout.accumulation == 32
    assert shares["pipeline bubble"] == pytest.approx((shares["computing"] + shares["small products"]) * 3 / 32)


def test_a_stage_holds_the_micro_batches_that_are_under_way() -> None:
    """1F1B: as many as there are stages from here on; GPipe: all (Narayanan et al. 2021, section 2.2)."""
    shape = model_shape(compose(list(LARGE)))
    for schedule, under_way in (("1f1b", [4, 3, 2, 1]), ("gpipe", [32] * 4)):
        pipeline = ("zero=stage1", "pipeline.stages=4", f"pipeline.schedule={schedule}")
        layout = planned(*pipeline, "pipeline.partition=[7,13,19]", "batch.micro_size=16", world=8).layout
        held = [
            next(p for p in memory_of(shape, layout, stage).parts if p.name == "activations" and "b" in p.moments)
            for stage in range(4)
        ]
        assert [int(part.formula.split()[0]) for part in held] == under_way
        assert held[1].bytes / under_way[1] == pytest.approx(held[2].bytes / under_way[2]), "six layers each"


def test_hours_follow_from_steps() -> None:
    found = planned("train.steps=3600")
    assert found.hours == pytest.approx(found.speed.step_seconds)
    assert found.as_json()["device_hours"] == pytest.approx(8 * found.hours)
    assert planned("train.epochs=3").hours is None, "nobody knows how many samples there are"


def test_what_a_sheet_lacks_is_named_and_nothing_made_up() -> None:
    found = planned("machine=v100_32gb", "machine.devices_per_node=8")
    assert found.speed.unknown == ("machine.peak_tflops.bf16",) and found.speed.step_seconds is None
    assert found.fits and found.hours is None


@pytest.mark.parametrize(
    ("overrides", "fits", "unknown"),
    [
        ("machine=l4 machine.memory_gib=null", None, ["memory_gib"]),
        ("machine=a10", True, []),  # nothing is on the host: its size does not matter
        ("machine=a10 zero=stage2 offload=cpu", None, ["host_memory_gib"]),
        ("machine=a10 zero=stage3 offload=nvme", None, ["host_memory_gib", "nvme_gib"]),
        ("machine=a10 zero=stage3 offload=nvme machine.host_memory_gib=512", None, ["nvme_gib"]),
        ("machine=a10 zero=stage3 offload=nvme machine.host_memory_gib=512 machine.nvme_gib=1000", True, []),
        (
            "machine=a10 zero=stage3 offload=nvme machine.host_memory_gib=1",
            False,
            ["nvme_gib"],
        ),  # a known one is broken
        ("machine=a10 zero=stage3 offload=nvme machine.memory_gib=1", False, ["host_memory_gib", "nvme_gib"]),
    ],
)
def test_an_unknown_limit_is_no_yes(overrides: str, fits: bool | None, unknown: list[str]) -> None:
    found = planned(*overrides.split(), "batch.micro_size=1", "batch.global_size=8")
    keys = tuple(f"machine.{key}" for key in unknown)
    assert (found.fits, found.unknown_limits) == (fits, keys)
    told = found.as_json()
    assert told["fits"] is fits and told["unknown_limits"] == keys
    assert ("whether it fits is unknown without" in line(found)) == (fits is None)
    console = Console(record=True, width=250)
    show(found, console, explain=False)
    said = console.export_text()
    assert all(key in said for key in keys) or fits is False
    assert ("It fits" in said, "It does not fit" in said, "Whether it fits is unknown" in said) == (
        fits is True, fits is False, fits is None
    )  # fmt: skip


def test_the_largest_micro_batch_is_held_to_the_limits_that_are_known() -> None:
    moved = ("machine=a10", "activation=offload_cpu", "batch.micro_size=1", "batch.global_size=64")
    free = planned(*moved)
    assert free.fits is None and free.largest_micro == planned(*moved, "machine.host_memory_gib=10000").largest_micro
    assert planned(*moved, "machine.memory_gib=null").largest_micro is None, "nothing is known"


def test_a_product_takes_its_launch_and_what_it_computes_or_moves() -> None:
    peak, bandwidth, size = 312e12 * 0.45, 2039e9, 2
    for overrides in ((), ("batch.micro_size=1",), ("model.attention=eager",), ("batch.micro_size=64",)):
        found = planned(*overrides)
        every = products(model_shape(compose(list(LARGE))), found.layout)
        longest = [(one.times, max(one.flops / peak, one.elements * size / bandwidth)) for one in every]
        seconds = sum(3 * times * (LAUNCH_US / 1e6 + each) for times, each in longest)  # backward has two of each
        shares = {s.name: s.seconds for s in found.speed.shares}
        total = shares["computing"] + shares["small products"]
        assert total == pytest.approx(seconds * found.layout.accumulation), overrides
    assert found.machine.peak_tflops["bf16"] == 312 and found.machine.bandwidth_gbs == 2039


def test_a_projection_by_hand_on_one_device() -> None:
    """512 x 1024 by 1024 x 1024 in bf16: 1.07 GFLOP and 4 MiB; attention, fused, reads q, k, v and writes as much."""
    shape, layout = model_shape(compose(list(LARGE))), planned("batch.micro_size=1", world=1).layout
    found = list(products(shape, layout))
    assert (found[0].flops, found[0].elements, found[0].times) == (2 * 512 * 1024**2, 2 * 512 * 1024 + 1024**2, 3 * 24)
    assert (found[4].flops, found[4].elements, found[4].times) == (4 * 512**2 * 1024, 4 * 512 * 1024, 24)
    count = 3 * (24 * 7 + 2)  # a layer's six and attention, and the head's two: forward, and two of each backward
    (small,) = (s for s in planned("batch.micro_size=1", world=1).speed.shares if s.name == "small products")
    assert small.formula.startswith(f"{1024 * count:,} products: 5 us each") and small.seconds >= 1024 * count * 5e-6


@pytest.mark.parametrize("overrides", [(), ("activation=recompute",), ("zero=stage1", "parallel=tensor")])
def test_products_add_up_to_the_flops_that_are_counted_otherwise(overrides: tuple[str, ...]) -> None:
    found = planned(*overrides)
    model = compose(list(LARGE)).model
    counted = flops.bert(model, vocab_size=30522, length=512, sequences=1024, predictions=1024 * 20)
    assert found.speed.flops == counted
    marian = plan(compose(["task=translate", "model=transformer_base", "machine=h100"]))
    shape, tokens = marian.layout, marian.layout.samples * marian.layout.length
    own = flops.Seq2SeqShape(
        512, 512, 2048, 6, 6, model_shape(compose(["task=translate", "model=transformer_base"])).vocab_size
    )
    squares = dict.fromkeys(("source_source", "target_target", "target_source"), tokens * shape.length)
    assert marian.speed.flops == own.step({"source": tokens, "target": tokens, **squares})


def test_a_measured_launch_takes_the_place_of_the_assumed_one() -> None:
    one = ("batch.micro_size=1", "batch.global_size=8")
    slow, fast = (planned(f"machine.launch_us={us}", *one, world=1).speed.step_seconds for us in (50, 0))
    assert slow and fast and slow - fast == pytest.approx(8 * 3 * (24 * 7 + 2) * 50e-6)


def test_a_cpu_is_known_by_its_kind_not_its_name() -> None:
    named = plan(compose(["machine=xeon_8180", "machine.name=another"]))
    assert named.layout.device == "cpu" and named.device_gib == named.memory.peak / GIB, "no CUDA context"
    assert plan(compose(["machine=xeon_8180", "machine.device=cuda"])).layout.device == "cuda"
    kinds = {m.name: m.device for m in table()}
    assert {name for name, kind in kinds.items() if kind != "cuda"} == {"xeon_8180", "ipu_gc2", "ipu_gc200"}
    job = place_of_job(compose(["machine=dgx2"]), world=2, per_node=2, device="cpu")
    assert job.device == "cpu" and not job.peak_tflops, "a CPU job has not the peaks of the GPUs that are named"


def test_offload_moves_states_to_the_host_and_its_time_to_pcie_and_cpu() -> None:
    on, off = planned("zero=stage3"), planned("zero=stage3", "offload=cpu")
    assert off.device_gib < on.device_gib and off.host_gib > 18 * 0.3 and 0 < off.pinned_gib < off.host_gib
    names = {s.name for s in off.speed.shares}
    assert {"optimizer on the CPU", "gradients out, weights in"} <= names
    nvme = planned("zero=stage3", "offload=nvme")
    assert nvme.nvme_gib > 18 * 0.3 and nvme.speed.unknown == ("machine.nvme_gbs",)


def test_a_node_shape_says_where_it_is_from() -> None:
    shapes = [m for m in table() if m.devices_per_node > 1]
    assert {"a100_80gb", "h100", "dgx2"} <= {m.name for m in shapes}
    assert all(m.node_source and m.link_gbs and m.node_link_gbs and m.pcie_gbs for m in shapes)


@pytest.mark.parametrize(
    ("overrides", "said"),
    [
        (["machine.nodes=0"], "machine.nodes=0: Input should be greater than 0"),
        (["batch.global_size=100"], "batch.global_size=100 is no multiple of batch.micro_size=16 x 8 ranks"),
        (["model.weights=nowhere"], "model.weights=nowhere: no config.json there"),
        (["data.max_length=1024"], "data.max_length=1024 is above model.max_position_embeddings=512"),
        (["machine=a100_90gb"], "machine=a100_90gb: no such option. Did you mean 'a100_80gb'?"),
        (
            ["zero=stage1", "pipeline=two", "pipeline.schedule=dualpipev"],
            "pipeline.schedule=dualpipev: there is no plan",
        ),
        (
            ["zero=stage1", "pipeline.stages=4", "pipeline.partition=[5,6,40]"],
            "pipeline.stages=4: 27 layers cannot be cut",
        ),
        (["zero=stage1", "machine.nodes=4", "pipeline.stages=32"], "pipeline.stages=32: 27 layers cannot be cut"),
    ],
)
def test_bad_input_is_one_clear_line(overrides: list[str], said: str) -> None:
    with pytest.raises((ConfigError, PlanError)) as error:
        planned(*overrides)
    assert str(error.value).startswith(said) and "\n" not in str(error.value)


def test_a_folders_model_is_held_to_its_own_sizes(tmp_path: Path) -> None:
    keys = {"hidden_size": 48, "num_hidden_layers": 2, "num_attention_heads": 3, "intermediate_size": 64}
    keys |= {"model_type": "bert", "vocab_size": 100, "max_position_embeddings": 256}
    (tmp_path / "config.json").write_text(json.dumps(keys))
    weights = f"model.weights={tmp_path}"
    assert sum(planned(weights, "data.max_length=256").parameters.values()) < 100_000
    with pytest.raises(PlanError, match=r"data.max_length=512: the model has only 256 positions"):
        planned(weights)
    with pytest.raises(PlanError, match="does not divide the 3 heads"):
        planned(weights, "data.max_length=256", "zero=stage1", "parallel=tensor")
    keys |= {"max_position_embeddings": 1024, "num_attention_heads": 16}  # above model.max_position_embeddings, and
    (tmp_path / "config.json").write_text(json.dumps(keys))  # no multiple of model.num_attention_heads
    assert planned(
        weights, "data.max_length=1024", "zero=stage1", "parallel=tensor", "deepspeed.tensor_parallel.autotp_size=8"
    )


def test_more_ranks_than_devices_are_refused() -> None:
    with pytest.raises(PlanError, match=r"--world 16: machine=a100_80gb with machine.nodes=1 x 8 devices has fewer"):
        planned(world=16)


def test_the_command_answers_in_two_seconds_without_torch() -> None:
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    done = command(*LARGE, "machine.nodes=4", "--explain")
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    assert done.returncode == 0, done.stderr
    # Of a processor: a busy machine's clock tells nothing
    assert after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime < 2
    for said in (
        "32 a100_80gb ranks on 4 nodes",
        "optimizer states",
        "It fits",
        "MFU",
        "device-hours",
        "of 32 shares",
        "The ZeRO paper",
    ):
        assert said in done.stdout, said


def test_the_command_prints_json_and_refuses_in_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))  # no calibration of this host
    main(["plan", *LARGE, "--json"])
    found = json.loads(capsys.readouterr().out)
    assert found["fits"] is True and found["speed"]["step_seconds"] > 0 and found["layout"]["data"] == 8
    assert {"formula", "bytes", "place"} <= set(found["memory"]["parts"][0])
    main(["plan", "experiment=smoke", "--world", "2"])
    assert "machine=this does not say" in capsys.readouterr().out
    with pytest.raises(SystemExit) as ended:
        main(["plan", "--world", "0"])
    assert ended.value.code == 2 and capsys.readouterr().err == "error: --world 0: must be 1 or more.\n"
