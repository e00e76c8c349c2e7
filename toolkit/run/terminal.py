"""The terminal, which is rank 0's own; what else a process prints goes to its log.

with Terminal() as terminal:
    terminal.console.print("for the person")
    terminal.log_to(Path("log.rank0.txt"))      # whatever DeepSpeed prints
"""

import logging
import os
import shutil
import sys
import tempfile
import traceback
from contextlib import suppress
from pathlib import Path

from rich.console import Console

from toolkit.errors import ToolkitError
from toolkit.job import ranks


class Terminal:
    """Keeps the terminal for rank 0's own words; all other output of this process goes to its log.

    Redirects the file descriptors, not sys.stdout: DeepSpeed's C++ code prints too. What is printed
    before the run directory exists is spooled and then copied to the head of the log.
    """

    current: "Terminal | None" = None

    def __init__(self, *, quiet: bool = True) -> None:
        self.quiet = quiet
        self.console = Console(quiet=ranks.rank() != 0, soft_wrap=True)

    def __enter__(self) -> "Terminal":
        Terminal.current = self
        if self.quiet:
            self._saved = (os.dup(1), os.dup(2))
            self.console.file = os.fdopen(os.dup(1), "w", buffering=1)
            self._spool = tempfile.TemporaryFile()
            self._redirect(self._spool.fileno())
            logging.captureWarnings(True)
            logging.basicConfig(format="%(asctime)s %(name)s %(levelname)s %(message)s", stream=sys.stderr)
        return self

    def log_to(self, path: Path) -> None:
        """Send this process's output to ``path``, beginning with what was spooled."""
        if not self.quiet:
            return
        _flush()
        self._spool.seek(0)
        with path.open("ab") as log:
            shutil.copyfileobj(self._spool, log)
            log.flush()
            self._redirect(log.fileno())

    def __exit__(self, kind: object, error: BaseException | None, trace: object) -> None:
        Terminal.current = None
        if not self.quiet:
            return
        if error is not None and not isinstance(error, ToolkitError | SystemExit):
            traceback.print_exception(error)  # into the log; the caller shows it on the terminal
        _flush()
        for number, saved in zip((1, 2), self._saved, strict=True):
            os.dup2(saved, number)
            os.close(saved)
        self._spool.close()

    def say(self, text: str) -> None:
        """An error on the real standard error, from any thread; the process may end right after."""
        lines = "".join(f"error: {line}\n" for line in text.splitlines())
        with suppress(OSError):  # the terminal may be given back just now
            os.write(self._saved[1] if self.quiet else 2, lines.encode())

    @staticmethod
    def _redirect(target: int) -> None:
        _flush()
        os.dup2(target, 1)
        os.dup2(target, 2)


def _flush() -> None:
    sys.stdout.flush()
    sys.stderr.flush()
