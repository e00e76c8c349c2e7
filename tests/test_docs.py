"""The site of docs/ builds strictly, and what the pages name is there: links, files, options, keys."""

import re
import shlex
from functools import cache
from pathlib import Path
from typing import Any, TypeGuard

import pytest
from launching import ROOT
from pages import COMMANDS, TEXTS
from pydantic import BaseModel

from toolkit import errors
from toolkit.cli.main import main
from toolkit.cluster.launchers.job import load_recipe
from toolkit.config.schema import RunConfig

SPANS = sorted({(page, span) for page, text in TEXTS.items() for span in re.findall(r"`([^`\n]+)`", text)})
OWN = re.compile(r"\b(mine|ours|my_\w+|reviews|stage2_small)\b")  # of examples that a reader would write
FOLDERS = ("toolkit", "conf", "recipes", "tests", "docker", "docs")
GROUPS = {path.name for path in (ROOT / "conf").iterdir() if path.is_dir()}


@cache
def models() -> list[type[BaseModel]]:
    """The configuration, and those of the recipes that add a node."""
    recipes = [load_recipe(path).config for path in sorted((ROOT / "recipes").glob("*.py"))]
    return [RunConfig, *(model for model in recipes if model is not RunConfig)]


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The pages as HTML."""
    for name in ("mkdocs", "material", "mkdocstrings_handlers.python"):
        pytest.importorskip(name, reason=f"{name} is not installed: pip install -e '.[docs]'")
    from mkdocs.commands.build import build
    from mkdocs.config import load_config

    folder = tmp_path_factory.mktemp("site")
    build(load_config(str(ROOT / "mkdocs.yml"), strict=True, site_dir=str(folder)))
    return folder


def test_the_site_has_every_page(site: Path) -> None:
    pages = {str(Path(page).with_suffix("").relative_to("docs")) for page in TEXTS if page.startswith("docs/")}
    assert all((site / page / "index.html").exists() for page in pages | {"parity"}) and (site / "index.html").exists()


def test_every_key_stands_in_the_reference_with_its_comment(site: Path) -> None:
    text = (site / "configuration" / "index.html").read_text()
    missing = [key for model in models() for key in keys(model) if f"<code>{key}</code>" not in text]
    assert not missing
    assert "evaluations without a better task.best before training ends early" in text


def keys(model: type[BaseModel], node: str = "") -> list[str]:
    """All that can be typed, ``data.columns.text``."""
    found = []
    for name, field in model.model_fields.items():
        inner = field.annotation
        found += keys(inner, f"{node}{name}.") if is_node(inner) else [f"{node}{name}"]
    return found


def test_the_readme_is_one_page() -> None:
    assert len(TEXTS["README.md"].splitlines()) <= 150


def test_every_exit_code_is_told() -> None:
    rows = re.findall(r"^\| (\d+) \|", TEXTS["docs/errors.md"], re.MULTILINE)
    kinds = [kind.code for kind in vars(errors).values() if isinstance(kind, type) and hasattr(kind, "code")]
    assert sorted(map(int, rows)) == sorted({0, errors.BUG, errors.LOST, *kinds})


@pytest.mark.parametrize("asked", ["machine.nodes=4", "--search"])
def test_a_printed_plan_is_what_the_command_prints(asked: str, capsys: pytest.CaptureFixture[str]) -> None:
    command = next(c for c in COMMANDS if c.startswith("toolkit plan") and c.endswith(asked))
    main(shlex.split(command)[1:])
    printed = {" ".join(line.split()) for line in capsys.readouterr().out.splitlines()}
    page = TEXTS["docs/planning.md"].replace("\\\n", "")
    shown = next(s for s in re.split(r"```bash\n", page) if asked in s.partition("```")[0])
    first = next(b for b in re.findall(r"(?:^    .*\n(?:\n(?=    ))?)+", shown, re.MULTILINE))
    assert len(first.splitlines()) > 5 and not [
        x for x in first.splitlines() if " ".join(x.split()) not in printed | {"…"}
    ]


@pytest.mark.parametrize("page", TEXTS)
def test_every_link_to_a_file_leads_to_one(page: str) -> None:
    links = re.findall(r"\]\(([^)#]+)[^)]*\)", TEXTS[page])
    here = (ROOT / page).parent
    assert not [link for link in links if "://" not in link and not (here / link).exists()]


def test_every_file_that_is_named_exists() -> None:
    named = [
        (page, s) for page, s in SPANS if re.fullmatch(rf"({'|'.join(FOLDERS)})/[\w./*-]+", s) and not OWN.search(s)
    ]
    assert named and not [(page, path) for page, path in named if not list(ROOT.glob(path))]


def test_every_option_that_is_named_exists() -> None:
    named = {
        (group, option)
        for text in TEXTS.values()
        for group, option in re.findall(r"(?<![\w.])(\w+)=([\w/]*\w)(?!/)\b", text)
    }
    named = {(group, option) for group, option in named if group in GROUPS and not OWN.search(option)}
    absent = [f"{g}={o}" for g, o in named if not (ROOT / "conf" / g / f"{o}.yaml").exists()]
    assert len(named) > 40 and not absent


def test_every_key_that_is_named_exists() -> None:
    nodes = {name for model in models() for name, field in model.model_fields.items() if is_node(field.annotation)}
    named = {
        (page, key)
        for page, text in TEXTS.items()
        for key in re.findall(r"(?<![\w./])([a-z_]+(?:\.[a-z_]+)+)(?==|`)", text)
    }
    named = {
        (page, key)
        for page, key in named
        if key.split(".")[0] in nodes and not key.endswith((".py", ".json", ".yaml", ".csv", ".svg", ".png"))
    }
    assert len(named) > 40 and not [(page, key) for page, key in named if not any(is_key(m, key) for m in models())]


def is_node(annotation: Any) -> TypeGuard[type[BaseModel]]:
    return isinstance(annotation, type) and issubclass(annotation, BaseModel)


def is_key(model: Any, key: str) -> bool:
    """Also what is below a mapping, as in cluster.slurm.partition."""
    first, _, rest = key.partition(".")
    if first not in model.model_fields:
        return False
    inner = model.model_fields[first].annotation
    return not rest or (is_key(inner, rest) if is_node(inner) else "dict[" in str(inner))
