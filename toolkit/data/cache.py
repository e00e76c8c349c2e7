"""Cached folders: built once under a lock, named by what they depend on, complete or absent.

    folder = build(cache, f"corpus-{fingerprint(sources, tokenizer)}", write)

A folder of that name is complete and never changes again; deleting it is always safe.
"""

import hashlib
import json
import logging
import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

log = logging.getLogger(__name__)
FORMAT = 2  # raise it when the meaning of any cached file changes


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
    with _locked(cache / f"{name}.lock"):
        for leftover in cache.glob(f"{name}.building-*"):  # under the lock, so its process is dead
            shutil.rmtree(leftover)
        if not folder.is_dir():
            _stage(folder, write)
    return folder


@contextmanager
def _locked(path: Path) -> Iterator[None]:
    """The lock is the operating system's, so that of a killed process is free."""
    lock = FileLock(path)
    try:
        lock.acquire(timeout=0)
    except Timeout:
        log.warning("waiting for another process that is preparing %s", path.with_suffix(""))
        lock.acquire()
    try:
        yield
    finally:
        lock.release()


def _stage(folder: Path, write: Callable[[Path], None]) -> None:
    staging = folder.with_name(f"{folder.name}.building-{os.getpid()}")
    staging.mkdir()
    try:
        write(staging)
        for path in (path for path in staging.rglob("*") if path.is_file()):
            with path.open("rb") as file:
                os.fsync(file.fileno())  # the name must not outlive a power cut that the content does not
        staging.replace(folder)
    finally:
        shutil.rmtree(staging, ignore_errors=True)
