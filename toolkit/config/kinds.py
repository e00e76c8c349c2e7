"""What each kind of task can do: rules, plans and commands ask for a capability here, never for a name; no torch.

    register(Kind("mine", task="my_module:Mine"))      # beside a recipe, before it composes: task.kind=mine
    "pipeline" in KINDS[config.task.kind].can
    "data.train" in KINDS[config.task.kind].reads

A new kind is a class of toolkit.tasks.task, its line here (or in its own file, if that is a recipe's), and a preset.
"""

from dataclasses import dataclass
from typing import Literal

from toolkit.errors import nearest

# What toolkit/deepspeed/rules.py refuses of a kind without it …
Asked = Literal[
    "pipeline", "tensor", "features", "activation", "weights", "new_head", "vocab_size", "metrics", "seeds", "loss",
    "decoder", "tokens", "subwords",
]  # fmt: skip
# … and what else differs: it has a plan; every sequence is full, none is padded; tokens are masked; a sample is choices
Capability = Asked | Literal["plan", "full", "masks", "choices"]
Need = Literal["metrics", "decoder", "weights"]  # weights, or to be told that there are to be none


@dataclass(frozen=True)
class Kind:
    """``task`` is the module and the class. ``head`` and ``outputs`` are those of a BERT for it, where there is one."""

    name: str
    task: str
    can: frozenset[Capability] = frozenset()
    needs: frozenset[Need] = frozenset()
    metrics: tuple[str, ...] = ()  # that it computes
    head: Literal["masked", "pooled", "tokens"] = "tokens"  # Hugging Face's, on [CLS] or on each token
    outputs: int | None = None  # of its head; None: one for each label
    # Of the keys that some kind reads and others do not, its own; None: of a kind from outside nobody knows
    reads: frozenset[str] | None = None

    def ignores(self, key: str) -> bool:
        """Whether others read ``data.path``, say, and this one does not."""
        return self.reads is not None and any(
            f"{key}.".startswith(f"{k}.") for kind in KINDS.values() for k in (kind.reads or frozenset()) - self.reads
        )


def _keys(**nodes: str) -> frozenset[str]:
    """``data.path`` and so on of ``data="path …"``; ``columns`` is data.columns."""
    names = {"columns": "data.columns"}
    return frozenset(f"{names.get(node, node)}.{key}" for node, keys in nodes.items() for key in keys.split())


# What kinds read, beside what all do (data.format, holdout, on_error among them) and what run_rules.ASKED names
_MODEL = _keys(
    model="hidden_size num_hidden_layers num_attention_heads intermediate_size hidden_act initializer_range dropout "
    "max_position_embeddings layer_norm_eps attention",
    tokenizer="path vocab_size lowercase strip_accents min_frequency coverage max_unknown special_in_text",
    data="path streaming max_length",
)  # fmt: skip
_CORPUS = _MODEL | _keys(
    data="column split documents language max_predictions mask_rate whole_word short_rate dynamic workers",
    task="objective",
)
_TABLE = _MODEL | _keys(data="train eval test header padding group_by_length workers", train="patience", task="best")
_ROWS = _TABLE | _keys(columns="id")
_TEXTS = _ROWS | _keys(columns="text text_pair label")
_QUESTIONS = _ROWS | _keys(
    columns="question context answers", task="stride max_question max_answer n_best null_answers"
)
_PAIRS = _TABLE - _keys(model="layer_norm_eps") | _keys(
    columns="source target", model="init decoder_layers",
    task="source target source_code target_code prefix label_smoothing beams eval_beams length_penalty max_target",
)  # fmt: skip
_NUMBERS = _keys(data="path split streaming header workers target drop rows features noise", task="huber_delta")

_BERT: frozenset[Capability] = frozenset({"plan", "pipeline", "tensor", "activation", "weights"})
_LABELLED: frozenset[Capability] = _BERT | {"new_head", "metrics", "seeds"}
_METRICS: frozenset[Need] = frozenset({"metrics", "weights"})
_SQUAD = ("f1", "exact_match", "has_answer_f1", "has_answer_exact_match", "no_answer_accuracy")
_OURS = (
    Kind(
        "pretrain", "toolkit.tasks.pretrain:Pretrain", _BERT | {"vocab_size", "full", "masks"}, head="masked",
        reads=_CORPUS,
    ),
    Kind(
        "classify", "toolkit.tasks.classify:Classify", _LABELLED, _METRICS,
        ("accuracy", "f1", "f1_macro", "matthews"), "pooled", reads=_TEXTS | _keys(data="labels"),
    ),
    Kind(
        "regress", "toolkit.tasks.classify:Regress", _LABELLED, _METRICS, ("pearson", "spearman", "mse"), "pooled", 1,
        reads=_TEXTS | _keys(data="range"),
    ),
    Kind(
        "tag", "toolkit.tasks.tag:Tag", _LABELLED, _METRICS, ("f1", "precision", "recall", "accuracy"),
        reads=_ROWS | _keys(data="labels joiner", columns="tokens tags", task="scheme"),
    ),
    Kind("span_qa", "toolkit.tasks.span_qa:SpanQA", _LABELLED, _METRICS, _SQUAD, reads=_QUESTIONS),
    Kind(
        "choose", "toolkit.tasks.classify:Choose", _LABELLED | {"choices"}, _METRICS, ("accuracy",), "pooled", 1,
        reads=_ROWS | _keys(columns="prompt start endings label"),
    ),
    Kind(
        "multi_label", "toolkit.tasks.multi_label:MultiLabel", _LABELLED, _METRICS,
        ("f1_micro", "f1_macro", "map", "exact_match"), "pooled",
        reads=_TEXTS | _keys(data="labels label_separator", columns="labels", task="threshold"),
    ),
    Kind(
        "translate", "toolkit.tasks.translate:Translate",
        frozenset({"plan", "activation", "weights", "metrics", "seeds", "decoder", "tokens", "subwords"}),
        frozenset({"decoder"}), ("bleu",), reads=_PAIRS,
    ),
    Kind("linear", "toolkit.tasks.linear:Linear", frozenset({"features", "loss"}), reads=_NUMBERS),
)  # fmt: skip
KINDS = {kind.name: kind for kind in _OURS}


def register(kind: Kind) -> None:
    """Make known a kind from outside the package. Raises ValueError where the name is another's."""
    if KINDS.setdefault(kind.name, kind) != kind:
        raise ValueError(f"task.kind={kind.name} is taken, by {KINDS[kind.name].task}. Choose another name.")


def known(name: str) -> str:
    """``name``, if there is such a kind. Raises ValueError."""
    if name not in KINDS:
        raise ValueError(
            f"no such kind of task.{nearest(name, KINDS)} Known: {', '.join(KINDS)}; "
            "that of a recipe's own is known to this recipe alone"
        )
    return name
