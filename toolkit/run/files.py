"""Files that are written whole or not at all, and the records that are appended line by line.

replace(path, as_json(tree))
read_metrics(Path("runs/bert/metrics.jsonl"))
"""

import csv
import io
import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any


def replace(path: Path, text: str) -> None:
    """Write ``path`` under a temporary name, sync it to the disk and rename it."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    with temporary.open("w") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    temporary.replace(path)


def as_json(tree: Any) -> str:
    return json.dumps(tree, indent=2, sort_keys=True) + "\n"


def as_csv(rows: Sequence[Mapping[str, Any]], columns: Sequence[str] = ()) -> str:
    """A header and a line for each row: all of the first row's keys, which the others share, or only ``columns``."""
    text = io.StringIO()
    keys = columns or list(rows[0] if rows else ())
    writer = csv.DictWriter(text, keys, extrasaction="ignore" if columns else "raise", lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return text.getvalue()


def as_yaml(tree: Any) -> str:
    from omegaconf import OmegaConf

    return OmegaConf.to_yaml(OmegaConf.create(tree))


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """The records of a metrics.jsonl, in order; [] if there is none."""
    records = []
    for line in path.read_text().splitlines() if path.exists() else []:
        try:
            records.append(json.loads(line))
        except json.JSONDecodeError:
            break  # only the last line can be cut: lines are appended whole
    return records
