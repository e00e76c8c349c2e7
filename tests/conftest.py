"""Marks what starts processes: `pytest -m "not launch"` runs all other tests, which is what `make check` does.

With pytest-xdist's `-n 2 --dist loadgroup` a file's tests stay together, and so do files that share something dear.
"""

import gc
import inspect
import os
import subprocess
from collections.abc import Iterator
from pathlib import Path
from types import CodeType, FunctionType, ModuleType
from typing import Any

import pytest

if "PYTEST_XDIST_WORKER" in os.environ:
    os.environ["OMP_NUM_THREADS"] = "1"  # before torch: threads of two processes that wait for each other spin

HERE = str(Path(__file__).parent)
STARTS = (subprocess.Popen, subprocess.run)
TOGETHER = {
    "checkpoint_runs": ("test_checkpoint", "test_checkpoint_stops", "test_export"),  # one training in every layout
    "cluster": ("test_doctor_hosts", "test_hosts", "test_launchers", "test_sweep"),  # network names, Slurm's daemons
}
GROUPS = {file: group for group, files in TOGETHER.items() for file in files}


def pytest_collection_finish() -> None:
    """What is imported stays; to look it through again and again for garbage is a fifth of a composition."""
    gc.collect()
    gc.freeze()


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Groups for xdist; ``launch`` for each test that, itself or by a fixture or a helper, can start a process."""
    known: dict[Any, bool] = {}
    for item in items:
        item.add_marker(pytest.mark.xdist_group(GROUPS.get(item.path.stem, item.path.stem)))
        fixtures = getattr(item, "_fixtureinfo").name2fixturedefs.values()  # noqa: B009  # pytest has no public way
        functions = [getattr(item, "function", None), *(d.func for found in fixtures for d in found)]
        if any(launches(f, known) for f in functions):
            item.add_marker(pytest.mark.launch)


def launches(thing: Any, known: dict[Any, bool]) -> bool:
    """Whether a function or class of these tests leads to subprocess by the names that its code mentions."""
    thing = inspect.unwrap(thing) if callable(thing) else thing
    if any(thing is start for start in STARTS):
        return True
    if not isinstance(thing, FunctionType | type) or not _file(thing).startswith(HERE):
        return False
    if thing not in known:
        known[thing] = False  # while we look: functions may call each other
        parts = vars(thing).values() if isinstance(thing, type) else [thing]
        functions = [getattr(p, "__func__", p) for p in parts]
        known[thing] = any(launches(used, known) for f in functions if isinstance(f, FunctionType) for used in _uses(f))
    return known[thing]


def _file(thing: Any) -> str:
    try:
        return inspect.getfile(thing)
    except (TypeError, OSError):  # of C, or made by a library
        return ""


def _uses(function: FunctionType) -> Iterator[Any]:
    """The globals that its code mentions, and of modules the members."""
    for code in _codes(function.__code__):
        found = [function.__globals__[name] for name in code.co_names if name in function.__globals__]
        yield from found
        for module in (used for used in found if isinstance(used, ModuleType)):
            yield from (vars(module)[name] for name in code.co_names if name in vars(module))


def _codes(code: CodeType) -> Iterator[CodeType]:
    yield code
    for inner in code.co_consts:
        if isinstance(inner, CodeType):
            yield from _codes(inner)
