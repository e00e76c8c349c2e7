"""Samples/s of fine-tuning against Hugging Face's Trainer with every sequence padded to 128: same model, data, ranks.

    python tests/bench_hf_trainer.py <encoder folder> <folder of GLUE> [task]      # by turns, two rounds

Prints both rates of every round and the mean ratio. The Trainer trains fp32 on gloo with DDP, its default; so do
we, at ZeRO 0. Both leave out their first steps, evaluation and saving.
"""

import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from launching import ROOT

from toolkit.job.ranks import free_port

STEPS, WARMUP, SIZE, ROUNDS = 32, 8, 32, 2


def trainer(weights: str, glue: str, task: str, out: str) -> None:
    """What ``torchrun`` runs: the Trainer on the rows that our preset reads."""
    import torch
    from transformers import AutoModelForSequenceClassification, AutoTokenizer, Trainer, TrainerCallback
    from transformers import TrainingArguments as Arguments

    from toolkit.config.compose import compose
    from toolkit.data import examples, tables

    torch.set_num_threads(1)
    config = compose([f"task={task}", f"data=files/{task}", f"data.path={glue}"])
    data = config.data
    labels = examples.find_labels(tables.rows(str(data.train), data, "train"), data, "classify")
    rows = examples.read(str(data.train), "train", data, config.task, labels)[: SIZE * (STEPS + 1)]
    tokenizer = AutoTokenizer.from_pretrained(weights)
    pairs = [[r.text_pair for r in rows]] if rows[0].text_pair is not None else []
    encoded = tokenizer([r.text for r in rows], *pairs, padding="max_length", truncation=True, max_length=128)
    samples = [{**{k: v[i] for k, v in encoded.items()}, "labels": r.label} for i, r in enumerate(rows)]
    times: list[float] = []

    class Clock(TrainerCallback):  # type: ignore[misc]
        def on_step_end(self, *_: Any, **__: Any) -> None:
            times.append(time.perf_counter())

    arguments = Arguments(
        output_dir=out, max_steps=STEPS, per_device_train_batch_size=8, gradient_accumulation_steps=2,
        use_cpu=True, report_to="none", save_strategy="no", learning_rate=3e-5, disable_tqdm=True,
    )  # fmt: skip
    model = AutoModelForSequenceClassification.from_pretrained(weights, num_labels=len(labels))
    Trainer(model=model, args=arguments, train_dataset=samples, callbacks=[Clock()]).train()
    if os.environ["RANK"] == "0":
        rate = SIZE * (STEPS - WARMUP) / (times[-1] - times[WARMUP - 1])
        Path(out, "rate.json").write_text(json.dumps(rate))


def theirs(weights: str, glue: str, task: str) -> float:
    with tempfile.TemporaryDirectory() as out:
        command = ["torchrun", "--nproc-per-node", "2", "--master-port", str(free_port()), __file__]
        _run([*command, "--trainer", weights, glue, task, out])
        return float(json.loads(Path(out, "rate.json").read_text()))


def ours(weights: str, glue: str, task: str) -> float:
    with tempfile.TemporaryDirectory() as out:
        command = ["deepspeed", "--num_gpus", "2", "--log_level", "error", "--master_port", str(free_port())]
        overrides = [
            f"task={task}", f"data=files/{task}", f"data.path={glue}", f"model.weights={weights}", "zero=stage0",
            f"train.steps={STEPS}", "train.log_every=8", "train.eval_every=null", "train.eval_samples=16", "name=x",
            f"output_dir={out}",
        ]  # fmt: skip
        _run([*command, "recipes/finetune.py", *overrides])
        lines = Path(out, "x", "metrics.jsonl").read_text().splitlines()
        steps = [r for r in map(json.loads, lines) if r.get("step_seconds") and r["step"] > WARMUP]
        return SIZE * (STEPS - WARMUP) / sum(r["step_seconds"] * 8 for r in steps)


def _run(command: list[str]) -> None:
    first, *rest = command
    binary = str(Path(sys.executable).parent / first)
    env = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT), "TOKENIZERS_PARALLELISM": "false"}
    done = subprocess.run([binary, *rest], cwd=ROOT, env=env, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr


def main() -> None:
    weights, glue, *more = sys.argv[1:]
    task = more[0] if more else "mrpc"
    ratios = []
    for number in range(ROUNDS):
        rates = {"ours": ours(weights, glue, task), "Trainer, padded to 128": theirs(weights, glue, task)}
        ratios.append(rates["ours"] / rates["Trainer, padded to 128"])
        print(f"round {number + 1}: " + ", ".join(f"{n} {r:.1f} samples/s" for n, r in rates.items()), flush=True)
    print(f"{task}: {statistics.mean(ratios):.2f} times as fast (mean of {len(ratios)})")


if __name__ == "__main__":
    if sys.argv[1] == "--trainer":
        trainer(*sys.argv[2:6])
    else:
        main()
