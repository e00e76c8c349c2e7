"""A kind of task from outside the package: one file beside it, and it trains; kinds of nobody are refused."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from composing import compose
from transformers import BertConfig

from toolkit.config import kinds, schema
from toolkit.config.kinds import KINDS, Kind
from toolkit.config.schema import Columns, Data, Model, Tokenizer, Train, conf_dir
from toolkit.errors import ConfigError
from toolkit.tasks import task_class
from toolkit.tasks.task import Task

DOUBLING = """
import torch

from toolkit.config.kinds import Kind, register
from toolkit.config.schema import RunConfig
from toolkit.engine.start import start_engine
from toolkit.models.build import build_model
from toolkit.models.linear import LinearConfig, LinearRegression
from toolkit.run.directory import Run
from toolkit.run.recipe import recipe
from toolkit.tasks import build_task
from toolkit.tasks.task import Task
from toolkit.train.loop import fit
from toolkit.train.own_plan import begin

register(Kind("doubling", task="__main__:Doubling"))


class Doubling(Task):
    inputs, labels, outputs = ("features",), ("target",), ("predicted",)
    model_class = LinearRegression

    def __init__(self, run):
        super().__init__(run)
        self.hf_config = LinearConfig(1)
        self.lasts(lambda epochs: 2)

    def train_batches(self, start_sample):
        features = torch.tensor([[1.0], [2.0]])
        while True:
            yield {"features": features, "target": 2 * features[:, 0]}

    def losses(self, outputs, batch):
        return {"loss": (outputs["predicted"] - batch["target"]).square().sum()}

    def counts(self, batch):
        return dict.fromkeys(("loss", "sequences", "tokens", "positions"), len(batch["target"]))

    def useful_flops(self, counts):
        return counts["sequences"]


@recipe()
def main(config: RunConfig) -> None:
    run = Run.open(config)
    task = build_task(run)
    plan = begin(run, task)
    model = build_model(run, task, plan.ds)
    engine = start_engine(model, task, run, plan.ds)
    fit(engine, task, run, plan)


main()
"""


def test_a_kind_from_outside_the_package_trains(tmp_path: Path) -> None:
    (tmp_path / "doubling.py").write_text(DOUBLING)
    overrides = ["task.kind=doubling", "task.name=doubling", f"output_dir={tmp_path}", "name=run", "zero=stage0"]
    small = ["batch.global_size=2", "batch.micro_size=2", "data.workers=0", "optimizer=sgd", "schedule=none"]
    more = [
        "train.log_every=1",
        "deepspeed.optimizer.params={lr: 0.1}",
        "deepspeed.gradient_clipping=0.0",
        "train.steps=2",
    ]
    command = [sys.executable, str(tmp_path / "doubling.py"), *overrides, *small, *more]
    result = subprocess.run(command, capture_output=True, text=True, env=os.environ, timeout=300, check=False)
    assert result.returncode == 0, result.stderr
    records = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    losses = {r["step"]: r["loss"] for r in records if "loss" in r}
    # It begins at 0 x + 1, errors -1 and -3: (1 + 9) / 2; a step of 0.1 takes it to 0.7 x + 1.4, errors 0.1 and -1.2
    assert losses == pytest.approx({1: 5.0, 2: (0.1**2 + 1.2**2) / 2})


@pytest.mark.parametrize(("given", "way"), [("clasify", "Did you mean 'classify'?"), ("doubling", "Known: pretrain, ")])
def test_a_kind_that_nobody_declared_is_refused(given: str, way: str) -> None:
    with pytest.raises(ConfigError, match=rf"^task.kind='{given}': no such kind of task\.") as refused:
        compose(f"task.kind={given}")
    assert way in str(refused.value) and "\n" not in str(refused.value)


def test_a_name_is_given_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kinds, "KINDS", dict(KINDS))
    kinds.register(Kind("mine", task="a:Mine"))
    kinds.register(Kind("mine", task="a:Mine"))  # its module is imported again
    with pytest.raises(ValueError, match=r"task.kind=mine is taken, by a:Mine"):
        kinds.register(Kind("mine", task="b:Mine"))


@pytest.mark.parametrize("kind", KINDS.values(), ids=list(KINDS))
def test_what_is_declared_of_a_kind_is_so(kind: Kind) -> None:
    found = task_class(kind.name)
    assert issubclass(found, Task) and bool(kind.metrics) == ("metrics" in kind.can) and kind.needs <= kind.can
    presets = [yaml.safe_load(p.read_text()) for p in (conf_dir() / "task").glob("*.yaml")]
    nodes = [preset.get("task", preset) for preset in presets]
    mine = [node for node in nodes if node["kind"] == kind.name]
    assert mine and all(set(node.get("metrics", ())) <= set(kind.metrics) for node in mine)


# Keys that every kind reads, or that another rule asks for (ASKED in run_rules.py)
ALL = {
    "data.format", "data.holdout", "data.on_error", "data.cache_dir", "data.columns", "task.name", "task.kind",
    "model.from_scratch", "model.type", "model.weights", "model.new_head", "model.vocab_size", "tokenizer.model",
    "task.metrics", "task.loss",
    *(f"train.{key}" for key in Train.model_fields if key != "patience"),
}  # fmt: skip
# Where a kind's data is read, besides its own file and what it shares with all: the names of the keys are there
TEXT = "data/tokenizer data/vocabulary data/prepared models/build"
LABELLED = f"{TEXT} data/labelled data/tables data/examples tasks/finetune tasks/metrics train/loop"
SOURCES = {
    "pretrain": f"{TEXT} data/text data/corpus data/masked data/sources data/order tasks/task",
    "translate": f"{TEXT} data/parallel data/tables models/seq2seq tasks/task train/loop",
    "linear": "data/regression data/tables tasks/task",
    "span_qa": f"{LABELLED} data/windows tasks/task",
    "multi_label": f"{LABELLED} tasks/task tasks/classify",
} | dict.fromkeys(("classify", "regress", "tag", "choose"), f"{LABELLED} tasks/task")


def test_of_every_key_it_is_known_which_kinds_read_it() -> None:
    nodes = {"data": Data, "data.columns": Columns, "task": schema.Task, "tokenizer": Tokenizer, "model": Model}
    every = {f"{node}.{key}" for node, model in nodes.items() for key in model.model_fields}
    every |= {f"train.{key}" for key in Train.model_fields}
    read = frozenset[str]().union(*(kind.reads or () for kind in KINDS.values()))
    assert read | ALL == every, "a new key belongs into toolkit/config/kinds.py, or ALL if every kind reads it"
    assert not read & ALL


@pytest.mark.parametrize("kind", SOURCES)
def test_a_kind_reads_what_it_says(kind: str) -> None:
    """The name of each key stands in its sources; what others read of the node ``task`` does not stand in its file."""
    own, root = KINDS[kind], Path(kinds.__file__).parents[1]
    file = root / f"{own.task.split(':')[0].removeprefix('toolkit.').replace('.', '/')}.py"
    texts = [path.read_text() for path in (file, *(root / f"{name}.py" for name in SOURCES[kind].split()))]
    texts.append(" ".join(BertConfig().to_dict()))  # models/build.py copies what has its name there
    missing = {key for key in own.reads or () if not any(re.search(rf"\b{key.split('.')[-1]}\b", t) for t in texts)}
    assert not missing
    others = {key for k in KINDS.values() for key in k.reads or () if key.startswith("task.") and own.ignores(key)}
    assert not [key for key in others if re.search(rf"\b{re.escape(key)}\b(?!=)", file.read_text())]
