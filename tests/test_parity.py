"""The maths is the same in every layout: 20 real steps on the same samples, against plain PyTorch.

The table of all layouts is tests/parity.md; UPDATE_GOLDEN=1 writes it anew.
"""

import json
import os
from pathlib import Path

import pytest
import torch
from launching import TINY, data_cache, launch_many, layouts, needs_nvme, read, runnable
from transformers import BertForPreTraining

from toolkit.config.compose import compose
from toolkit.config.schema import RunConfig
from toolkit.data import loader, text
from toolkit.data.masked import MaskedText
from toolkit.data.order import Split, Stream
from toolkit.engine.start import factor
from toolkit.models.build import bert_config, decay_groups, initialise

STEPS = 20
COMMON = (
    "model.dropout=0",
    "data.max_length=64",  # sequences of many lengths, so that micro-batches hold unequally many predictions
    "data.max_predictions=20",
    "data.short_rate=0.9",
    f"train.steps={STEPS}",
    "train.log_every=1",
    "train.save_every=20",
    "train.eval_samples=16",
    "schedule.warmup=5",
    "deepspeed.optimizer.params.lr=1e-3",
    "deepspeed.optimizer.params.weight_decay=0.1",
    "deepspeed.gradient_clipping=0.5",
)
PEAKS: dict[str, float] = {}  # layout -> bytes of tensors on the rank that holds most
PAGE = Path(__file__).with_name("parity.md")

DUALPIPEV = ("pipeline=two", "pipeline.schedule=dualpipev", "pipeline.partition=uniform")
# layout -> (ranks, overrides)
FP32 = {
    "1 rank, ZeRO 0": (1, ("zero=stage0",)),
    "2 ranks, ZeRO 0": (2, ("zero=stage0",)),
    "2 ranks, ZeRO 1": (2, ("zero=stage1",)),
    "2 ranks, ZeRO 2": (2, ("zero=stage2",)),
    "2 ranks, ZeRO 3": (2, ("zero=stage3",)),
    "4 ranks, ZeRO 2": (4, ("zero=stage2",)),
    "2 ranks, tensor 2": (2, ("zero=stage0", "parallel=tensor")),
    "2 ranks, tensor 2, the vocabulary too": (2, ("zero=stage0", "parallel=tensor_vocab")),
    "4 ranks, tensor 2 x data 2, ZeRO 1": (4, ("zero=stage1", "parallel=tensor")),
    "4 ranks, tensor 2 x data 2, ZeRO 2": (4, ("zero=stage2", "parallel=tensor")),
    "4 ranks, tensor 2 x data 2, ZeRO 3": (4, ("zero=stage3", "parallel=tensor")),
    "2 ranks, ZeRO 2, micro-batches of 2": (2, ("zero=stage2", "batch.micro_size=2")),
    "2 ranks, ZeRO 2, recompute": (2, ("zero=stage2", "activation=recompute")),
    "2 ranks, ZeRO 3, recompute": (2, ("zero=stage3", "activation=recompute")),
    "2 ranks, ZeRO 2, activations on the CPU": (2, ("zero=stage2", "activation=offload_cpu")),
    "2 ranks, ZeRO 3, recompute from inputs on the CPU": (2, ("zero=stage3", "activation=recompute_offload")),
    "2 ranks, ZeRO 1, optimizer on the CPU": (2, ("zero=stage1", "offload=cpu")),
    "2 ranks, ZeRO 2, optimizer on the CPU": (2, ("zero=stage2", "offload=cpu")),
    "2 ranks, ZeRO 3, optimizer on the CPU": (2, ("zero=stage3", "offload=cpu")),
    "2 ranks, ZeRO 3, optimizer and weights on the CPU": (2, ("zero=stage3", "offload=cpu_params")),
    "2 ranks, ZeRO 3, optimizer and weights on NVMe": (2, ("zero=stage3", "offload=nvme")),
    "2 pipe stages, 1F1B, ZeRO 0": (2, ("zero=stage0", "pipeline=two", "train.eval_every=7")),
    "2 pipe stages, 1F1B, ZeRO 1": (2, ("zero=stage1", "pipeline=two", "pipeline.partition=time")),
    "2 pipe stages, 1F1B, ZeRO 1, recompute": (2, ("zero=stage1", "pipeline=two", "activation=recompute")),
    "2 pipe stages, 1F1B, ZeRO 1, stages recomputed": (
        2,
        ("zero=stage1", "pipeline=two", "deepspeed.pipeline.activation_checkpoint_interval=99"),
    ),
    "2 pipe stages, 1F1B, ZeRO 1, optimizer on the CPU": (2, ("zero=stage1", "pipeline=two", "offload=cpu")),
    "2 pipe stages, GPipe, ZeRO 0": (2, ("zero=stage0", "pipeline=two", "pipeline.schedule=gpipe")),
    "2 pipe stages, GPipe, ZeRO 1": (2, ("zero=stage1", "pipeline=two", "pipeline.schedule=gpipe")),
    "2 pipe stages, DualPipeV, ZeRO 0": (2, ("zero=stage0", *DUALPIPEV)),
    "2 pipe stages, DualPipeV, ZeRO 1": (2, ("zero=stage1", *DUALPIPEV, "train.eval_every=7")),
    "4 pipe stages, 1F1B, ZeRO 1": (4, ("zero=stage1", "pipeline.stages=4", "pipeline.partition=uniform")),
    "2 pipe stages x 2 data, 1F1B, ZeRO 0": (4, ("zero=stage0", "pipeline=two")),
    "2 pipe stages x 2 data, GPipe, ZeRO 1": (4, ("zero=stage1", "pipeline=two", "pipeline.schedule=gpipe")),
    "2 pipe stages x 2 data, DualPipeV, ZeRO 1": (4, ("zero=stage1", *DUALPIPEV, "batch.micro_size=2")),
}
BF16 = {
    "2 ranks, ZeRO 1, bf16": (2, ("zero=stage1", "precision=bf16")),
    "2 ranks, ZeRO 2, bf16": (2, ("zero=stage2", "precision=bf16")),
    "2 ranks, ZeRO 3, bf16": (2, ("zero=stage3", "precision=bf16")),
    "2 pipe stages, 1F1B, ZeRO 1, bf16": (2, ("zero=stage1", "precision=bf16", "pipeline=two")),
    "2 ranks, ZeRO 2, bf16, optimizer on the CPU": (2, ("zero=stage2", "precision=bf16", "offload=cpu")),
}


def plain_pytorch(config: RunConfig) -> list[float]:
    """The losses of a loop without DeepSpeed and without the toolkit's head or normalisation."""
    prepared = text.prepare(config)
    shape = bert_config(config.model, vocab_size=prepared.vocab_size, pad_id=prepared.pad_id)
    model = BertForPreTraining(shape).train()
    initialise(model, config.seed)
    params = config.deepspeed["optimizer"]["params"]
    optimizer = torch.optim.AdamW(
        decay_groups(model, params["weight_decay"]), lr=params["lr"], betas=tuple(params["betas"]), eps=params["eps"]
    )
    schedule = config.schedule
    rate = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: factor(schedule, step, STEPS))
    size = config.batch.global_size
    dataset = MaskedText(prepared, config.data, "mlm_nsp", config.seed, "train")
    order = Stream(len(dataset), config.seed, size)
    batches = loader.train_batches(dataset, order, Split(size, size, rank=0, world=1), start_sample=0)
    losses = []
    for _ in range(STEPS):
        loss = stock_loss(model, next(batches))
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), config.deepspeed["gradient_clipping"])
        optimizer.step()
        rate.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return losses


def stock_loss(model: BertForPreTraining, batch: dict[str, torch.Tensor]) -> torch.Tensor:
    """Hugging Face's own loss over the whole global batch, logits at every position."""
    labels = torch.full_like(batch["input_ids"], -100)
    real = batch["mlm_labels"] != -100
    rows = torch.arange(len(labels)).unsqueeze(1).expand_as(real)
    labels[rows[real], batch["mlm_positions"][real]] = batch["mlm_labels"][real]
    inputs = {k: batch[k] for k in ("input_ids", "attention_mask", "token_type_ids")}
    return model(**inputs, labels=labels, next_sentence_label=batch["nsp_labels"]).loss


def buckets(overrides: tuple[str, ...]) -> list[str]:
    """Several of DeepSpeed's buckets for this model, and none much larger than its largest matrix."""
    sizes = {
        "zero=stage0": [],
        "zero=stage1": ["reduce_bucket_size", "allgather_bucket_size"],
        "zero=stage2": ["reduce_bucket_size", "allgather_bucket_size"],
        "zero=stage3": ["reduce_bucket_size", "stage3_prefetch_bucket_size"],
    }
    stage = next(o for o in overrides if o in sizes)
    return [f"deepspeed.zero_optimization.{key}=20000" for key in sizes[stage]]


@pytest.fixture(scope="module")
def reference() -> list[float]:
    return plain_pytorch(compose([*TINY, *COMMON, f"data.cache_dir={data_cache()}"]))


@pytest.fixture(scope="module")
def losses(tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[float]]:
    """layout -> its 20 losses; the layouts of two ranks in one launch, one after another."""
    folder = tmp_path_factory.mktemp("parity")
    tables = {ranks: {n: o for n, (r, o) in {**FP32, **BF16}.items() if r == ranks} for ranks in (1, 2, 4)}
    records = {}
    for ranks, table in tables.items():
        numbered = dict(enumerate(runnable(table).items()))
        runs = {f"{ranks}-{i}": [*COMMON, *overrides, *buckets(overrides)] for i, (_, overrides) in numbered.items()}
        assert not launch_many(folder, runs, ranks=ranks, memory=True).errors
        records |= {layout: read(folder / f"{ranks}-{i}" / "metrics.jsonl") for i, (layout, _) in numbered.items()}
        for i, (layout, _) in numbered.items():
            PEAKS[layout] = json.loads((folder / f"{ranks}-{i}" / "peak.json").read_text())
    found = {layout: [r["loss"] for r in rows if "loss" in r] for layout, rows in records.items()}
    assert all(len(rows) == STEPS for rows in found.values())
    return found


def difference(a: list[float], b: list[float]) -> float:
    return max(abs(x - y) / abs(y) for x, y in zip(a, b, strict=True))


@pytest.mark.parametrize("layout", layouts({n: o for n, (_, o) in FP32.items()}))
def test_fp32_losses_are_those_of_plain_pytorch(layout: str, losses, reference: list[float]) -> None:
    assert reference[0] - reference[-1] > 0.1, "nothing was learned, so nothing was compared"
    assert difference(losses[layout], reference) < 1e-5


@pytest.mark.parametrize("layout", BF16)
def test_bf16_losses_are_those_of_fp32_within_its_rounding(layout: str, losses, reference: list[float]) -> None:
    assert difference(losses[layout], reference) < 2**-7  # bf16 keeps 8 bits


def test_bf16_losses_agree_between_the_stages(losses) -> None:
    first, *others = (losses[layout] for layout in BF16)
    assert max(difference(other, first) for other in others) < 2e-4


@needs_nvme
def test_nvme_trains_matrices_of_over_a_mebibyte_right(tmp_path: Path) -> None:
    """DeepSpeed swaps gradients only from 1 MiB on, and misreads those that are not aligned (see conf/offload)."""
    wide = ("model.hidden_size=768", "model.num_attention_heads=12", "model.intermediate_size=3072",
            "model.dropout=0", "train.steps=4", "train.log_every=1", "deepspeed.optimizer.params.lr=1e-3")  # fmt: skip
    layouts = {"kept": ["zero=stage1"], "swapped": ["zero=stage3", "offload=nvme"]}
    assert not launch_many(tmp_path, {name: [*wide, *o] for name, o in layouts.items()}).errors
    kept, swapped = ([r["loss"] for r in read(tmp_path / n / "metrics.jsonl") if "loss" in r] for n in layouts)
    assert len(kept) == 4
    assert difference(swapped, kept) < 1e-5


def test_the_table_of_layouts_is_up_to_date(losses, reference: list[float]) -> None:
    if len(losses) < len(FP32) + len(BF16):
        pytest.skip("this machine cannot run every layout")
    rows = {layout: losses[layout] for layout in {**FP32, **BF16}}
    table = [
        "# Losses in every layout",
        "",
        "A two-layer BERT of hidden size 32 on the default corpus, global batch 16, AdamW with weight decay 0.1 and",
        "clipping at 0.5; CPU ranks over gloo. Difference: the largest relative one to plain PyTorch (stock Hugging",
        "Face model and loss, one process) over 20 steps. Peak: tensors that are alive at once in a step, on the rank",
        "with most, without what is offloaded, with buckets of 20,000 elements; the vocabulary is a third of this",
        "model and recipes/memory.py measures larger ones. Written by tests/test_parity.py.",
        "",
        "| layout | step 1 | step 5 | step 20 | difference | peak KiB |",
        "|---|---|---|---|---|---|",
        f"| plain PyTorch | {reference[0]:.6f} | {reference[4]:.6f} | {reference[19]:.6f} | | |",
    ]
    for layout, found in rows.items():
        numbers = " | ".join(f"{found[i]:.6f}" for i in (0, 4, 19))
        table.append(f"| {layout} | {numbers} | {difference(found, reference):.0e} | {PEAKS[layout] / 1024:,.0f} |")
    text = "\n".join(table) + "\n"
    if os.environ.get("UPDATE_GOLDEN"):
        PAGE.write_text(text)
    listed = [line.split("|")[1].strip() for line in PAGE.read_text().splitlines() if line.startswith("| ")][2:]
    assert listed == list(rows), "run UPDATE_GOLDEN=1 pytest tests/test_parity.py"
