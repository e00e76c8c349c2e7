"""What mkdocs adds to these pages when it builds them: the README as the first, parity.md, every configuration key.

    make docs

The keys come from the pydantic models of toolkit/config/schema.py and of the recipes: names, types and defaults from
the models, descriptions from the comments at or above a field in the source.
"""

import ast
import importlib
import inspect
import io
import json
import re
import sys
import textwrap
import tokenize
from collections.abc import Collection, Iterator
from pathlib import Path
from typing import Any, TypeGuard

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page
from pydantic import BaseModel

ROOT = Path(__file__).parents[1]
HERE = "<!-- keys -->"


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Pages that lie elsewhere in the checkout."""
    for name, path in {"index.md": ROOT / "README.md", "parity.md": ROOT / "tests" / "parity.md"}.items():
        files.append(File.generated(config, name, content=path.read_text()))
    return files


def on_page_markdown(markdown: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Links as GitHub follows them, made the site's; the tables of keys."""
    markdown = markdown.replace("](../README.md", "](index.md")
    markdown = re.sub(r"\]\((?:docs/|\.\./tests/|tests/(?=parity))", "](", markdown)
    markdown = re.sub(r"\[([^]]+)\]\((CHANGELOG|CONTRIBUTING)\.md\)", r"`\1`", markdown)
    return markdown.replace(HERE, "\n".join(keys())) if HERE in markdown else markdown


def keys() -> Iterator[str]:
    """A table for each node of the configuration, then for those of single recipes."""
    sys.path[:0] = [str(ROOT), str(ROOT / "recipes")]  # not above: MkDocs takes back what a hook adds as it is loaded
    from toolkit.config.schema import RunConfig

    yield from tables(RunConfig, "")
    for path in sorted((ROOT / "recipes").glob("*.py")):
        model = importlib.import_module(path.stem).main.config
        if model is not RunConfig:
            yield from tables(model, "", inherited=set(RunConfig.model_fields), recipe=path.stem)


def tables(model: type[BaseModel], node: str, inherited: Collection[str] = (), recipe: str = "") -> Iterator[str]:
    """The keys of ``model`` that it does not inherit; then its nodes, each under a heading of its own."""
    said, types = comments(model), model.model_json_schema()
    nodes = {n: f.annotation for n, f in model.model_fields.items() if is_node(f.annotation) and n not in inherited}
    rows = [
        f"| `{node}{name}` | {words(types['properties'][name], types)} | {default(field.get_default())} "
        f"| {said.get(name, '')} |"
        for name, field in model.model_fields.items()
        if name not in inherited and name not in nodes
    ]
    if rows:
        title = f"`{node.rstrip('.')}`" if node else f"The recipe `{recipe}`" if recipe else "Of the run"
        yield f"\n### {title} {{ #{node.rstrip('.') or recipe or 'run'} }}\n"
        yield f"{inspect.cleandoc(model.__doc__ or '').replace('``', '`')}\n"
        yield "| key | type | default | |\n|---|---|---|---|\n" + "\n".join(rows) + "\n"
    for name, inner in nodes.items():
        yield from tables(inner, f"{node}{name}.")


def is_node(annotation: Any) -> TypeGuard[type[BaseModel]]:
    return isinstance(annotation, type) and issubclass(annotation, BaseModel)


def comments(model: type[BaseModel]) -> dict[str, str]:
    """What stands as a comment above each field of ``model`` and on its lines."""
    source = textwrap.dedent(inspect.getsource(model))
    tokens = tokenize.generate_tokens(io.StringIO(source).readline)
    said = {token.start[0]: token.string.lstrip("# ") for token in tokens if token.type == tokenize.COMMENT}
    found, last = {}, 0
    for field in ast.parse(source).body[0].body:  # type: ignore[attr-defined]
        lines = [said[n] for n in range(last + 1, (field.end_lineno or 0) + 1) if n in said]
        if isinstance(field, ast.AnnAssign) and isinstance(field.target, ast.Name):
            found[field.target.id] = escaped(" ".join(lines))
        last = field.end_lineno or last
    return found


def words(schema: dict[str, Any], whole: dict[str, Any]) -> str:
    """A JSON schema's type in a few words."""
    if "$ref" in schema:
        return words(whole["$defs"][schema["$ref"].rsplit("/", 1)[1]], whole)
    if "anyOf" in schema:
        return " or ".join(words(option, whole) for option in schema["anyOf"])
    if "enum" in schema or "const" in schema:
        return ", ".join(f"`{value}`" for value in schema.get("enum", [schema.get("const")]))
    kind = schema.get("type")
    if kind == "array" and "prefixItems" in schema:
        return f"{len(schema['prefixItems'])} of: {words(schema['prefixItems'][0], whole)}"
    if kind == "array":
        return f"list of: {words(schema['items'], whole)}"
    if kind == "object":
        return "mapping"
    name = {"integer": "whole number", "number": "number", "string": "text", "boolean": "`true`, `false`"}
    signs = {"exclusiveMinimum": ">", "minimum": "≥", "exclusiveMaximum": "<", "maximum": "≤"}  # fmt: skip
    limits = [f"{sign} {schema[key]:,}" for key, sign in signs.items() if key in schema]
    return "`null`" if kind == "null" else " ".join([name.get(str(kind), "anything"), ", ".join(limits)]).strip()


def default(value: Any) -> str:
    """As YAML has it."""
    text = value if isinstance(value, str) and value else json.dumps(value)
    return f"`{text}`"


def escaped(text: str) -> str:
    return re.sub(r"([|<*\[\]])", r"\\\1", text.replace("None", "null"))
