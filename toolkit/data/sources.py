"""Where documents come from: text, JSON lines, parquet, the hub or Python's own documentation.

    for document in documents(config.data, Problems("raise")):
        document.paragraphs, document.origin   # ['First paragraph.', …], 'books/a.txt:12'

Everything streams; only one document is in memory at a time.
"""

import codecs
import glob
import gzip
import json
import re
import zlib
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from toolkit.config.schema import Data
from toolkit.data import hub, python_docs
from toolkit.errors import DataError, nearest


@dataclass(frozen=True)
class Document:
    """The paragraphs of one document and where it starts."""

    paragraphs: list[str]
    origin: str  # file:line, file:row or name


@dataclass
class Problems:
    """What to do with a bad line, row or file: ``raise`` at once, or ``skip``, count and go on."""

    on_error: str = "raise"
    skipped: int = 0
    first: list[str] = field(default_factory=list)  # the messages of the first few

    def found(self, message: str, way_out: str) -> None:
        if self.on_error == "raise":
            raise DataError(f"{message}. {way_out}, or skip and count with data.on_error=skip.")
        self.skipped += 1
        if len(self.first) < 5:
            self.first.append(message)


def documents(data: Data, problems: Problems | None = None) -> Iterator[Document]:
    """Every document of the configured sources, in a fixed order. Raises DataError on bad input."""
    problems = problems or Problems(data.on_error)
    if data.format == "python_docs":
        yield from (Document(paragraphs, name) for name, paragraphs in python_docs.documents())
    elif data.format == "hub":
        for where, row in hub.rows(data, paths(data)):
            yield from _row_document(row, data.column, where, problems)
    else:
        read = {"text": _text, "jsonl": _jsonl, "parquet": _parquet}.get(data.format or "")
        if read is None:
            raise DataError(f"data.format={data.format}: has no documents. Use python_docs, {', '.join(_WAYS)}.")
        for file in files(data):
            yield from read(file, data, problems)


def paths(data: Data) -> list[str]:
    """``data.path`` as a list. Raises DataError when there is none."""
    if not data.path:
        way_out = _WAYS.get(data.format or "", "")
        raise DataError(f"data.path is not set, but data.format={data.format} reads from it. {way_out}")
    return [data.path] if isinstance(data.path, str) else list(data.path)


_FILES = "Set data.path to a file, a glob or a list of them"
_WAYS = {
    "text": f"{_FILES}: data.path='books/*.txt'.",
    "jsonl": f"{_FILES}: data.path='shards/*.jsonl.gz'.",
    "parquet": f"{_FILES}: data.path='shards/*.parquet'.",
    "hub": "Set data.path to names of hub data sets: data.path=Salesforce/wikitext:wikitext-103-raw-v1.",
}


def files(data: Data) -> list[Path]:
    """The files that the globs match, sorted within each glob, each once. Raises DataError on no match."""
    found: dict[Path, None] = {}
    for pattern in paths(data):
        found |= dict.fromkeys(sorted(path.resolve() for path in matching(pattern, "data.path")))
    return list(found)


def matching(pattern: str, key: str) -> list[Path]:
    """The files that a glob matches, sorted. Raises DataError, with the ``key`` it stands at, on none."""
    path = Path(pattern).expanduser()
    if path.is_dir():
        raise DataError(f"{key}={pattern}: is a folder. Name its files: {key}='{pattern}/*'.")
    names = [path] if path.is_file() else glob.glob(str(path), recursive=True)  # noqa: PTH207
    found = sorted(path for path in map(Path, names) if path.is_file())
    if not found:
        raise DataError(f"{key}={pattern}: no file matches (working directory {Path.cwd()}).")
    return found


def identity(data: Data) -> list[Any]:
    """What identifies the corpus for the cache, without reading it.

    For files that is path, size and modification time, as for make: every start of every rank asks,
    and hashing a corpus of terabytes to learn that nothing changed would cost more than training does.
    """
    if data.format == "python_docs":
        return python_docs.identity()
    if data.format == "hub":
        return [data.split, *(hub.identity(name, data) for name in paths(data))]
    stats = [(path, path.stat()) for path in files(data)]
    return [data.documents, [[str(path), stat.st_size, stat.st_mtime_ns] for path, stat in stats]]


def read_lines(path: Path, problems: Problems) -> Iterator[tuple[int, str]]:
    """(number from 1, text without its line end) of every line that is valid UTF-8."""
    number, offset = 0, 0
    try:
        with gzip.open(path) if path.suffix == ".gz" else path.open("rb") as file:
            for number, raw in enumerate(file, 1):
                try:
                    yield number, _decoded(raw, number)
                except UnicodeDecodeError as error:
                    problems.found(
                        f"{path}:{number}: byte 0x{raw[error.start]:02x} at offset {offset + error.start} "
                        "is not valid UTF-8",
                        "Convert the file (iconv -f latin1 -t utf-8)",
                    )
                offset += len(raw)
    except (OSError, EOFError, zlib.error) as error:
        problems.found(f"{path}: cannot be read after line {number} ({error})", "Replace the file")


def _decoded(raw: bytes, number: int) -> str:
    text = raw.decode().rstrip("\r\n")
    return text.removeprefix(codecs.BOM_UTF8.decode()) if number == 1 else text


def _unwrap(lines: Iterable[str]) -> list[str]:
    """Paragraphs of wrapped prose: a blank line ends one, lines within one are joined by a space."""
    paragraphs: list[list[str]] = [[]]
    for line in map(str.strip, lines):
        if line:
            paragraphs[-1].append(line)
        elif paragraphs[-1]:
            paragraphs.append([])
    return [" ".join(lines) for lines in paragraphs if lines]


def _text(path: Path, data: Data, problems: Problems) -> Iterator[Document]:
    lines = read_lines(path, problems)
    if data.documents == "file":
        yield Document(_unwrap(text for _, text in lines), str(path))
    elif data.documents == "blank_line":
        yield from _groups(path, lines, str.strip)
    else:
        yield from _headed(path, lines, data.documents, problems)


def _groups(path: Path, lines: Iterable[tuple[int, str]], clean: Callable[[str], str]) -> Iterator[Document]:
    """Documents separated by blank lines, one sentence or paragraph a line; an empty file is an empty one."""
    group: list[str] = []
    start = end = 0
    for end, text in lines:
        if line := clean(text):
            start = start if group else end
            group.append(line)
        elif group:
            yield Document(group, f"{path}:{start}")
            group = []
    if group or not start:
        yield Document(group, f"{path}:{start or end}")


def _headed(path: Path, lines: Iterable[tuple[int, str]], first_line: str, problems: Problems) -> Iterator[Document]:
    """Documents that each start at a line matching the regex; what precedes the first is one too."""
    heading, matched, start = _regex(first_line), False, 1
    group: list[str] = []
    for number, text in lines:
        if heading.search(text):
            if matched or any(map(str.strip, group)):
                yield Document(_unwrap(group), f"{path}:{start}")
            matched, start, group = True, number, ["" if _TAG.match(text) else text, ""]
        elif not _TAG.match(text):
            group.append(text)
    if matched or not any(map(str.strip, group)):
        yield Document(_unwrap(group), f"{path}:{start}")
    else:
        problems.found(f"{path}: data.documents={first_line!r} matches no line", "Correct the regex or use file")


_TAG = re.compile(r"\s*</?doc\b[^>]*>\s*$")  # WikiExtractor's frame is not text


def _regex(pattern: str) -> re.Pattern[str]:
    try:
        return re.compile(pattern)
    except re.error as error:
        raise DataError(
            f"data.documents={pattern!r}: is no regex ({error}). Use blank_line, file or a regex."
        ) from error


def _jsonl(path: Path, data: Data, problems: Problems) -> Iterator[Document]:
    for where, row in json_lines(path, problems):
        yield from _row_document(row, data.column, where, problems)


def json_lines(path: Path, problems: Problems) -> Iterator[tuple[str, Any]]:
    """(path:line, value) of every line that is not blank."""
    for number, text in read_lines(path, problems):
        if not text.strip():
            continue
        try:
            row = json.loads(text)
        except json.JSONDecodeError as error:
            problems.found(
                f"{path}:{number}: no valid JSON at column {error.colno} ({error.msg}): {text[:40]!r}",
                "Correct or remove the line",
            )
        else:
            yield f"{path}:{number}", row


def _parquet(path: Path, data: Data, problems: Problems) -> Iterator[Document]:
    for where, row in parquet_rows(path, problems, data.column):
        yield from _row_document(row, data.column, where, problems)


def parquet_rows(path: Path, problems: Problems, column: str | None = None) -> Iterator[tuple[str, dict[str, Any]]]:
    """(path:row N, row) of every row; of one ``column`` where given, or one row of all names if it is not there."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    row = 0
    try:
        with pq.ParquetFile(path) as file:
            names = file.schema_arrow.names
            if column and column not in names:
                yield str(path), dict.fromkeys(names)
                return
            for batch in file.iter_batches(batch_size=256, columns=[column] if column else names):
                for values in batch.to_pylist():
                    row += 1
                    yield f"{path}:row {row}", values
    except (pa.ArrowException, OSError) as error:
        problems.found(f"{path}: cannot be read as parquet after row {row} ({error})", "Replace the file")


def _row_document(row: Any, column: str, where: str, problems: Problems) -> Iterator[Document]:
    """The document in a row: a text with blank lines between paragraphs, or a list of paragraphs."""
    if not isinstance(row, dict) or column not in row:
        names = ", ".join(row) if isinstance(row, dict) else f"none, it is a {type(row).__name__}"
        hint = nearest(column, row) if isinstance(row, dict) else ""
        problems.found(f"{where}: no column '{column}'.{hint} It has: {names}", "Set data.column to one of these")
    elif (value := row[column]) is None:
        yield Document([], where)
    elif isinstance(value, str):
        yield Document(_unwrap(value.splitlines()), where)
    elif isinstance(value, list) and all(isinstance(item, str) for item in value):
        yield Document(value, where)
    else:
        problems.found(
            f"{where}: column '{column}' holds {value!r:.40}, not a text or a list of texts",
            "Set data.column to the column with the text",
        )
