"""Every command of README and docs runs, from a folder of its own, with a model small enough to wait for."""

import json
import re
import shlex
from collections.abc import Iterator
from fnmatch import fnmatch
from pathlib import Path

import pytest
from launching import ROOT, TINY, data_cache, read_by, typed
from pages import COMMANDS, TEXTS

from toolkit.cluster.launchers.job import load_recipe
from toolkit.config.compose import compose, permissive
from toolkit.config.kinds import KINDS

DOCUMENT = "The sea was calm that day. Nobody spoke for a while. Then the captain laughed, and all of us with him."
# What else makes a recipe small, by its name
OWN = {
    "reductions": ["reductions.rows=20000", "reductions.repeats=1"],
    "mcmc": ["mcmc.steps=200", "mcmc.warmup=100", "mcmc.rounds=1"],
    "spatial_conv": ["spatial_conv.sizes=[32]", "spatial_conv.channels=4", "spatial_conv.size=32"],
    "scaling": ["scaling.ranks=[2]", "scaling.mode=strong", "train.steps=4"],
    "batch_size": ["batch_size.max_steps=4", "batch_size.sizes=[8,16]", "batch_size.extend=0"],
}
SMALL = [*(o for o in TINY if not o.startswith("experiment")), "train.steps=2", f"data.cache_dir={data_cache()}"]
# Composed only: what differs from a command that runs in scale alone, or needs hosts
COMPOSED = ("reductions.rows=4_000_000", "mcmc.chains=64", "spatial_conv.rows=2", "--hostfile hosts")
# `toolkit launch` and the hosts that it is given are test_launchers.py's
HERE = [c for c in COMMANDS if not c.startswith(("make", "toolkit launch", "printf"))]


def command_id(command: str) -> str:
    return command.replace("recipes/", "")[:50]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkout as a reader has it, with documents, labelled rows and a finished run called first."""
    path = tmp_path_factory.mktemp("readme")
    (path / "recipes").symlink_to(ROOT / "recipes")
    (path / "texts").mkdir()
    for i in range(8):
        (path / "texts" / f"{i}.txt").write_text("\n\n".join(f"{DOCUMENT} It was day {i} of {j}." for j in range(40)))
    houses = [f"{i % 7},Street {i},{i % 5},{i % 7 + i % 11}" for i in range(60)]
    (path / "houses.csv").write_text("\n".join(["rooms,street,age,price", *houses]) + "\n")
    rows = [f"{DOCUMENT[:40]},{i % 3}" for i in range(60)]
    (path / "reviews.csv").write_text("\n".join(["review,stars", *rows]) + "\n")
    (path / "glue" / "RTE").mkdir(parents=True)
    for split in ("train", "dev"):
        pairs = [f"{i}\t{DOCUMENT[:30]}\t{DOCUMENT[30:60]}\t{'not_' * (i % 2)}entailment" for i in range(40)]
        text = "\n".join(["index\tsentence1\tsentence2\tlabel", *pairs])
        (path / "glue" / "RTE" / f"{split}.tsv").write_text(text + "\n")
    for file in ("corpus/train", "corpus/dev", "multi30k/train", "multi30k/val", "multi30k/test_2016_flickr"):
        for language in ("de", "en"):
            lines = [f"{DOCUMENT[i % 30 : i % 30 + 40]} {i}" for i in range(60)]
            (path / file).parent.mkdir(exist_ok=True)
            (path / f"{file}.{language}").write_text("\n".join(lines) + "\n")
    run(path, "python recipes/pretrain.py experiment=smoke name=first")
    run(path, "toolkit export runs/first")
    return path


def run(folder: Path, command: str) -> None:
    """``command`` as a reader types it, but small."""
    if any(part in command for part in COMPOSED):
        check(command)
        return
    command = command.replace("google-bert/bert-base-uncased", "runs/first")  # what tests can reach
    small = SMALL if "recipes/" in command or command.startswith("toolkit prepare") else []
    words = [word for word in shlex.split(command) if re.match(r"[\w.]+=", word)]
    if script := next((word for word in command.split() if word.startswith("recipes/")), None):
        words = load_recipe(ROOT / script).completed(words)  # with the kind of task that it is for
    small = read_by(words, small)
    small = [] if "--config-path" in command else small
    small = [*small, *(["data.rows=2000"] if "data=synthetic" in command else [])]
    small = [*small, *(o for name, own in OWN.items() if f"/{name}.py" in command for o in own)]
    line = " ".join([command, *(f"'{o}'" for o in small)])
    done = typed(line, folder)
    assert done.returncode == 0, f"{line}\n{done.stdout}\n{done.stderr}"


def check(command: str) -> None:
    """Compose what ``command`` says, without a run."""
    words = shlex.split(command)
    overrides = [word for word in words if re.match(r"[\w.]+=", word)]
    if words[0] == "toolkit":
        compose(overrides)
    else:
        recipe = load_recipe(ROOT / next(word for word in words if word.startswith("recipes/")))
        compose(permissive(recipe.completed(overrides)), recipe.config)


def test_the_pages_have_their_commands() -> None:
    assert {command.split()[0] for command in HERE} == {"deepspeed", "torchrun", "python", "toolkit"}
    makefile = (ROOT / "Makefile").read_text()
    for command in (c for c in COMMANDS if c.startswith("make")):
        assert re.search(rf"^{command.split()[1]}:", makefile, re.MULTILINE), command
    for part in COMPOSED:
        assert any(part in command for command in HERE), f"{part}: no command has it any more"


@pytest.mark.parametrize("command", HERE, ids=command_id)
def test_a_command_of_the_pages_runs(command: str, folder: Path) -> None:
    run(folder, command)


def described() -> Iterator[str]:
    """The keys that the page of metrics has, as patterns: ``eval_bleu_4_beams`` is for any number."""
    for cell in re.findall(r"^\|(?:[^|\n]*\|)? ?((?:`\w+`(?:, )?)+) \|", TEXTS["docs/metrics.md"], re.MULTILINE):
        yield from (re.sub(r"_\d+", "_*", key) for key in re.findall(r"`(\w+)`", cell))


def test_every_key_of_the_records_is_described(folder: Path) -> None:
    records = [json.loads(line) for path in folder.rglob("metrics.jsonl") for line in path.read_text().splitlines()]
    found = {key for record in records for key in record} | {
        f"eval_{n}" for kind in KINDS.values() for n in kind.metrics
    }
    assert {"loss", "mlm_loss", "step_seconds", "eval_loss", "checkpoint"} <= found
    known = list(described())
    assert not [key for key in sorted(found) if not any(fnmatch(key, pattern) for pattern in known)]


def options(group: Path) -> set[str]:
    """The options in a group's folder; ``files/*`` for those in a folder within it."""
    return {f"{f.name}/*" if f.is_dir() else f.stem for f in group.iterdir()}


def test_the_options_of_every_group_are_listed() -> None:
    section = TEXTS["README.md"].split("## Groups")[1].split("\n## ")[0]
    rows = dict(re.findall(r"^\| `(\w+)` \| (.*?) \|", section, re.MULTILINE))
    folders = [p for p in (ROOT / "conf").iterdir() if p.is_dir() and p.name != "reproduce"]  # published numbers
    groups = {p.name: options(p) for p in folders}
    listed = {group: set(re.findall(r"`([\w/*]+)`", options)) for group, options in rows.items()}
    listed["zero"] |= {"stage1", "stage2"}  # the table says stage0 … stage3
    assert listed == groups
