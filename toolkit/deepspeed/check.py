"""What is wrong with anybody's DeepSpeed JSON file, line by line; no torch, no DeepSpeed.

toolkit check ds_config.json --world 8 --model bert_large      # exit code 2: DeepSpeed refuses it, or does otherwise
"""

import json
import re
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from math import prod
from pathlib import Path
from typing import Any, Literal

from toolkit.deepspeed import ds_config
from toolkit.deepspeed.ds_config import Problem
from toolkit.deepspeed.facts import BATCH_KEYS, Facts, Unknown
from toolkit.deepspeed.rules import FILLED, RULES, Rule
from toolkit.errors import ConfigError

# What DeepSpeed gets along with; all else it refuses, or does not do as the file says.
NOTES = {
    "aio_without_nvme", "auto_filled", "bf16_options", "bucket_overlap", "compile_options", "fp16_options", "hjson",
    "ignored", "nvme_sub_groups", "overlap_off", "packages", "replaced_key", "stage12_keys", "stage3_keys",
    "static_scale", "two_rates", "zero_flag", "zero_keys_at_stage0",
}  # fmt: skip
COMMENT = re.compile(r'"(?:\\.|[^"\\\n])*"|(//[^\n]*|#[^\n]*|/\*.*?\*/)', re.DOTALL)
TRAILING = re.compile(r'"(?:\\.|[^"\\\n])*"|(,)(?=\s*[}\]])')
TOKEN = re.compile(r'("(?:\\.|[^"\\\n])*")(\s*:)?|[{}[\]]')
PEAK = {"WarmupLR": "warmup_max_lr", "WarmupDecayLR": "warmup_max_lr", "OneCycle": "cycle_max_lr"}
SHARED = ("tensor_parallel.autotp_size", "sequence_parallel_size")  # ranks of one copy of the model
BUCKET = 500_000_000  # DeepSpeed's default


@dataclass(frozen=True)
class Remark:
    """``rule`` is a key of a table of rules, or a name of this file and ds_config.py."""

    level: Literal["problem", "note"]
    rule: str
    line: int | None  # None: of the file as a whole
    column: int | None
    text: str


def check(
    path: Path,
    *,
    world: int | None = None,
    device: str = "cuda",
    parameters: int | None = None,
    largest: int | None = None,
) -> list[Remark]:
    """What DeepSpeed would refuse, ignore or do otherwise, by line; None is unknown. Raises ConfigError.

    ``world`` counts all ranks, ``parameters`` those of the model, ``largest`` the elements of its largest.
    """
    try:
        text, found = _plain(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError) as error:
        why = getattr(error, "strerror", None) or error
        raise ConfigError(f"{path}: cannot be read ({why}). Name a DeepSpeed JSON file.") from error
    ds = _parsed(text)
    if isinstance(ds, Remark):
        found.append(ds)
    else:
        lines, twice = _lines(text)
        facts = Facts(ds_config.whole_numbers(ds), None, device, largest, parameters=parameters)
        found += [*twice, *(_remark(p, lines) for p in _problems(facts, world))]
    return sorted(set(found), key=lambda f: (f.line or 0, f.text))


def as_json(path: Path, findings: list[Remark]) -> str:
    counts = {f"{level}s": sum(f.level == level for f in findings) for level in ("problem", "note")}
    found = {"file": str(path), "deepspeed": ds_config.known()["deepspeed"], **counts}
    return json.dumps(found | {"findings": list(map(asdict, findings))}, indent=1)


def told(path: Path, findings: list[Remark]) -> Iterator[str]:
    """A line for each finding, as compilers write them, and one for all."""
    for f in findings:
        place = ":".join(str(part) for part in (path, f.line, f.column) if part is not None)
        yield f"{place}: {f.level}: {f.text}"
    problems = sum(f.level == "problem" for f in findings)
    yield f"{path}: {problems or 'no'} problem{'s' * (problems != 1)} with DeepSpeed {ds_config.known()['deepspeed']}"


def _plain(text: str) -> tuple[str, list[Remark]]:
    """What is left of a JSON text without comments and trailing commas, in the same places."""
    found = []
    for pattern, what in ((COMMENT, "a comment"), (TRAILING, "a comma before a closing bracket")):
        for match in (m for m in pattern.finditer(text) if m[1]):
            say = f"{what}: DeepSpeed reads Hjson, but Hugging Face's Trainer and Python's json refuse it. Take it out."
            found.append(_at(text, match.start(1), "hjson", say))
        text = pattern.sub(lambda m: re.sub(r"[^\n]", " ", m[0]) if m[1] else m[0], text)
    return text, found


def _parsed(text: str) -> dict[str, Any] | Remark:
    """DeepSpeed's keys and values, or why these are none."""
    try:
        ds = json.loads(text)
    except json.JSONDecodeError as error:
        return _at(text, error.pos, "syntax", f"no JSON: {error.msg}. Mend it there.")
    except (ValueError, RecursionError) as error:  # numbers of thousands of digits, brackets as deep
        return _at(text, 0, "syntax", f"no JSON that can be read: {error}.")
    if not isinstance(ds, dict):
        return _at(text, 0, "syntax", "no object. Write {…} around DeepSpeed's keys.")
    table = ds_config.known()
    if 10 * len({*ds} & {*table["keys"], *table["removed"]}) < len(ds):
        return _at(text, 0, "not_deepspeed", "hardly one key is DeepSpeed's. Name a DeepSpeed configuration.")
    return ds


def _lines(text: str) -> tuple[dict[str, int], list[Remark]]:
    """The line of every key of a valid JSON text, and keys that an object has twice."""
    lines: dict[str, int] = {}
    twice, outer, name = [], list[str](), ""
    for match in TOKEN.finditer(text):
        if match[1] is None:  # a bracket; what follows has no name if it is an element of a list
            outer.append(name) if match[0] in "{[" else outer.pop()
            name = f"[{match.start()}]"
        elif match[2]:
            name = json.loads(match[1])
            path = ".".join([*outer[1:], name])
            if path in lines:
                say = f"{path} is given twice, first in line {lines[path]}: DeepSpeed refuses the file. Drop one."
                twice.append(_at(text, match.start(), "duplicate_key", say))
            lines.setdefault(path, text.count("\n", 0, match.start()) + 1)
    return lines, twice


def _at(text: str, position: int, rule: str, say: str) -> Remark:
    column = position - text.rfind("\n", 0, position)
    return Remark("note" if rule in NOTES else "problem", rule, text.count("\n", 0, position) + 1, column, say)


def _remark(problem: Problem, lines: dict[str, int]) -> Remark:
    """With the line of the first key that the text names, or of its block."""
    named = [problem.key, *re.findall(r"[\w.]*\w", problem.text)]
    blocks = [key.rpartition(".")[0] for key in named]
    line = next((lines[key] for key in [*named, *blocks] if key in lines), None)
    return Remark("note" if problem.rule in NOTES else "problem", problem.rule, line, None, problem.text)


def _problems(facts: Facts, world: int | None) -> Iterator[Problem]:
    split = _split(facts)
    if world and split and world % split:
        yield Problem("ranks", f"{' x '.join(SHARED)} = {split} does not divide {world} ranks. Change one of them.")
    elif world and split:
        facts = replace(facts, ranks=world // split)
    flag = facts.ds.get("zero_optimization")
    if isinstance(flag, bool):  # zero/config.py, read_zero_config_deprecated
        facts = replace(facts, ds={**facts.ds, "zero_optimization": {"stage": int(flag)}})
        yield Problem("zero_flag", f'zero_optimization={flag}: the old form of {{"stage": {int(flag)}}}. Write that.')
    found = ds_config.problems(facts, "", RULES | FILE_RULES)
    filled = [p for p in found if p.rule == "auto" and p.key in FILLED]
    if filled:
        keys = ", ".join(p.key for p in filled)
        yield Problem("auto_filled", f"{keys}: 'auto' is filled in by Hugging Face's Trainer and accelerate only.")
    yield from (p for p in found if p not in filled)


def _split(f: Facts) -> int | None:
    """Ranks that share one copy of the model; None where the file leaves it open."""
    try:
        sizes = [f[key] for key in SHARED]
    except Unknown:
        return None
    return prod(size for size in sizes if isinstance(size, int) and size > 0)


def _overlaps(f: Facts) -> bool:
    """Whether it is on: by default at stage 3 only (zero/config.py, overlap_comm_valid)."""
    given = f["zero_optimization.overlap_comm"]
    return f.stage > 0 and f.ranks != 1 and bool(f.stage == 3 if given is None else given)


def _two_rates(f: Facts) -> str:
    """The scheduler's rate where it is not the optimizer's."""
    key = f"scheduler.params.{PEAK.get(f['scheduler.type'])}"
    rates = [value for value in (f[key], f["optimizer.params.lr"]) if isinstance(value, int | float)]
    return f"{key}={rates[0]}" if len(set(rates)) == 2 else ""


# What a RunConfig has no need of: its ranks are known, its presets and schedules are our own.
FILE_RULES: dict[str, Rule] = {
    "batch_multiple": (lambda f: f.ranks is None  # where the ranks are known, batch_product says more
        and (f[BATCH_KEYS[0]] or 0) % ((f[BATCH_KEYS[1]] or 1) * (f[BATCH_KEYS[2]] or 1)),
        "train_batch_size={f[train_batch_size]} is no multiple of train_micro_batch_size_per_gpu x "
        "gradient_accumulation_steps: no number of ranks fits. Give two of the three."),
    "two_rates": (_two_rates,
        "{got} replaces optimizer.params.lr={f[optimizer.params.lr]}. Write the same rate twice, or leave the latter "
        "out."),
    "overlap_off": (lambda f: f.stage in (1, 2) and f.ranks != 1 and not _overlaps(f),
        "zero_optimization.overlap_comm is off, as by default below stage 3: gradients are not reduced beside the "
        "backward pass. Set it to true, with buckets well below the model's size."),
    "bucket_overlap": (lambda f: f.parameters and _overlaps(f)
        and (f["zero_optimization.reduce_bucket_size"] or BUCKET) >= f.parameters,
        "zero_optimization.reduce_bucket_size (by default 5e8) is not below the {f.parameters:,} parameters: all "
        "gradients are reduced at once after the backward pass, and nothing overlaps. Use a tenth of the parameters."),
}  # fmt: skip
