"""Plans against a GPU's allocator: the peak of twenty layouts, and the largest micro-batch that fits.

python tests/test_plan_cuda.py runs.json found.json [GiB]     # [overrides, …] -> [peak in bytes; null: more than GiB]
"""

import gc
import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from launching import ROOT, data_cache

from toolkit.config.compose import compose
from toolkit.job import ops, ranks
from toolkit.plan import assumptions
from toolkit.plan.plan import Plan, divisors, plan

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device: its allocator is asked")

COMMON = "tokenizer.vocab_size=4096 data.max_length=128 data.max_predictions=20 data.workers=0 train.steps=4 name=cuda"
LAYOUTS = (
    "model=bert_base zero=stage0 precision=fp32 batch.micro_size=8 batch.global_size=8",
    "model=bert_base zero=stage0 precision=fp32 batch.micro_size=16 batch.global_size=32 activation=recompute",
    "model=bert_base zero=stage0 precision=fp32 batch.micro_size=32 batch.global_size=32",
    "model=bert_base zero=stage0 precision=fp32 batch.micro_size=16 batch.global_size=16 model.attention=eager",
    "model=bert_base zero=stage1 precision=fp32 batch.micro_size=8 batch.global_size=16",
    "model=bert_base zero=stage1 precision=bf16 batch.micro_size=32 batch.global_size=64",
    "model=bert_base zero=stage1 precision=fp16 batch.micro_size=64 batch.global_size=64 activation=recompute",
    "model=bert_base zero=stage2 precision=bf16 batch.micro_size=16 batch.global_size=32",
    "model=bert_base zero=stage2 precision=bf16 batch.micro_size=32 batch.global_size=32 offload=cpu",
    "model=bert_base zero=stage2 precision=fp16 batch.micro_size=16 batch.global_size=32 model.attention=eager",
    "model=bert_base zero=stage3 precision=bf16 batch.micro_size=16 batch.global_size=16",
    "model=bert_base zero=stage3 precision=fp16 batch.micro_size=32 batch.global_size=64 offload=cpu",
    "model=bert_large zero=stage0 precision=fp32 batch.micro_size=8 batch.global_size=8",
    "model=bert_large zero=stage0 precision=fp32 batch.micro_size=32 batch.global_size=32 activation=recompute",
    "model=bert_large zero=stage1 precision=bf16 batch.micro_size=16 batch.global_size=32",
    "model=bert_large zero=stage1 precision=fp16 batch.micro_size=8 batch.global_size=8 model.attention=eager",
    "model=bert_large zero=stage2 precision=bf16 batch.micro_size=16 batch.global_size=16 activation=recompute",
    "model=bert_large zero=stage2 precision=fp16 batch.micro_size=16 batch.global_size=32 offload=cpu",
    "model=bert_large zero=stage3 precision=bf16 batch.micro_size=8 batch.global_size=16",
    "model=bert_large zero=stage3 precision=fp32 batch.micro_size=4 batch.global_size=4 activation=recompute",
)
LIMITED = {  # GiB
    "model=bert_base zero=stage1 precision=bf16 batch.global_size=240": 4,
    "model=bert_large zero=stage2 precision=fp16 batch.global_size=120 model.attention=eager": 12,
}


def planned(overrides: str, *more: str) -> Plan:
    return plan(compose([*COMMON.split(), *overrides.split(), *more]), world=1)


def measured(folder: Path, runs: list[str], limit: float | None = None) -> list[int | None]:
    """The peak of each, one after the other in a process of its own."""
    asked, found = folder / "runs.json", folder / "found.json"
    common = [*COMMON.split(), f"output_dir={folder}", f"data.cache_dir={data_cache()}"]
    asked.write_text(json.dumps([[*common, *run.split()] for run in runs]))
    command = [sys.executable, __file__, asked, found, *([str(limit)] if limit else [])]
    subprocess.run(command, cwd=ROOT, check=True, timeout=900)
    return list(json.loads(found.read_text()))


@pytest.fixture(scope="module")
def peaks(tmp_path_factory: pytest.TempPathFactory) -> dict[str, int | None]:
    return dict(zip(LAYOUTS, measured(tmp_path_factory.mktemp("cuda"), list(LAYOUTS)), strict=True))


@pytest.mark.parametrize("layout", LAYOUTS)
def test_the_peak_is_as_planned(layout: str, peaks: dict[str, int | None]) -> None:
    assert planned(layout).memory.peak == pytest.approx(peaks[layout], rel=0.05)


@pytest.mark.parametrize("layout", LIMITED)
def test_the_largest_micro_batch_is_planned_exactly_or_one_below(layout: str, tmp_path: Path) -> None:
    found = planned(layout, "batch.micro_size=1", f"machine.memory_gib={LIMITED[layout]}")
    micros = divisors(found.layout.samples)
    largest = micros.index(found.largest_micro)
    for micro, fits in ((micros[largest], True), (micros[largest + 2], False)):
        (peak,) = measured(tmp_path, [f"{layout} batch.micro_size={micro}"], LIMITED[layout])
        assert (peak is not None) == fits, micro


def main(runs: str, found: str, limit: str = "") -> None:
    if limit:  # of a whole device: CUDA's context is not the allocator's
        whole = torch.cuda.get_device_properties(0).total_memory
        torch.cuda.set_per_process_memory_fraction((float(limit) - assumptions.CONTEXT_GIB) * 2**30 / whole)
    ranks.complete_environment()
    with ranks.joined():
        Path(found).write_text(json.dumps([peak(one) for one in json.loads(Path(runs).read_text())]))


def peak(overrides: list[str]) -> int | None:
    """Of a step, but for what earlier runs have left; None: out of memory."""
    from rich.console import Console
    from studies.step_memory import MIB, measure

    from toolkit.deepspeed.ds_config import required_ops
    from toolkit.engine.start import start_engine
    from toolkit.models.build import build_model
    from toolkit.run.directory import Run
    from toolkit.tasks import build_task
    from toolkit.train.own_plan import begin

    run = Run.open(compose(overrides))
    task = build_task(run)
    assert task.vocab_size == run.config.tokenizer.vocab_size, "the plan takes it to be reached"
    ds = begin(run, task).ds
    ops.ensure(required_ops(ds, device=ranks.device(), world=1), Console())
    gc.collect()
    left = torch.cuda.memory_allocated() if torch.cuda.is_available() else 0
    try:
        engine = start_engine(build_model(run, task, ds), task, run, ds)
        found = measure(engine, task.train_batches(start_sample=0))
    except torch.OutOfMemoryError:
        return None
    engine.close()
    return int(found["peak_mib"] * MIB) - left


if __name__ == "__main__":
    main(*sys.argv[1:])
