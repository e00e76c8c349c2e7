"""Inputs as other people have them: the rows of ``tests/world/*.yaml``, each with what must come of it.

    @pytest.mark.parametrize("case", cases("tables"))
    def test_…(case, tmp_path):
        with told(case):                       # a case with `error:` must end in one line that holds each of its parts
            found = read(case.files(tmp_path))
            assert found == case.expect

A file of cases says in its first comment where such inputs come from. A row has a ``case`` (its name), mostly
``files`` (name: text; {encoding: utf-16, text: …}; or {base64: …}), what its kind of test reads besides, and
``expect`` or ``error`` (a part of the message or a list of them), or ``warning`` likewise.
"""

import base64
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import yaml

from toolkit.data.prepared import Prepared
from toolkit.errors import ToolkitError

FOLDER = Path(__file__).parent / "world"


@dataclass(frozen=True)
class Case:
    """A row; its keys are attributes, None where it has none."""

    row: dict[str, Any]

    def __getattr__(self, key: str) -> Any:
        return self.row.get(key)

    def write(self, folder: Path) -> Path:
        """Its files in ``folder``."""
        for name, content in (self.row.get("files") or {}).items():
            path = folder / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(_bytes(content))
        return folder


def _bytes(content: Any) -> bytes:
    if isinstance(content, str):
        return content.encode()
    if "base64" in content:
        return base64.b64decode(content["base64"])
    return str(content["text"]).encode(content["encoding"])


def cases(kind: str) -> list[Any]:
    """The rows of a file, as parameters of a test."""
    rows = yaml.safe_load((FOLDER / f"{kind}.yaml").read_text())
    return [pytest.param(Case(row), id=row["case"]) for row in rows]


@contextmanager
def told(case: Case) -> Iterator[None]:
    """Holds that what happens within ends in the one line of ``case.error``, or in no error where the row has none."""
    if case.error is None:
        yield
        return
    with pytest.raises(ToolkitError) as caught:
        yield
    said = str(caught.value)
    assert "\n" not in said, said
    for part in parts(case.error):
        assert part in said, said


def warnings(prepared: Prepared) -> list[str]:
    """Those of prepared data, without the ones that only its size explains."""
    small = "the texts gave only", "unknown to the trained vocabulary"
    return [line for line in prepared.warnings if not any(part in line for part in small)]


def parts(wanted: str | list[str] | None) -> list[str]:
    """What a message must hold."""
    return [wanted] if isinstance(wanted, str) else wanted or []
