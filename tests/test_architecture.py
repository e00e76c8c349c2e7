"""Imports point one way, and what plans or checks starts without torch."""

import ast
import subprocess
import sys
from collections.abc import Collection
from graphlib import TopologicalSorter
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[1] / "toolkit"
# A folder may import those before it; inside a folder, and between any modules, there are no circles.
ORDER = [
    "errors", "config", "deepspeed", "plan", "job", "run", "data", "models", "tasks", "engine", "checkpoint", "train",
    "cluster", "report", "cli",
]  # fmt: skip


def imports(path: Path) -> set[str]:
    """The parts of the toolkit that a file imports, at any depth of its code."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and node.module and node.module.split(".")[0] == "toolkit":
            parts = node.module.split(".")[1:]
            found |= {parts[0]} if parts else {a.name for a in node.names}
        elif isinstance(node, ast.Import):
            found |= {a.name.split(".")[1] for a in node.names if a.name.startswith("toolkit.")}
    return found & set(ORDER)


def test_every_module_has_its_place() -> None:
    parts = {p.stem for p in PACKAGE.glob("*.py")} | {p.name for p in PACKAGE.iterdir() if (p / "__init__.py").exists()}
    assert parts - {"__init__"} == set(ORDER)


def test_imports_point_one_way() -> None:
    wrong = [
        f"{path.relative_to(PACKAGE)} imports {name}"
        for path in PACKAGE.rglob("*.py")
        for name in imports(path)
        if path.stem != "__init__" or path.parent != PACKAGE
        if ORDER.index(name) > ORDER.index(path.relative_to(PACKAGE).parts[0].removesuffix(".py"))
    ]
    assert not wrong


@pytest.mark.parametrize(
    "part",
    [
        "config.schema",
        "config.compose",
        "deepspeed.ds_config",
        "deepspeed.check",
        "plan.plan",
        "plan.machines",
        "run.recipe",
        "cluster.calibrate",
        "report.timeline",
        "cluster.launchers.job",
        "cli.main",
    ],
)
def test_planning_and_checking_start_without_torch(part: str) -> None:
    code = f"import sys, toolkit.{part}; sys.exit(bool({{'torch', 'deepspeed', 'transformers'}} & set(sys.modules)))"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_no_circles() -> None:
    names = {
        ".".join(("toolkit", *path.relative_to(PACKAGE).with_suffix("").parts)): path for path in PACKAGE.rglob("*.py")
    }
    graph = {name: _modules(path, names.keys()) for name, path in names.items()}
    TopologicalSorter(graph).prepare()  # raises CycleError, which names the circle


def _modules(path: Path, known: Collection[str]) -> set[str]:
    """The modules of the toolkit that a file imports, at any depth of its code."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and node.module and node.module.split(".")[0] == "toolkit":
            found |= {n if (n := f"{node.module}.{a.name}") in known else node.module for a in node.names}
    return found & set(known)


def test_nothing_that_trains_imports_the_studies() -> None:
    assert not [
        p for p in PACKAGE.rglob("*.py") if "from studies" in p.read_text() or "import studies" in p.read_text()
    ]


def test_only_these_import_deepspeed() -> None:
    found = {
        str(path.relative_to(PACKAGE))
        for path in PACKAGE.rglob("*.py")
        for node in ast.walk(ast.parse(path.read_text()))
        if (isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == "deepspeed")
        or (isinstance(node, ast.Import) and any(a.name.split(".")[0] == "deepspeed" for a in node.names))
    }
    assert found == {
        "checkpoint/ds_state.py",
        "checkpoint/export.py",
        "engine/collectives.py",
        "engine/pipe.py",
        "engine/pipe_schedule.py",
        "engine/plain.py",
        "engine/start.py",
        "job/ops.py",
        "job/ranks.py",
        "models/build.py",
        "models/pipeline.py",
    }
