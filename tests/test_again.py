"""Every recipe and kind of task starts again from the config.yaml that it has saved, and makes the same runs of it."""

from pathlib import Path
from typing import Any

import pytest
from hydra import compose as hydra_compose
from hydra import initialize_config_dir
from launching import ROOT
from studies import scaling, step_memory

from toolkit.cluster.launchers.job import Launch, load_recipe, prepare, save
from toolkit.config.compose import compose, rebased
from toolkit.config.kinds import KINDS
from toolkit.config.schema import load
from toolkit.train.several import each

FRESH = "model.weights=none"
# What is typed: a recipe of each kind of task, and each recipe that makes further runs, with how many it makes
STARTS: dict[str, tuple[str, list[str], int]] = {
    "pretrain": ("pretrain", ["experiment=demo", "zero=stage3", "offload=cpu"], 0),
    "classify": ("finetune", ["task=classify", "data.train=a.csv", "data.labels=[no,yes]", FRESH], 1),
    "classify, seeds": ("finetune", ["task=sst2", "seeds=[1,2,3]", FRESH], 3),
    "multi_label": ("finetune", ["task=multi_label", "data.train=a.csv", "data.columns.labels=[a,b]", FRESH], 1),
    "regress": ("finetune", ["task=regress", "data.train=a.csv", FRESH], 1),
    "tag": ("finetune", ["task=conll2003", FRESH], 1),
    "span_qa": ("finetune", ["task=squad_v2", "seeds=[4]", FRESH], 1),
    "choose": ("finetune", ["task=swag", FRESH], 1),
    "glue": (
        "finetune",
        ["task=glue", "data=files/glue", "data.path=/data/glue", "seeds=[1,2]", FRESH],
        18,
    ),
    "translate": ("translate", ["experiment=multi30k", "data.path=/data/m", "seeds=[1,2]"], 2),
    "linear": ("linear_regression", ["loss=huber"], 0),
    "denoise": ("spatial_conv", ["spatial_conv.noise=0.2"], 0),
    "bert_init": ("bert_init", ["experiment=multi30k_bert", "data.path=/data/m"], 3),
    "batch_size": ("batch_size", ["task=linear", "batch_size.target_loss=1", "batch_size.sizes=[8,16]"], 0),
    "memory": ("memory", ["model=bert_mini"], 28),
    "memory of a layout": ("memory", ["zero=stage3", "offload=nvme", "experiment=smoke"], 4),
    "memory of an offload": ("memory", ["offload=cpu"], 4),
    "memory of one": ("memory", ["zero=stage1", "activation=recompute"], 1),
    "memory of an activation": ("memory", ["activation=offload_cpu"], 7),
    "scaling": ("scaling", ["scaling.ranks=[1,2,4]", "experiment=smoke", "zero=stage1"], 6),
    "scaling of another task": (
        "scaling",
        ["scaling.recipe=finetune", "task=sst2", "scaling.mode=weak", FRESH],
        2,
    ),
    "scaling of its preset": ("scaling", ["scaling.recipe=linear_regression", "zero=stage1"], 4),
    "mcmc": ("mcmc", [], 0),
    "reductions": ("reductions", [], 0),
    "reproduce": ("reproduce", ["target=all"], 0),
}


def further(recipe: str, config: Any) -> list[Any]:
    """The configurations of the runs that a recipe makes of its own; of memory what they are composed of."""
    if recipe in ("finetune", "translate"):
        return list(each(config))
    if recipe == "bert_init":
        return list(load_recipe(ROOT / "recipes/bert_init.py").main.__globals__["configs"](config, "below").values())
    if recipe == "memory":
        return step_memory.combinations(config)
    if recipe == "scaling":
        own = scaling.of_recipe(config, ROOT / f"recipes/{config.scaling.recipe}.py")
        modes = ("strong", "weak") if config.scaling.mode == "both" else (config.scaling.mode,)
        return [child.config for child in scaling.plan(own, modes, config.scaling.ranks, Path("below"))]
    return []


@pytest.mark.parametrize("name", STARTS)
def test_a_run_starts_again_from_its_own_config_and_makes_its_runs(name: str, tmp_path: Path) -> None:
    recipe, typed, count = STARTS[name]
    path = ROOT / "recipes" / f"{recipe}.py"
    job = prepare(path, [*typed, "batch.micro_size=1", "name=x", "cluster.accelerator=cpu"], tmp_path)
    save(job, Launch("", []))
    kind = name.partition(",")[0]
    assert kind not in KINDS or job.config.task.kind == kind
    with initialize_config_dir(str(tmp_path), version_base="1.3"):  # as a recipe's --config-path
        again = load(hydra_compose("config"), type(job.config))
        assert again == job.config
        assert len(further(recipe, again)) == count


def test_every_recipe_and_kind_of_task_is_started_again() -> None:
    assert set(KINDS) <= {name.partition(",")[0] for name in STARTS}
    assert {recipe for recipe, _, _ in STARTS.values()} == {p.stem for p in (ROOT / "recipes").glob("*.py")}


MUCH = [
    "zero=stage3", "offload=cpu_params", "precision=bf16", "optimizer=sgd", "schedule=none", "data.max_length=64",
    "model=bert_mini", "deepspeed.zero_optimization.stage3_max_live_parameters=7", "~deepspeed.optimizer.params.lr",
    "train.epochs=1", "train.eval_every=null", "batch.micro_size=2", "machine=a10",
]  # fmt: skip


@pytest.mark.parametrize("data", [["data=files/glue", "data.path='/it\\'s here/glue'"], []])
@pytest.mark.parametrize("task", ["mnli", "stsb"])
def test_a_task_of_glue_is_its_preset_with_what_was_typed(task: str, data: list[str]) -> None:
    config = compose(["task=glue", *data, *MUCH])
    place = "files" if data else "hub"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("toolkit.train.several.GLUE", {task: ""})
        (one,) = each(config.model_copy(update={"name": "x"}))
    expected = compose([f"task={task}", f"data={place}/{task}", *data[1:], *MUCH])
    assert one == expected.model_copy(update={"name": f"x-{task}"})


@pytest.mark.parametrize("typed", [["zero=stage3", "offload=nvme", "experiment=smoke", *MUCH[3:]], ["activation=none"]])
def test_a_combination_of_memory_is_its_presets_with_what_was_typed(typed: list[str]) -> None:
    config = compose(typed)
    for options in ({"zero": "stage0", "offload": "none"}, {"zero": "stage3", "offload": "cpu_params"}):
        other = step_memory.overrides(options | {"activation": "recompute"})
        assert rebased(config, compose(step_memory.overrides(step_memory.chosen(config))), compose(other)) == compose(
            [*typed, *other]
        )


def test_scaling_gives_the_recipe_what_is_not_its_own_and_the_preset_that_it_begins_from() -> None:
    config = compose(["zero=stage1", "name=y", "output_dir=z", "resume=never", "train.steps=3"])
    recipes = ROOT / "recipes"
    own = compose(["task=linear", "zero=stage1", "train.steps=3"])
    asked = scaling.of_recipe(config, recipes / "linear_regression.py")
    assert asked == own.model_copy(update={"name": "y", "output_dir": "z"})
    assert scaling.of_recipe(config, recipes / "finetune.py").task.name == "pretrain", "it is for several kinds"
    assert scaling.of_recipe(compose(["task=sst2"]), recipes / "linear_regression.py").task.name == "sst2"
