"""Imports point one way, and what plans or checks starts without torch."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[1] / "toolkit"
# A module may import those before it; ranks and schedule are leaves that several need.
ORDER = [
    "errors", "hostfile", "config", "compose", "ds_rules", "ds_config", "plan", "check", "ranks", "fingerprint",
    "watchdog", "workers", "pipe_events", "schedule", "pipe_schedule", "nvme", "ops", "run", "run_plan", "metrics",
    "data", "models", "tasks", "engine", "traffic", "meter", "ds_state", "checkpoint", "export", "train", "several",
    "report", "studies", "doctor", "sweep", "launch", "calibrate", "launchers", "cli",
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
        "config",
        "compose",
        "ds_config",
        "check",
        "plan.plan",
        "plan.machines",
        "launch",
        "calibrate",
        "report.timeline",
        "studies.reproduce",
        "launchers.start",
        "cli",
    ],
)
def test_planning_and_checking_start_without_torch(part: str) -> None:
    code = f"import sys, toolkit.{part}; sys.exit(bool({{'torch', 'deepspeed', 'transformers'}} & set(sys.modules)))"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_only_these_import_deepspeed() -> None:
    found = {
        str(path.relative_to(PACKAGE))
        for path in PACKAGE.rglob("*.py")
        for node in ast.walk(ast.parse(path.read_text()))
        if (isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == "deepspeed")
        or (isinstance(node, ast.Import) and any(a.name.split(".")[0] == "deepspeed" for a in node.names))
    }
    assert found == {
        "ds_state.py",
        "engine/pipe.py",
        "engine/plain.py",
        "export.py",
        "models/build.py",
        "models/pipeline.py",
        "ops.py",
        "pipe_schedule.py",
        "ranks.py",
        "studies/reductions.py",
        "traffic.py",
    }
