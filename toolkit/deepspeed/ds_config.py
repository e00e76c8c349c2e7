"""The ``deepspeed`` node: completed for a run, and checked before any process group exists; pure, no torch.

    ds = complete(config, world=2, device="cuda", run_dir=run.dir)    # exactly what DeepSpeed gets
    required_ops(ds, device="cuda", world=2)                          # builders to compile ahead of time

It raises one ConfigError with a line for every problem. The keys that DeepSpeed knows are in keys.json, written from
the installed version by tests/make_ds_keys.py; the rules in rules.py and run_rules.py. check.py has the same for files.
"""

import copy
import hashlib
import json
import re
from collections.abc import Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from types import UnionType
from typing import Any

from toolkit.config.schema import RunConfig, cache_dir, dotted
from toolkit.config.units import MIB
from toolkit.deepspeed.facts import AUTO, BATCH_KEYS, Facts, Unknown
from toolkit.deepspeed.rules import FILLED, IN_A_FILE, RULES, Rule
from toolkit.deepspeed.run_rules import RUN_RULES, UNREAD
from toolkit.errors import ConfigError, nearest

OF_A_STAGE = ("zero_keys_at_stage0", "stage3_keys", "stage12_keys")  # rules on what another stage reads
ADAM_KEYS = {"adam_w_mode": "bool", "torch_adam": "bool", "fp32_optimizer_states": "bool"}
ONE_BIT = {"onebitadam": "AdamW", "zerooneadam": "AdamW", "onebitlamb": "Lamb"}  # removed, and what they were based on
MUP = ("muadam", "muadamw", "musgd")  # of the package mup
ADAM_FAMILY = ("FusedAdam", "DeepSpeedCPUAdam", "MuonWithAuxAdam", "torch.Adam", "torch.AdamW")
# Kinds of values in keys.json, their types, and how they are told; all else is of any type
TYPES: dict[str, tuple[type | UnionType, str]] = {
    "bool": (bool, "true or false"),
    "int": (int, "a whole number"),
    "number": (int | float, "a number"),
    "string": (str, "a text"),
    "list": (list | tuple, "a list"),
    "object": (Mapping, "an object"),  # whose keys are not in keys.json
    "block": (Mapping, "a block"),
}


@dataclass(frozen=True)
class Problem:
    """A broken rule (its name in rules.py, run_rules.py, or here) and the line that is shown."""

    rule: str
    text: str
    key: str = ""  # where its value cannot be used


@dataclass(frozen=True)
class Completed:
    """The DeepSpeed JSON of a run as far as it could be completed, and what is wrong with the run."""

    ds: dict[str, Any]
    problems: list[Problem]


def complete(
    config: RunConfig, *, world: int, device: str, vocab_size: int | None = None, run_dir: Path | None = None
) -> dict[str, Any]:
    """``config.deepspeed`` with the batch sizes, NVMe buffers and monitor paths that follow from the run.

    ``world`` counts all ranks. Raises ConfigError for whatever is wrong in the run's config.
    """
    completed = examine(config, world=world, device=device, vocab_size=vocab_size, run_dir=run_dir)
    _refuse(completed.problems)
    return completed.ds


def refuse_unread(config: RunConfig) -> None:
    """Raise ConfigError for keys that nothing reads: the part of ``complete`` for what starts no engine."""
    _refuse(_broken(UNREAD, Facts({}, None, "cpu", config=config), ""))


def _refuse(problems: list[Problem]) -> None:
    if problems:
        raise ConfigError("\n".join(dict.fromkeys(problem.text for problem in problems)))


def examine(
    config: RunConfig, *, world: int, device: str, vocab_size: int | None = None, run_dir: Path | None = None
) -> Completed:
    """What ``complete`` does, with the problems as values."""
    found = []
    if world % config.split:
        text = f"pipeline.stages={config.pipeline.stages} x deepspeed.tensor_parallel.autotp_size={config.tensor_size}"
        way = f"Start {(world // config.split + 1) * config.split} ranks, or use smaller ones."
        found.append(Problem("layout", f"{text} does not divide {world} ranks. {way}"))
    world = max(1, world // config.split)  # from here on: copies of the model
    ds: dict[str, Any] = whole_numbers(config.deepspeed)
    batch = list(_batch_problems(config, world))
    if not batch:
        ds = {**batch_sizes(config, world), **ds}
    facts = Facts(ds, world, device, largest_parameter(config, vocab_size), config)
    if not list(_shape(ds, "")):
        _fill(ds, facts, run_dir)
    rest = [p for p in problems(facts, rules=RULES | RUN_RULES) if not (batch and p.rule.startswith("batch_"))]
    return Completed(ds, found + batch + rest)


def problems(facts: Facts, prefix: str = "deepspeed.", rules: Mapping[str, Rule] = RULES) -> list[Problem]:
    """What is wrong with a DeepSpeed config: its keys, its types, the combination of its values."""
    found = list(_shape(facts.ds, prefix))
    facts = _without(facts, found)
    for shape in (_optimizer_shape, _scheduler_shape):
        with suppress(Unknown):
            found += shape(facts, prefix)
    return found + _broken(rules, _without(facts, found), prefix)


def _without(facts: Facts, found: list[Problem]) -> Facts:
    """The same without unknown keys, and with values that cannot be used as unknown."""
    keyed = [p for p in found if p.key]
    if not keyed:
        return facts
    ds = copy.deepcopy(dict(facts.ds))
    for problem in keyed:
        *blocks, last = problem.key.split(".")
        node = ds
        for block in blocks:
            node = node[block] if isinstance(node.get(block), dict) else {}  # a key may have dots
        node[last] = "auto"
        if problem.rule in ("unknown_key", "removed_key"):
            del node[last]
    return replace(facts, ds=ds)


def _broken(rules: Mapping[str, Rule], facts: Facts, prefix: str) -> list[Problem]:
    """Those of ``rules`` that the facts break, as far as these are known."""
    found = []
    for name, (when, say) in rules.items():
        with suppress(Unknown):
            if got := when(facts):
                say = re.sub(r"{v\[(.+?)]}", r"{p}\1={f[\1]}", say)
                text = say.format(p=prefix, f=facts, c=facts.config, got=got)
                for preset, key in IN_A_FILE.items() if facts.config is None else ():
                    text = text.replace(preset, key)
                found.append(Problem(name, (name in OF_A_STAGE and _as_typed(got, facts)) or text))
    return found


def _as_typed(keys: str, facts: Facts) -> str:
    """Of a stage that was typed, and leaves without effect what nobody has typed: a preset's keys."""
    typed, stage = facts.config.typed if facts.config else frozenset(), "deepspeed.zero_optimization.stage"
    if stage not in typed or typed & {f"deepspeed.{key}" for key in keys.split(", ")}:
        return ""
    return f"{stage}={facts.stage} alone leaves {keys} of a preset, without effect there. Use zero=stage{facts.stage}."


def required_ops(ds: Mapping[str, Any], *, device: str, world: int) -> list[str]:
    """The op builders (DeepSpeed's class names) that training with ``ds`` loads, to be built before."""
    facts = Facts(ds, world, device)
    own = facts.optimizer.removeprefix("DeepSpeed")
    if own == "MuonWithAuxAdam":  # its Adam half
        own = "FusedAdam" if facts.offload == "none" else "CPUAdam"
    gds, quantized = bool(facts["aio.use_gds"]), ("weights", "gradients", "nontrainable_weights")
    wanted = {
        "ShareMemCommBuilder": device == "cpu",  # comm/torch.py loads it whatever the world size
        f"{own}Builder": own and not own.startswith("torch.") and not facts["optimizer.params.torch_adam"],
        "PinMemoryBuilder": facts.nvme and not gds,  # AsyncIOBuilder.load loads it before its own
        "AsyncIOBuilder": facts.nvme and not gds,
        "GDSBuilder": facts.nvme and gds,
        "QuantizerBuilder": any(facts[f"zero_optimization.zero_quantized_{what}"] for what in quantized),
        "DeepCompileBuilder": facts["compile.deepcompile"],
    }
    return [name for name, needed in wanted.items() if needed]


def every_op(device: str) -> list[str]:
    """The op builders of all presets: optimizers on the device and on the host, and NVMe offload."""
    host = ["CPUAdamBuilder", "CPUAdagradBuilder", "CPULionBuilder", "PinMemoryBuilder", "AsyncIOBuilder"]
    own = ["ShareMemCommBuilder"] if device == "cpu" else ["FusedLambBuilder", "FusedLionBuilder"]
    return ["FusedAdamBuilder", *own, *host]


def largest_parameter(config: RunConfig, vocab_size: int | None = None) -> int:
    """Elements of the largest parameter of the model: the word embedding, but for tiny vocabularies."""
    model = config.model
    vocab = vocab_size or model.vocab_size or config.tokenizer.vocab_size
    return model.hidden_size * max(vocab, model.intermediate_size, model.max_position_embeddings)


def batch_sizes(config: RunConfig, world: int) -> dict[str, int]:
    total, micro = config.batch.global_size, config.batch.micro_size
    return dict(zip(BATCH_KEYS, (total, micro, total // (micro * world)), strict=True))


def _batch_problems(config: RunConfig, world: int) -> Iterator[Problem]:
    total, micro, derived = config.batch.global_size, config.batch.micro_size, batch_sizes(config, world)
    copies = f"{world} ranks" if config.split == 1 else f"{world} copies of the model ({config.split} ranks each)"
    ours = {BATCH_KEYS[0]: "batch.global_size", BATCH_KEYS[1]: "batch.micro_size"}
    for key in BATCH_KEYS:
        given = config.deepspeed.get(key, derived[key])
        if given not in (derived[key], "auto"):
            text = f"deepspeed.{key}={given!r}: batch.global_size={total} and batch.micro_size={micro} give"
            way = f"Drop deepspeed.{key}" + (f", or set {ours[key]}={given}." if key in ours else ".")
            yield Problem("batch_twice", f"{text} {derived[key]} on {copies}. {way}")
    step = micro * world
    if total % step:
        fit = [d for d in range(1, total // world + 1) if total % (d * world) == 0]
        micros = [d for d in fit if d < micro][-1:] + [d for d in fit if d > micro][:1]
        sizes = [s for s in (total // step * step, (total // step + 1) * step) if s]
        way = f"batch.global_size={' or '.join(map(str, sizes))}"
        way += f", or batch.micro_size={' or '.join(map(str, micros))}" if micros else ""
        text = f"batch.global_size={total} is no multiple of batch.micro_size={micro} x {copies}"
        yield Problem("batch_split", f"{text}. Use {way}.")


def _fill(ds: dict[str, Any], facts: Facts, run_dir: Path | None) -> None:
    """NVMe's folder and buffers, monitors' paths, and what recomputing pipeline stages need."""
    # DeepSpeed's default is 1e8 elements for each of five buffers, all pinned memory; each holds one
    # rank's part of one parameter, which alignment lengthens a little.
    part = -(-(facts.largest or 1) // facts.world)
    swapped = {
        "offload_optimizer": (facts.offload, "buffer_count", facts.swap_buffers),
        "offload_param": (facts.param_offload, "buffer_size", -(-part // MIB) * MIB),
    }
    for name, (device, key, value) in swapped.items():
        if device == "nvme":
            block = ds["zero_optimization"][name]
            block["nvme_path"] = _swap_folder(block.get("nvme_path"), run_dir)
            block.setdefault(key, value)
    for key in ("tensorboard", "csv_monitor"):
        block = ds.get(key) or {}
        if run_dir is not None and block.get("enabled") and not block.get("output_path"):
            block["output_path"] = str(run_dir)
            block.setdefault("job_name", key)
    if "activation_checkpoint_interval" in (ds.get("pipeline") or {}):
        ds["pipeline"].setdefault("use_reentrant", False)


def _swap_folder(disk: str | None, run_dir: Path | None) -> str:
    """A folder of the run's own, for DeepSpeed's file names do not tell runs apart (see toolkit.job.nvme)."""
    if disk is None:
        return str((run_dir or cache_dir("swap")) / "nvme")
    if run_dir is None:
        return str(disk)
    digest = hashlib.sha256(str(run_dir.absolute()).encode()).hexdigest()[:8]  # other output_dirs have this name too
    return str(Path(disk) / f"swap-{run_dir.name}-{digest}")


@cache
def known() -> dict[str, Any]:
    """keys.json."""
    return json.loads(Path(__file__).with_name("keys.json").read_text())  # type: ignore[no-any-return]


def whole_numbers(tree: Any, path: str = "") -> Any:
    """5e7 is a float in YAML; where DeepSpeed wants an int it gets one."""
    if isinstance(tree, dict):
        return {k: whole_numbers(v, f"{path}.{k}" if path else str(k)) for k, v in tree.items()}
    kind = known()["keys"].get(path)
    if path.startswith("scheduler.params.") and path.endswith("num_steps"):
        kind = "int"
    whole = kind in ("int", "int?") or isinstance(kind, list)
    return int(tree) if whole and isinstance(tree, float) and tree.is_integer() else tree


def _shape(ds: Mapping[str, Any], prefix: str) -> Iterator[Problem]:
    """Keys that DeepSpeed does not know, has removed or renamed, and values of another type."""
    for path, value in dotted(ds).items():
        known_path = path in known()["keys"] or path.startswith(("optimizer.params.", "scheduler.params."))
        if value == "auto" and known_path and not path.startswith(AUTO):
            who = "only Hugging Face's Trainer" if path in FILLED else "nothing, Hugging Face's Trainer neither,"
            yield Problem("auto", f"{prefix}{path}='auto': {who} fills this in. Write a value, or drop it.", path)
    yield from _shape_of(ds, "", prefix)


def _shape_of(tree: Mapping[str, Any], path: str, prefix: str) -> Iterator[Problem]:
    keys, removed, replaced = (known()[name] for name in ("keys", "removed", "replaced"))
    for key, value in tree.items():
        full = f"{path}{key}"
        shown = f"{prefix}{full}"
        if not path and str(key).startswith("_"):
            continue  # how JSON is commented; DeepSpeed reads no key that it does not know at the top
        if full in removed:
            yield Problem("removed_key", f"{shown}: {removed[full]} Drop it.", full)
        elif full in replaced:
            new = replaced[full]
            yield Problem("replaced_key", f"{shown}: renamed. Use {prefix}{new}.", new if new in keys else full)
        elif full not in keys:
            valid = [k.removeprefix(path) for k in keys if k.startswith(path) and k not in replaced]
            way = nearest(str(key), [k for k in valid if "." not in k]) or " Drop it."
            yield Problem("unknown_key", f"{shown}: DeepSpeed knows no such key.{way}", full)
        elif value != "auto" and not _fits(keys[full], value):
            yield Problem("type", f"{shown}={value!r}: must be {_named(keys[full])}. Change it, or drop it.", full)
        elif isinstance(value, Mapping) and str(keys[full]).startswith("block"):
            yield from _shape_of(value, f"{full}.", prefix)


def _fits(kind: Any, value: Any) -> bool:
    if isinstance(kind, list):
        lower = value.lower() if isinstance(value, str) else value
        return any(lower == (k.lower() if isinstance(k, str) else k) for k in kind) and value is not True
    if value is None:
        return bool(kind.endswith("?")) or kind == "any"
    name = kind.rstrip("?")
    is_bool = isinstance(value, bool)  # a bool is an int to Python, but not to a person
    return name not in TYPES or (isinstance(value, TYPES[name][0]) and is_bool == (name == "bool"))


def _named(kind: Any) -> str:
    if isinstance(kind, list):
        return "one of " + ", ".join("null" if k is None else str(k) for k in kind)
    return TYPES[kind.rstrip("?")][1] + (" or null" if kind.endswith("?") else "")


def _optimizer_shape(f: Facts, prefix: str) -> Iterator[Problem]:
    accepted, given = known()["optimizers"], str(f["optimizer.type"] or "")
    if not given or given.lower() in MUP:
        return
    if given.lower() in ONE_BIT:
        text = f"{prefix}optimizer.type={given}: removed from DeepSpeed, as all 1-bit optimizers are."
        yield Problem("removed_optimizer", f"{text} Use {ONE_BIT[given.lower()]}.", "optimizer.type")
    elif f.optimizer not in accepted:
        names = sorted({"Lamb", "Lion", "Muon", *(n[6:] for n in accepted if n.startswith("torch."))})
        text = f"{prefix}optimizer.type={given}: DeepSpeed has no such optimizer."
        text += f"{nearest(given, names)} Known: {', '.join(names)}."
        yield Problem("unknown_optimizer", text, "optimizer.type")
    else:
        extra = ADAM_KEYS if f.optimizer in ADAM_FAMILY else {}
        yield from _params(f, prefix, "optimizer", f.optimizer, {**accepted[f.optimizer], **extra})


def _scheduler_shape(f: Facts, prefix: str) -> Iterator[Problem]:
    accepted, name = known()["schedulers"], f["scheduler.type"]
    if not name:
        return
    if name not in accepted:
        text = f"{prefix}scheduler.type={name}: DeepSpeed has no such one."
        yield Problem("unknown_scheduler", f"{text}{nearest(name, accepted)} Known: {', '.join(accepted)}.")
        return
    needed = [key for key, kind in accepted[name].items() if kind.endswith("!")]
    missing = [key for key in needed if key not in (f["scheduler.params"] or {})]
    if missing or f["scheduler.params"] is None:  # DeepSpeed unpacks it: engine.py, _scheduler_from_config
        which = ", ".join(f"{prefix}scheduler.params.{key}" for key in missing)
        way = f"Set {which or prefix + 'scheduler.params={}'}."
        yield Problem("scheduler_params", f"{prefix}scheduler.type={name} lacks what it needs. {way}")
    yield from _params(f, prefix, "scheduler", name, accepted[name])


def _params(f: Facts, prefix: str, block: str, name: str, accepted: dict[str, str]) -> Iterator[Problem]:
    given, typed = f[f"{block}.params"] or {}, f.config.typed if f.config else frozenset()
    left = [key for key in given if key not in accepted and f"{prefix}{block}.params.{key}" not in typed]
    if left and f"{prefix}{block}.type" in typed:
        given = {key: value for key, value in given.items() if key not in left}
        text = (
            f"{prefix}{block}.type={name} alone leaves params of a preset that it does not take: {', '.join(left)}. Use"
        )
        dropped = " ".join(f"~{prefix}{block}.params.{key}" for key in left)
        yield Problem("unknown_param", f"{text} an option of {block}=, or drop them: {dropped}.")
    for key, value in given.items():
        shown = f"{prefix}{block}.params.{key}"
        if value == "auto" or (block, key) == ("optimizer", "max_grad_norm"):  # of which a rule says more
            continue
        if key not in accepted:
            way = nearest(key, accepted) or f" Known: {', '.join(sorted(accepted))}."
            yield Problem("unknown_param", f"{shown}: {name} takes no such parameter.{way}")
        elif not _fits(kind := accepted[key].rstrip("!"), value):
            yield Problem("param_type", f"{shown}={value!r}: must be {_named(kind)}. Change it.")
