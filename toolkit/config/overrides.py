"""The one grammar of what is typed: flags and overrides, as Hydra's own parsers read them.

split(["seed=1", "--config-name", "config", "-m"])   # .overrides ["seed=1"], .flags the others, .multirun True
values(["zero='stage3'", "+seed=1", "~loss"])        # {"zero": "stage3", "seed": 1, "loss": None}
keys(["train.steps=5", "zero=stage3"])               # {"train.steps"}
permissive(["train.steps=5", "zero=stage3"])         # ["++train.steps=5", "zero=stage3"]
"""

import re
import shlex
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from toolkit.config.schema import conf_dir, dotted
from toolkit.errors import ConfigError, nearest

# What a name of a hub or of a file is meant for where it stands for an option
OWN = {
    "model": " Pretrained weights are model.weights={0}; without them an option is a size of random ones.",
    "data": " Text of your own is data=text data.path={0}, rows with labels data.train={0}.",
}


def told(error: Exception) -> str:
    """What Hydra says, in a line."""
    return " ".join(str(error).partition("Config search path")[0].split())


class _Word(str):
    """One argument, and no other of the same letters: argparse hands back the object that it was given."""


@dataclass(frozen=True)
class Typed:
    """A command line; ``config`` is the flag by which it starts from another config than the primary one; ``said`` what
    Hydra's parser makes of all flags."""

    overrides: list[str]
    flags: list[str]
    multirun: bool
    config: str | None
    said: Any


def split(arguments: Iterable[str]) -> Typed:
    """What of a recipe's arguments is an override. What Hydra has no flag for ends the process, in argparse's words."""
    from hydra._internal.utils import get_args_parser

    words = [_Word(a) for a in arguments]
    found = get_args_parser().parse_intermixed_args(words)
    own = {id(word) for word in found.overrides}
    several = found.multirun or "hydra.mode=MULTIRUN" in found.overrides
    config = next((f"--config-{n}" for n in ("path", "name", "dir") if getattr(found, f"config_{n}")), None)
    flags = [str(one) for one in words if id(one) not in own]
    return Typed([*found.overrides], flags, several, config, found)


def parse(override: str) -> Any:
    """Hydra's Override: ``key_or_group``, ``package``, ``value()``. Raises ConfigError."""
    from hydra.core.override_parser.overrides_parser import OverridesParser
    from hydra.errors import HydraException

    try:
        found = OverridesParser.create().parse_override(override)
        if not found.key_or_group:
            raise HydraException("missing key before '='")
        return found
    except HydraException as error:
        why = str(error).splitlines()[0].partition(" expecting")[0]
        raise ConfigError(f"{override}: no override of Hydra's: {why}. {_quoted(override)}") from error


def _quoted(override: str) -> str:
    """How to type what Hydra's grammar wants in quotes, as a word of a command line."""
    key, equals, value = override.partition("=")
    if not equals or not value or not re.fullmatch(r"\+{0,2}\w[\w.@/-]*", key, re.ASCII):
        return f"Write key=value, without blanks{f': {key}=…' if re.fullmatch('[a-z_.]+', key) else ''}."
    if items := re.fullmatch(r"\[([^][{}()'\"]*)]", value):
        typed = f"{key}=[{','.join(quoted(text.strip()) for text in items[1].split(','))}]"
    elif re.fullmatch(r"\[.*]|{.*}", value):
        return "Quote every text in it, for Hydra, and all of it for the shell."
    else:
        typed = setting(key, value)
    return f"Quote it, for Hydra and for the shell: {word(typed)}"


def word(text: str) -> str:
    """``text`` as a shell reads one word."""
    return shlex.quote(text) if re.search(r"[\"$`\\!]", text) or shlex.quote(text) == text else f'"{text}"'


def values(overrides: Iterable[str]) -> dict[str, Any]:
    """What each key, or option of a group, was set to last; None where that is null or it was deleted."""
    return {one.key_or_group: one.value() for one in map(parse, overrides)}


def keys(overrides: Iterable[str]) -> frozenset[str]:
    """The keys that are set one by one, ``a={b: 1}`` as ``a.b``; not the options of groups."""
    found = [one for one in map(parse, overrides) if not one.is_hydra_override() and not one.is_delete()]
    return frozenset(
        key for one in found if not _is_group(one.key_or_group) for key in dotted({one.key_or_group: one.value()})
    )


def _is_group(key: str) -> bool:
    return "." not in key and (conf_dir() / key).is_dir()


def setting(key: str, value: str) -> str:
    """The override that sets ``key`` to just this text."""
    return f"{key}={quoted(value)}"


def quoted(text: str) -> str:
    """``text`` as a value of an override that is nothing but this text."""
    from hydra.core.override_parser.types import Quote, QuotedString

    return str(QuotedString(text, Quote.single).with_quotes()).replace("${", "\\${")


def permissive(overrides: Iterable[str], *, sweep: bool = True) -> list[str]:
    """Let every key through Hydra (``a.b=1`` as ``++a.b=1``), so that one place judges keys: ours.

    Hydra refuses keys that no option mentions yet, which would bar valid DeepSpeed keys, and names no
    nearest key for a typo. The options of a group are checked here for the same reason, and that there are several
    values in a ``sweep`` only: a comma in a text is such a value's, too. Raises ConfigError.
    """
    return [_permissive(o, sweep) for o in overrides]


def _permissive(override: str, sweep: bool) -> str:
    from hydra.core.override_parser.types import ChoiceSweep, OverrideType

    found = parse(override)
    key, value = found.key_or_group, found.value()
    if found.is_hydra_override():
        return override
    if found.is_sweep_override() and not sweep:
        ways, words = "", override.partition("=")[2]
        if getattr(value, "simple_form", False) and not _is_group(key):
            ways = f"As a list: {word(f'{key}=[{words}]')}, as a text: {word(setting(key, words))}. "
        raise ConfigError(f"{override}: several values. {ways}A run for each of them takes --multirun of a recipe.")
    if found.type != OverrideType.CHANGE:
        return override
    if not _is_group(key):
        return override if found.package else f"++{override}"
    folder = conf_dir() / key
    known = sorted(f.relative_to(folder).with_suffix("").as_posix() for f in folder.rglob("*.yaml"))
    if value is None:
        return f"{found.get_key_element()}=[]"  # no option; Hydra's composition wants a list, though it parses null
    options = value.list if isinstance(value, ChoiceSweep) else value
    for option in options if isinstance(options, list) else [options]:
        text = getattr(option, "text", option)  # a quoted one of a sweep
        if isinstance(text, str | int | float | None) and str(text) not in known:
            near, own = nearest(str(text), known), key in OWN and re.search(r"[-/.]", str(text))
            way = OWN[key].format(text) if own and (key == "model" or not near) else near
            raise ConfigError(f"{override}: no such option.{way} {key} has: {', '.join(known)}.")
    return override
