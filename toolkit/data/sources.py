"""Where text comes from: documents, and the files, lines, rows and data sets of the hub that tables are read from too.

    for paragraphs in documents(config.data): ...    # ['First paragraph.', …]

Everything streams; only one document is in memory at a time.
"""

import glob
import itertools
import os
import re
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

from toolkit.config.schema import Data
from toolkit.data import python_docs
from toolkit.data.lines import Problems, json_lines, read_lines
from toolkit.errors import DataError, nearest


def documents(data: Data, problems: Problems | None = None) -> Iterator[list[str]]:
    """The paragraphs of every document, in a fixed order. Raises DataError on bad input."""
    problems = problems or Problems(data.on_error)
    if data.format == "python_docs":
        yield from (paragraphs for _, paragraphs in python_docs.documents())
    elif data.format == "text":
        for file in _files(data):
            yield from _text(file, data.documents, problems)
    elif data.format == "hub":
        for name in _paths(data):
            for where, row in hub_rows(name, load(name, data.split, data.streaming)):
                yield from _row_document(where, row, data.column, problems)
    elif data.format in ("jsonl", "parquet"):
        for file in _files(data):
            jsonl = data.format == "jsonl"
            for where, row in json_lines(file, problems) if jsonl else parquet_rows(file, problems, data.column):
                yield from _row_document(where, row, data.column, problems)
    else:
        raise DataError(f"data.format={data.format}: has no documents. Use python_docs, text, jsonl, parquet or hub.")


def identity(data: Data) -> list[Any]:
    """What identifies the corpus for the cache, without reading it."""
    if data.format == "python_docs":
        return python_docs.identity()
    if data.format == "hub":
        return [data.split, *(hub_identity(name, data.split, data.streaming) for name in _paths(data))]
    return [data.documents, stamps(_files(data))]


def _paths(data: Data) -> list[str]:
    if not data.path:
        raise DataError(
            f"data.path is not set, but data.format={data.format} reads from it. Set data.path to a file, a glob or a "
            "list of them, as in data.path='books/*.txt', or to names of hub data sets, as in data.path=owner/name."
        )
    return [data.path] if isinstance(data.path, str) else list(data.path)


def _files(data: Data) -> list[Path]:
    """The files that the globs match, sorted within each glob, each once."""
    found = (path for pattern in _paths(data) for path in sorted(p.resolve() for p in matching(pattern, "data.path")))
    return list(dict.fromkeys(found))


PARTING = {
    "\\f": "form feeds", "\\r": "carriage returns", "\\v": "vertical tabs", "\\x85": "next-line characters",
    "\\u200b": "zero-width spaces", "\\u2028": "line separators", "\\u2029": "paragraph separators",
}  # fmt: skip


def separators(data: Data) -> str:
    """A sentence on what the beginning of text files has that may be meant to part documents, but parts none."""
    if data.format != "text":
        return ""
    lines = itertools.chain.from_iterable(read_lines(file, Problems("skip")) for file in _files(data))
    texts = [text for _, text in itertools.islice(lines, 100_000)]
    for escape, name in PARTING.items():
        character = escape.encode().decode("unicode_escape")
        if number := sum(text.count(character) for text in texts):
            begins = sum(text.startswith(character) for text in texts) * 2 > number
            way_out = f"set 'data.documents=\"^{escape}\"'" if begins else "put blank lines in their place"
            return f" The text has {number:,} {name} ({escape}): if they part its documents, {way_out}."
    return ""


def _row_document(where: str, row: Any, column: str, problems: Problems) -> Iterator[list[str]]:
    """The document in a row: a text with blank lines between paragraphs, or a list of paragraphs."""
    if not isinstance(row, dict) or column not in row:
        names = ", ".join(row) if isinstance(row, dict) else f"none, it is a {type(row).__name__}"
        hint = nearest(column, row) if isinstance(row, dict) else ""
        problems.found(f"{where}: no column '{column}'.{hint} It has: {names}", "Set data.column to one of these")
    elif (value := row[column]) is None:
        yield []
    elif isinstance(value, str):
        yield _unwrapped(re.split(r"\r\n?|\n", value))
    elif isinstance(value, list) and all(isinstance(item, str) for item in value):
        yield value
    else:
        what = f"{where}: column '{column}' holds {value!r:.40}, not a text or a list of texts"
        problems.found(what, "Set data.column to the column with the text")


def _groups(lines: Iterable[str]) -> Iterator[list[str]]:
    """Stripped lines between blank ones; of zero width is blank, too."""
    stripped = (line.strip().strip("\u200b\u2060\ufeff") for line in lines)
    return (list(group) for full, group in itertools.groupby(stripped, bool) if full)


def _unwrapped(lines: Iterable[str]) -> list[str]:
    """Paragraphs of wrapped prose: a blank line ends one, lines within one are joined by a space."""
    return list(map(" ".join, _groups(lines)))


def _text(path: Path, begin: str, problems: Problems) -> Iterator[list[str]]:
    """The documents of a file: all of it, or between blank lines, a paragraph a line, or from matches of a regex on."""
    lines = (text for _, text in read_lines(path, problems))
    if begin == "file":
        yield _unwrapped(lines)
    elif begin == "blank_line":
        group: list[str] = []
        for group in _groups(lines):
            yield group
        if not group:  # an empty file is an empty document
            yield group
    else:
        yield from _headed(path, lines, begin, problems)


_TAG = re.compile(r"\s*</?doc\b[^>]*>\s*$")  # WikiExtractor's frame is not text


def _headed(path: Path, lines: Iterable[str], first_line: str, problems: Problems) -> Iterator[list[str]]:
    """Documents that each start at a line matching the regex; what precedes the first is one too."""
    try:
        heading = re.compile(first_line)
    except re.error as error:
        what = f"data.documents={first_line!r}: is no regex ({error})"
        raise DataError(f"{what}. Use blank_line, file or a regex.") from error
    matched, group = False, list[str]()
    for text in lines:
        if heading.search(text):
            if matched or any(map(str.strip, group)):
                yield _unwrapped(group)
            matched, group = True, ["" if _TAG.match(text) else text, ""]
        elif not _TAG.match(text):
            group.append(text)
    if matched or not any(map(str.strip, group)):
        yield _unwrapped(group)
    else:
        problems.found(f"{path}: data.documents={first_line!r} matches no line", "Correct the regex or use file")


def matching(pattern: str, key: str) -> list[Path]:
    """The files that a glob matches, sorted. Raises DataError, with the ``key`` it stands at, on none."""
    try:
        path = Path(pattern).expanduser()
        if path.is_dir():
            raise DataError(f"{key}={pattern}: is a folder. Name its files: {key}='{pattern}/*'.")
        names = [path] if path.is_file() else glob.glob(str(path), recursive=True)  # noqa: PTH207
        if lost := next((name for name in names if not os.path.exists(name)), None):  # noqa: PTH110
            raise DataError(f"{key}={pattern}: {lost} is a link to what is not there. Mend or remove it.")
        found = sorted(path for path in map(Path, names) if path.is_file())
    except (OSError, RuntimeError) as error:  # no permission, too long a name, a home of nobody
        raise DataError(f"{key}={pattern:.200}: cannot be looked up ({error!s:.200}). Correct the path.") from error
    if not found:
        raise DataError(f"{key}={pattern}: no file matches (working directory {Path.cwd()}).")
    return found


def stamps(files: Iterable[Path]) -> list[list[Any]]:
    """What stands for the content of files in the cache: path, size and modification time, as for make. Every start of
    every rank asks, and hashing terabytes to learn that nothing changed would cost more than training."""
    return [[str(file.resolve()), file.stat().st_size, file.stat().st_mtime_ns] for file in files]


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
    except (pa.ArrowException, OSError, ValueError, OverflowError) as error:  # the last two of values
        problems.found(f"{path}: cannot be read as parquet after row {row} ({error})", "Replace the file")


def load(name: str, split: str, streaming: bool, key: str = "data.path") -> Any:
    """One split of ``owner/name[:config]`` of Hugging Face's hub, or of a folder of data files that stands for one.
    Raises DataError with the ``key`` it stands at."""
    from datasets import load_dataset

    owner, _, config = name.partition(":")
    if os.path.isfile(owner):  # noqa: PTH113  (never raises)
        raise DataError(f"{key}={name}: is a file, no data set of the hub. Set data.format to what is in it.")
    return _asked(lambda: load_dataset(owner, config or None, split=split, streaming=streaming), key, name)


def hub_rows(name: str, dataset: Any, key: str = "data.path") -> Iterator[tuple[str, dict[str, Any]]]:
    """(name:row N, row) of every row; while it streams, each may be the one that cannot be had."""
    rows = iter(dataset)
    for number in itertools.count(1):
        row = _asked(lambda: next(rows, None), key, name)
        if row is None:
            return
        yield f"{name}:row {number}", row


def hub_identity(name: str, split: str, streaming: bool, key: str = "data.path") -> list[Any]:
    """The name and the revision that would be read: files of a folder, else the hub's commit."""
    owner = name.partition(":")[0]
    if (folder := Path(owner)).is_dir():
        return [name, stamps(path for path in sorted(folder.rglob("*")) if path.is_file())]
    if not streaming:
        return [name, load(name, split, streaming, key)._fingerprint]
    from huggingface_hub import HfApi

    return [name, str(_asked(lambda: HfApi().dataset_info(owner).sha, key, name))]


def _asked(question: Callable[[], Any], key: str, name: str) -> Any:
    try:
        return question()
    except Exception as error:  # the client raises from several libraries; each means: not reachable
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise DataError(
            f"{key}={name}: the hub data set cannot be loaded ({reason}) "
            "Check the name (owner/name[:config]), the split and the network; without one, data.streaming=false "
            "reads what was downloaded before."
        ) from error
