"""Cached folders: built once under a lock, named by what they depend on, complete or absent.

folder = build(cache, f"corpus-{fingerprint(sources, tokenizer)}", write)
"""

import hashlib
import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

from filelock import FileLock

FORMAT = 1  # raise it when the meaning of any cached file changes


def fingerprint(*parts: Any) -> str:
    """Sixteen hex digits of everything a folder depends on; the parts must be JSON."""
    text = json.dumps([FORMAT, *parts], sort_keys=True)
    return hashlib.blake2b(text.encode(), digest_size=8).hexdigest()


def build(cache: Path, name: str, write: Callable[[Path], None]) -> Path:
    """The folder ``cache/name``, made by ``write(staging)`` if it is not there yet.

    The folder appears by one rename, so a killed build leaves only a staging folder, which the
    next build removes; other processes wait for the lock and then find the folder.
    """
    folder = cache / name
    if folder.is_dir():
        return folder
    cache.mkdir(parents=True, exist_ok=True)
    with FileLock(cache / f"{name}.lock"):
        for leftover in cache.glob(f"{name}.building-*"):  # under the lock, so its process is dead
            shutil.rmtree(leftover)
        if not folder.is_dir():
            _stage(folder, write)
    return folder


def _stage(folder: Path, write: Callable[[Path], None]) -> None:
    staging = folder.with_name(f"{folder.name}.building-{os.getpid()}")
    staging.mkdir()
    try:
        write(staging)
        staging.replace(folder)
    finally:
        shutil.rmtree(staging, ignore_errors=True)
