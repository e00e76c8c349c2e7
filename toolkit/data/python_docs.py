"""English prose that every Python carries: its language topics and the standard library's docstrings.

    for title, paragraphs in documents(): ...   # 'topics/with', ['The "with" statement is used …', …]

Nothing is imported, run or downloaded; the text differs only between versions of Python.
"""

import ast
import re
import sys
import sysconfig
import textwrap
from collections.abc import Iterator
from functools import cache
from pathlib import Path

SKIPPED = {"site-packages", "dist-packages", "test", "tests", "idle_test", "pydoc_data", "lib2to3", "__pycache__"}
BODIES = ("body", "handlers", "orelse", "finalbody", "cases")  # where statements lie within statements
CODE = re.compile(r"::=|^\s*(>>>|\.\.\. |\$ |\.\. )|^\W+$|\s=\s.*\(|^[\s\w.]+\(.*\)( -> .*)?$", re.MULTILINE)
ROLE = re.compile(r":[\w:]+:`[!~]?([^`<]+?)\s*(?:<[^>]*>)?`")
MARKUP = re.compile(r"``|`|(?<!\w)\*{1,2}(?=\w)|(?<=\w)\*{1,2}(?!\w)|^\s*(?:[-*•+]|\d+[.)]|:param|@param)\s+")


@cache
def documents() -> list[tuple[str, list[str]]]:
    """(name, paragraphs) of every topic and every documented module, in sorted order; about 2 MB."""
    from pydoc_data.topics import topics

    found = [(f"topics/{name}", _prose(topics[name])) for name in sorted(topics)]
    library = Path(sysconfig.get_paths()["stdlib"])
    for path in sorted(library.rglob("*.py")):
        relative = path.relative_to(library)
        if not SKIPPED.intersection(relative.parts):
            found.append((relative.as_posix(), [p for text in _docstrings(path) for p in _prose(text)]))
    return [(name, paragraphs) for name, paragraphs in found if paragraphs]


def identity() -> list[str]:
    """The interpreter whose documentation this is; its patch level fixes the text."""
    return [sys.version, sysconfig.get_paths()["stdlib"]]


def _docstrings(path: Path) -> Iterator[str]:
    """The docstrings of a module, outer ones first, read without importing it."""
    try:
        tree = ast.parse(path.read_bytes())
    except (SyntaxError, ValueError):  # templates and bad-syntax samples of the library's own tools
        return
    level: list[ast.AST] = [tree]
    while level:
        for node in level:
            if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
                yield ast.get_docstring(node) or ""
        level = [inner for node in level for part in BODIES for inner in getattr(node, part, ())]


def _prose(text: str) -> list[str]:
    """The paragraphs that read as sentences: code, grammar, tables, signatures and headings are left out."""
    blocks = (textwrap.dedent(block) for block in re.split(r"\n\s*\n", text))
    plain = (MARKUP.sub("", ROLE.sub(r"\1", block)) for block in blocks if not CODE.search(block))
    return [p for words in plain if _reads_as_english(p := " ".join(words.split()).replace("::", ":"))]


def _reads_as_english(paragraph: str) -> bool:
    words = sum(word.strip("\"'(),.:;!?“”‘’").isalpha() for word in paragraph.split())
    return paragraph.endswith((".", ":", "!", "?", '."', ".)")) and words >= max(4, 0.75 * len(paragraph.split()))
