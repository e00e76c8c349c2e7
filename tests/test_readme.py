"""Every command of the two READMEs runs, from a folder of its own, with a model small enough to wait for."""

import re
import subprocess
from pathlib import Path

import pytest
from launching import ROOT, TINY, data_cache, typed

DOCUMENT = "The sea was calm that day. Nobody spoke for a while. Then the captain laughed, and all of us with him."
PAGES = [ROOT / "README.md", ROOT / "recipes" / "README.md"]
BLOCKS = [block for page in PAGES for block in re.findall(r"```bash\n(.*?)```", page.read_text(), re.DOTALL)]
LINES = [line for block in BLOCKS for line in block.replace("\\\n", "").splitlines()]
COMMANDS = [" ".join(line.split("  #")[0].split()) for line in LINES]
# What else makes a recipe small, by its name
OWN = {
    "reductions": ["reductions.rows=20000", "reductions.repeats=1"],
    "mcmc": ["mcmc.steps=200", "mcmc.warmup=100", "mcmc.rounds=1"],
    "spatial_conv": ["spatial_conv.sizes=[32]", "spatial_conv.channels=4", "spatial_conv.size=32"],
    "scaling": ["scaling.ranks=[1,2]", "scaling.mode=strong", "train.steps=4"],
    "batch_size": ["batch_size.max_steps=4", "batch_size.sizes=[8,16]", "batch_size.extend=0"],
}
SMALL = [*(o for o in TINY if not o.startswith("experiment")), "train.steps=2", f"data.cache_dir={data_cache()}"]


def command_id(command: str) -> str:
    return command.replace("recipes/", "")[:50]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkout as a reader has it, with documents, labelled rows and a finished run called first."""
    path = tmp_path_factory.mktemp("readme")
    (path / "recipes").symlink_to(ROOT / "recipes")
    (path / "docs").mkdir()
    for i in range(8):
        (path / "docs" / f"{i}.txt").write_text("\n\n".join(f"{DOCUMENT} It was day {i} of {j}." for j in range(40)))
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


def run(folder: Path, command: str) -> subprocess.CompletedProcess[str]:
    small = [] if "--config-path" in command or "export" in command else SMALL
    if any(
        name in command
        for name in ("build-ops", "doctor", "timeline", "curves", "machines", "toolkit plan", "toolkit check")
    ):
        small = []
    small = [*small, *(["data.rows=2000"] if "data=synthetic" in command else [])]
    small = [*small, *(o for name, own in OWN.items() if f"/{name}.py" in command for o in own)]
    line = " ".join([command, *(f"'{o}'" for o in small)])
    done = typed(line, folder)
    assert done.returncode == 0, f"{line}\n{done.stdout}\n{done.stderr}"
    return done


def test_the_readme_has_its_commands() -> None:
    starts = {command.split()[0] for command in COMMANDS}
    assert starts == {"make", "deepspeed", "torchrun", "python", "toolkit"}


@pytest.mark.parametrize("command", [c for c in COMMANDS if not c.startswith("make")], ids=command_id)
def test_a_command_of_the_readme_runs(command: str, folder: Path) -> None:
    run(folder, command)


def options(group: Path) -> set[str]:
    """The options in a group's folder; ``files/*`` for those in a folder within it."""
    return {f"{f.name}/*" if f.is_dir() else f.stem for f in group.iterdir()}


def test_the_options_of_every_group_are_listed() -> None:
    section = (ROOT / "README.md").read_text().split("## Configuration")[1].split("\n## ")[0]
    rows = dict(re.findall(r"^\| `(\w+)` \| (.*?) \|", section, re.MULTILINE))
    folders = [p for p in (ROOT / "conf").iterdir() if p.is_dir() and p.name != "reproduce"]  # published numbers
    groups = {p.name: options(p) for p in folders}
    listed = {group: set(re.findall(r"`([\w/*]+)`", options)) for group, options in rows.items()}
    listed["zero"] |= {"stage1", "stage2"}  # the table says stage0 … stage3
    assert listed == groups
