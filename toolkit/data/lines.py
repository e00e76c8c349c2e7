"""The lines of a file, as they are or as JSON, and what becomes of a bad one.

    for number, text in read_lines(Path("x.txt.gz"), Problems(data.on_error)): ...    # 1, 'First line.'

Everything streams.
"""

import itertools
import json
import re
import zlib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, BinaryIO

from toolkit.data import encodings
from toolkit.errors import DataError

DEEPEST = 100  # lists and objects in one another: more would end the recursions of those who look into them


@dataclass
class Problems:
    """What to do with a bad line, row or file: ``raise`` at once, or ``skip``, count and go on."""

    on_error: str = "raise"
    skipped: int = 0
    first: list[str] = field(default_factory=list)  # the messages of the first few

    def found(self, message: str, way_out: str) -> None:
        message = message.replace("\n", " ")  # of an identity, a name, pyarrow's words
        if self.on_error == "raise":
            raise DataError(f"{message}. {way_out}, or skip and count with data.on_error=skip.")
        self.skipped += 1
        if len(self.first) < 5:
            self.first.append(message)


def read_lines(path: Path, problems: Problems) -> Iterator[tuple[int, str]]:
    """(number from 1, text without its line end) of every line that is UTF-8 text."""
    return ((number, text) for number, text in every_line(path, problems) if text is not None)


def every_line(path: Path, problems: Problems) -> Iterator[tuple[int, str | None]]:
    """The same with None for a line that is skipped, as two aligned files need it."""
    number, offset, looks = 0, 0, ""
    try:
        with encodings.opened(path) as file:
            if packed := encodings.packed(file):
                problems.found(f"{path}: is {packed[0]}", packed[1])
                return
            for number, raw in enumerate(_ended(file), 1):
                try:
                    text = raw.decode()
                    odd = "\0" in text or "\x1b$" in text  # half a letter of UTF-16, or the escape of ISO-2022-JP
                    bad = max(raw.find(b"\0"), raw.find(b"\x1b$")) if odd else -1
                except UnicodeDecodeError as error:
                    bad = error.start
                if bad < 0:
                    yield number, text.rstrip("\r\n").lstrip("\ufeff")
                else:
                    looks = looks or encodings.way_out(path, offset)
                    where = f"{path}:{number}: byte 0x{raw[bad]:02x} at offset {offset + bad}"
                    problems.found(f"{where} is not valid UTF-8 text", looks)
                    yield number, None
                offset += len(raw)
    except (OSError, EOFError, zlib.error) as error:
        problems.found(f"{path}: cannot be read after line {number} ({error})", "Replace the file")


def _ended(file: BinaryIO) -> Iterable[bytes]:
    """Lines end with a newline; those of a file that has but one, as of an old Mac, with a carriage return. A form feed
    or U+2028 ends none: aligned files would be shifted from there on."""
    first, second = next(file, b""), next(file, None)
    return first.splitlines(keepends=True) if second is None else itertools.chain((first, second), file)


def from_json(text: str) -> Any:
    """What is written, with None for NaN, as which some write a missing number. Raises ValueError, also of what would
    break later: a key twice, half of a surrogate pair."""
    try:
        value = json.loads(text, object_pairs_hook=_object, parse_constant=lambda n: None if n == "NaN" else float(n))
        if re.search(r"\\u[dD][89a-fA-F]", text):
            json.dumps(value, ensure_ascii=False).encode()
        if text.count("[") + text.count("{") > DEEPEST:
            _refuse_deep(value)
    except UnicodeEncodeError as error:
        raise ValueError(f"{error.object[error.start]!a} is half of a surrogate pair") from error
    except RecursionError as error:
        raise ValueError(f"nested more than {DEEPEST} deep") from error
    return value


def _refuse_deep(value: Any) -> None:
    level = [value]
    for _ in range(DEEPEST):
        level = [i for v in level for i in (v.values() if isinstance(v, dict) else v if isinstance(v, list) else ())]
    if level:
        raise RecursionError


def json_fault(error: ValueError) -> str:
    """What :func:`from_json` says is wrong, in one form."""
    return f"at column {error.colno} ({error.msg})" if isinstance(error, json.JSONDecodeError) else f"({error})"


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        names = [name for name, _ in pairs]
        raise ValueError(f"the key {next(name for name in found if names.count(name) > 1)!r:.40} twice")
    return found


def json_lines(path: Path, problems: Problems) -> Iterator[tuple[str, Any]]:
    """(path:line, value) of every line that is not blank."""
    for number, text in read_lines(path, problems):
        if not text.strip():
            continue
        try:
            row = from_json(text)
        except ValueError as error:
            what = f"{path}:{number}: no valid JSON {json_fault(error)}: {text[:40]!r}"
            problems.found(what, "Correct or remove the line")
        else:
            yield f"{path}:{number}", row
