"""The planner's parameters are those of the models that are trained, one by one."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from transformers.initialization import no_init_weights

from toolkit.config.compose import compose
from toolkit.errors import PlanError
from toolkit.models import seq2seq
from toolkit.models.build import bert_config
from toolkit.models.pretraining import MODELS
from toolkit.plan.shapes import model_shape
from toolkit.tasks import task_class

SMALL = (
    "model.num_hidden_layers=3",
    "model.hidden_size=48",
    "model.num_attention_heads=3",
    "model.intermediate_size=80",
)
CASES = {
    "pretrain, bert_base": ["model=bert_base"],
    "pretrain, bert_large": ["model=bert_large"],
    "masked words alone": [*SMALL, "task.objective=mlm"],
    "sentence order": [*SMALL, "task.objective=sop"],
    "classes": ["task=mnli", *SMALL, "data.labels=[a,b,c]"],
    "several labels": ["task=multi_label", *SMALL, "data.columns.labels=[a,b,c,d]"],
    "a score": ["task=stsb", *SMALL],
    "tags": ["task=conll2003", *SMALL, "data.labels=[O,B-X,I-X,B-Y,I-Y]"],
    "spans": ["task=squad", *SMALL],
    "choices": ["task=swag", *SMALL],
    "translation": ["task=translate", "model=transformer_base"],
    "translation, sides of different depth": ["task=translate", "model=transformer_tiny", "model.decoder_layers=1"],
}


def real_model(config: Any) -> Any:
    """As tasks and toolkit/models build it, without memory."""
    shape, vocab, task = config.model, config.tokenizer.vocab_size, config.task.kind
    if task == "translate":
        hf_config: Any = seq2seq.marian_config(shape, seq2seq.Special(0, 1, 0), vocab)
        model_class = seq2seq.model_class(hf_config)
    else:
        hf_config = bert_config(shape, vocab_size=vocab, pad_id=0)
        hf_config.num_labels = (
            len(config.data.labels or config.data.columns.labels or task_class(task).label_names)
            if task != "pretrain"
            else 2
        )
        classes = MODELS if task == "pretrain" else getattr(transformers, task_class(task).models)
        model_class = classes[config.task.objective if task == "pretrain" else type(hf_config)]
    with torch.device("meta"), no_init_weights():
        model = model_class(hf_config)
    model.tie_weights()
    return model


@pytest.mark.parametrize("case", CASES)
def test_every_parameter_is_one_of_the_real_model(case: str) -> None:
    config = compose(CASES[case])
    shape, real = model_shape(config), real_model(config)
    assert shape.parameters == real.num_parameters()
    planned = [p for layer in shape.layers for p in layer.parameters]
    assert sorted((p.shape, p.trained) for p in planned) == sorted(
        (tuple(p.shape), p.requires_grad) for p in real.parameters()
    )


@pytest.mark.parametrize("tied", [True, False])
def test_a_folders_config_json_says_as_much(tied: bool, tmp_path: Path) -> None:
    hf_config = bert_config(compose(SMALL).model, vocab_size=321, pad_id=0)
    hf_config.tie_word_embeddings = tied
    hf_config.save_pretrained(tmp_path)
    with torch.device("meta"), no_init_weights():
        real = MODELS["mlm_nsp"](hf_config)
    real.tie_weights()
    shape = model_shape(compose([f"model.weights={tmp_path}"]))
    assert shape.parameters == real.num_parameters() and shape.vocab_size == 321


@pytest.mark.parametrize(
    ("text", "said"),
    [
        (None, "no config.json there"),
        ("{", "no configuration of a Hugging Face model"),
        ("[]", "no configuration of a Hugging Face model"),
        ('{"model_type": "bert"}', "no configuration of a Hugging Face model"),
        (json.dumps({"model_type": "llama"}), "a llama model cannot be planned"),
    ],
)
def test_a_folder_without_a_known_model_is_refused(text: str | None, said: str, tmp_path: Path) -> None:
    if text is not None:
        (tmp_path / "config.json").write_text(text)
    with pytest.raises(PlanError, match=said):
        model_shape(compose([f"model.weights={tmp_path}"]))


def test_a_task_that_the_model_cannot_do_is_refused() -> None:
    with pytest.raises(PlanError, match=r"task.kind=translate with a bert model"):
        model_shape(compose(["task=translate", "model=bert_base"]))


def test_labels_of_the_data_are_those_that_a_runs_model_has(tmp_path: Path) -> None:
    keys = {"model_type": "bert", "hidden_size": 8, "intermediate_size": 16, "vocab_size": 9, "num_hidden_layers": 1}
    keys |= {"num_attention_heads": 1, "id2label": {str(i): f"L{i}" for i in range(5)}}
    (tmp_path / "config.json").write_text(json.dumps(keys))
    shape = model_shape(compose(["task=conll2003", f"model.weights={tmp_path}"]))
    assert shape.by_part()["head"] == 5 * 8 + 5
