"""Breaks chosen lines one at a time, in a copy of the tree, and shows that a test goes red for each.

    make mutants                                # all of mutants_table.py, as a table; 1 if a test stays green
    python tests/mutants.py checkpoint order    # those whose area, file or test has one of these words

Each test runs in a fork of this process, which has imported everything but the toolkit. What a test printed is in
build/mutants/.
"""

import contextlib
import gc
import importlib
import os
import shutil
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

import psutil
import rank_server
from mutants_table import MUTANTS, Mutant

ROOT = Path(__file__).parents[1]
COPIED = ("toolkit", "conf", "recipes", "tests", "pyproject.toml", "constraints.txt")
TOLD = ROOT / "build" / "mutants"
PATIENCE = 240  # seconds for a test
GREEN, RED = 0, 1  # pytest's exit codes; others are no verdict: nothing was collected, an import failed, …


def main(words: Sequence[str]) -> int:
    chosen = [m for m in MUTANTS if not words or any(w in f"{m.area} {m.file} {m.test}" for w in words)]
    shutil.rmtree(TOLD, ignore_errors=True)
    TOLD.mkdir(parents=True)
    warm_up()
    with tempfile.TemporaryDirectory(prefix="mutants-") as folder:
        tree = Path(folder) / "tree"
        copy(tree)
        if wrong := [f"{m.area}: {why}" for m in chosen if (why := cannot(m, tree))]:
            print("\n".join(wrong))
            return 1
        start = time.monotonic()
        if run(tree, [*dict.fromkeys(m.test for m in chosen)], "unbroken", PATIENCE + 20 * len(chosen)) != GREEN:
            print((TOLD / "unbroken.txt").read_text(), "These must be green before anything is broken.", sep="\n")
            return 1
        print(f"All tests are green unbroken ({time.monotonic() - start:.0f} s).\n", flush=True)
        print("| area | file | instead of | stands | test | goes | s |\n|---|---|---|---|---|---|---|")
        verdicts = [told(number, mutant, tree) for number, mutant in enumerate(chosen)]
    print(f"\n{sum(verdicts)} of {len(chosen)} are caught, in {time.monotonic() - start:.0f} s.")
    return 0 if all(verdicts) else 1


def warm_up() -> None:
    os.environ |= {**rank_server.ENVIRONMENT, "PYTHONDONTWRITEBYTECODE": "1"}
    sys.dont_write_bytecode = True  # Python tells sources apart by their size and second: two mutants may share both
    for name in f"pytest torch transformers hydra pydantic rich scipy.stats {rank_server.IMPORTS}".split():
        importlib.import_module(name)
    gc.collect()
    gc.freeze()


def copy(tree: Path) -> None:
    leave_out = shutil.ignore_patterns("__pycache__", "*.egg-info")
    for name in COPIED:
        if (source := ROOT / name).is_dir():
            shutil.copytree(source, tree / name, ignore=leave_out)
        else:
            shutil.copy(source, tree / name)


def cannot(mutant: Mutant, tree: Path) -> str | None:
    """Why a line cannot be broken: its text has moved on, or what would stand there is no Python."""
    text = (tree / mutant.file).read_text()
    if (count := text.count(mutant.text)) != 1:
        return f"{mutant.file} has {count} times {mutant.text!r}, not once. Give mutants_table.py the text of today."
    try:
        compile(text.replace(mutant.text, mutant.broken), mutant.file, "exec")
    except SyntaxError as error:
        return f"{mutant.file}: {mutant.broken!r} is no Python: {error}"
    return None


def told(number: int, mutant: Mutant, tree: Path) -> bool:
    """One row of the table; whether the test went red."""
    file, start = tree / mutant.file, time.monotonic()
    whole = file.read_text()
    file.write_text(whole.replace(mutant.text, mutant.broken))
    code = run(tree, [mutant.test], f"{number:02}", PATIENCE)
    file.write_text(whole)
    verdict = {RED: "red", GREEN: "**stays green**", None: "**hangs**"}.get(code, f"**no verdict: exit code {code}**")
    before, after = (" ".join(text.split()).replace("|", "\\|") for text in (mutant.text, mutant.broken))
    place = mutant.file.removeprefix("toolkit/")
    test = mutant.test.removeprefix("tests/")
    cells = [mutant.area, place, f"`{before}`", f"`{after}`", test, verdict, f"{time.monotonic() - start:.0f}"]
    print(f"| {' | '.join(cells)} |", flush=True)
    return code == RED


def run(tree: Path, tests: Sequence[str], name: str, patience: float) -> int | None:
    """pytest's exit code in a fork of this process; None of one that had to be killed, with all that it started."""
    child = os.fork()
    if child == 0:
        become_pytest(tree, tests, TOLD / f"{name}.txt")
    end = time.monotonic() + patience
    try:
        while time.monotonic() < end:
            done, status = os.waitpid(child, os.WNOHANG)
            if done:
                return os.waitstatus_to_exitcode(status)
            time.sleep(0.02)
        return None
    finally:
        kill(child)


def become_pytest(tree: Path, tests: Sequence[str], output: Path) -> None:
    code = 99
    try:
        os.setsid()
        out = os.open(output, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        for stream in (1, 2):
            os.dup2(out, stream)
        os.chdir(tree)
        paths = [str(tree), str(tree / "recipes")]
        os.environ["PYTHONPATH"] = ":".join(paths)
        sys.path[:0] = paths
        import pytest

        import toolkit

        assert toolkit.__file__ == f"{tree}/toolkit/__init__.py", f"{toolkit.__file__} is not what was broken"
        del sys.modules["rank_server"]  # the copy's counts
        quiet = ["-x", "-q", "--no-header", "-p", "no:cacheprovider"]
        code = int(pytest.main([*quiet, *tests]))
    finally:
        sys.stdout.flush()
        os._exit(code)


def kill(child: int) -> None:
    """A test that has ended has none of its own left, but one that hangs."""
    with contextlib.suppress(psutil.NoSuchProcess, ChildProcessError):
        process = psutil.Process(child)
        for one in [*process.children(recursive=True), process]:
            with contextlib.suppress(psutil.NoSuchProcess):
                one.kill()
        os.waitpid(child, 0)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
