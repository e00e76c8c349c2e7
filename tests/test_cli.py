"""The command `toolkit`: how it ends, what each command's help has, and that asking for help is quick."""

import re
import subprocess
import sys
from typing import Any, get_args

import pytest

from toolkit import errors
from toolkit.cli import plan
from toolkit.cli.main import main
from toolkit.config.schema import Dtype

COMMANDS = (
    "plan", "machines", "prepare", "export", "curves", "timeline", "check", "build-ops", "doctor", "launch",
)  # fmt: skip


@pytest.mark.parametrize(
    ("error", "code", "said"),
    [
        (errors.ConfigError("seed=x"), 2, "seed=x"),
        (errors.DataError("line 3"), 2, "line 3"),
        (errors.OutOfMemory("out of memory: all"), 71, "out of memory: all"),
        (MemoryError(), 71, "out of memory: MemoryError Use a host with more"),
        (RuntimeError("[enforce fail] can't allocate memory: 8 bytes"), 71, "out of memory: [enforce fail]"),
        (RuntimeError("CUDA out of memory. Tried"), 71, "out of memory: CUDA out of memory. Tried Use a host"),
    ],
)
def test_the_command_ends_with_the_code_of_its_error(
    error: Exception, code: int, said: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def fail(*_: Any, **__: Any) -> None:
        raise error

    monkeypatch.setattr("toolkit.plan.machines.table", fail)
    with pytest.raises(SystemExit) as ended:
        main(["machines"])
    lines = capsys.readouterr().err.splitlines()
    assert ended.value.code == code and len(lines) == 1 and lines[0].startswith(f"error: {said}")


def test_a_bug_keeps_its_traceback(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail() -> None:
        raise RuntimeError("of ours")

    monkeypatch.setattr("toolkit.plan.machines.table", fail)
    with pytest.raises(RuntimeError, match="of ours"):
        main(["machines"])


@pytest.mark.parametrize("command", COMMANDS)
def test_each_command_has_an_example(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main([command, "--help"])
    examples = capsys.readouterr().out.partition("examples:")[2].strip().splitlines()
    assert examples and all(line.strip().startswith(f"toolkit {command}") for line in examples)


def test_help_names_all_commands_and_imports_little() -> None:
    code = (
        "import sys\nfrom toolkit.cli.main import main\ntry:\n    main(['--help'])\nexcept SystemExit:\n"
        "    assert not {'torch', 'pydantic', 'rich', 'hydra', 'numpy'} & set(sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert set(re.findall(r"^    ([a-z-]+)", done.stdout, re.MULTILINE)) == set(COMMANDS)


def test_the_types_of_the_command_are_those_of_the_configuration() -> None:
    assert get_args(Dtype) == plan.DTYPES
