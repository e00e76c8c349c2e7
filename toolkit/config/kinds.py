"""What each kind of task can do: rules, plans and commands ask for a capability here, never for a name; no torch.

    register(Kind("mine", task="my_module:Mine"))      # beside a recipe, before it composes: task.kind=mine
    "pipeline" in KINDS[config.task.kind].can

A new kind is a class of toolkit.tasks.task, its line here (or in its own file, if that is a recipe's), and a preset.
"""

from dataclasses import dataclass
from typing import Literal

from toolkit.errors import nearest

# What toolkit/deepspeed/rules.py refuses of a kind without it …
Asked = Literal[
    "pipeline", "tensor", "features", "activation", "weights", "new_head", "vocab_size", "metrics", "seeds", "loss",
    "decoder", "tokens", "subwords", "several",
]  # fmt: skip
# … and what else differs: it has a plan; every sequence is full, none is padded; tokens are masked; a sample is choices
Capability = Asked | Literal["plan", "full", "masks", "choices"]


@dataclass(frozen=True)
class Kind:
    """``task`` is the module and the class. ``head`` and ``outputs`` are those of a BERT for it, where there is one."""

    name: str
    task: str
    can: frozenset[Capability] = frozenset()
    needs: frozenset[Literal["metrics", "decoder"]] = frozenset()
    metrics: tuple[str, ...] = ()  # that it computes
    head: Literal["masked", "pooled", "tokens"] = "tokens"  # Hugging Face's, on [CLS] or on each token
    outputs: int | None = None  # of its head; None: one for each label


_BERT: frozenset[Capability] = frozenset({"plan", "pipeline", "tensor", "activation", "weights"})
_LABELLED: frozenset[Capability] = _BERT | {"new_head", "metrics", "seeds"}
_METRICS: frozenset[Literal["metrics"]] = frozenset({"metrics"})
_SQUAD = ("f1", "exact_match", "has_answer_f1", "has_answer_exact_match", "no_answer_accuracy")
_OURS = (
    Kind("pretrain", "toolkit.tasks.pretrain:Pretrain", _BERT | {"vocab_size", "full", "masks"}, head="masked"),
    Kind(
        "classify", "toolkit.tasks.classify:Classify", _LABELLED, _METRICS,
        ("accuracy", "f1", "f1_macro", "matthews"), "pooled",
    ),
    Kind(
        "multi_label", "toolkit.tasks.classify:MultiLabel", _LABELLED | {"several"}, _METRICS,
        ("f1_micro", "f1_macro", "map", "exact_match"), "pooled",
    ),
    Kind("regress", "toolkit.tasks.classify:Regress", _LABELLED, _METRICS, ("pearson", "spearman", "mse"), "pooled", 1),
    Kind("tag", "toolkit.tasks.tag:Tag", _LABELLED, _METRICS, ("f1", "precision", "recall", "accuracy")),
    Kind("span_qa", "toolkit.tasks.span_qa:SpanQA", _LABELLED, _METRICS, _SQUAD),
    Kind("choose", "toolkit.tasks.classify:Choose", _LABELLED | {"choices"}, _METRICS, ("accuracy",), "pooled", 1),
    Kind(
        "translate", "toolkit.tasks.translate:Translate",
        frozenset({"plan", "activation", "weights", "metrics", "seeds", "decoder", "tokens", "subwords"}),
        frozenset({"decoder"}), ("bleu",),
    ),
    Kind("linear", "toolkit.tasks.linear:Linear", frozenset({"features", "loss"})),
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
