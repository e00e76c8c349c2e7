"""Ends a job that no longer moves, and says which rank on which host it was.

    with watchdog.watching(say, lost_seconds=120):     # around a recipe's work, once the ranks have joined
        watchdog.expect(minutes=30)                    # the next step is due by then; None: nothing is

A rank that fails leaves its peers in a collective for ever, and so does a host whose link is cut: the timeouts of
process groups do not reach all of DeepSpeed's, and gloo's was seen not to fire. So every rank beats, by a thread, in
the store at MASTER_ADDR:MASTER_PORT; rank 0 listens. The first to fail, to hang or to fall silent is written there as
the job's verdict, and all ranks end with its code.
"""

import faulthandler
import itertools
import json
import os
import platform
import re
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass
from datetime import timedelta
from typing import Any

from toolkit.errors import BUG, LOST, Stopped, ToolkitError, go_on
from toolkit.job import ranks

# What a rank raises when a peer has gone: not the cause.
PEER = re.compile(r"gloo|nccl|connection (closed|reset|refused)|broken pipe", re.IGNORECASE)
GONE = (
    "{who}: last heard of {seconds:.0f} s ago{step}. The process was killed (out of memory?), or its host or link is "
    "down{log}. {go_on}"
)
LAST_LINES = 12  # of a traceback, for the launcher's terminal


@dataclass(frozen=True)
class Verdict:
    """Why the job ends: its exit code, words for the terminal, and whether stacks tell more."""

    code: int
    text: str
    stacks: bool = False


_current: "Watchdog | None" = None


def expect(minutes: float | None, step: int | None = None) -> None:
    """The next call is due in ``minutes``; later, this rank hangs. None: no longer. ``step``: where the rank is."""
    faulthandler.cancel_dump_traceback_later()
    if _current is not None:
        _current.due = None if minutes is None else time.monotonic() + minutes * 60
        _current.step = _current.step if step is None else step
    if minutes is not None:  # should our thread not run: a C extension can hang with Python's lock held; exit code 1
        later = 4 * _current.lost_seconds if _current else 0
        faulthandler.dump_traceback_later(minutes * 60 + later, exit=True)


@contextmanager
def watching(say: Callable[[str], None], lost_seconds: float | None) -> Iterator[None]:
    """Watch the ranks, which have joined, meanwhile; ``say`` writes to the terminal. None: no watch."""
    global _current
    if lost_seconds is None:
        yield
        return
    _current = dog = Watchdog(say, lost_seconds)
    stopped = None
    try:
        try:
            yield
        except Stopped as stop:
            stopped = stop
        ranks.wait()  # rank 0 holds the store: it leaves last
    except Exception as error:
        dog.failed(error)
        raise
    dog.ended.set()
    _current = None
    if stopped:
        raise stopped


class Watchdog:
    """Two threads: one talks to the store and may be stuck there, the other looks at the clock."""

    def __init__(self, say: Callable[[str], None], lost_seconds: float) -> None:
        import torch.distributed

        dist: Any = torch.distributed  # the stores are not in its stubs
        address, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
        # A client of its own: the process group's is locked while a rank waits in it.
        store = dist.TCPStore(address, port, is_master=False, timeout=timedelta(seconds=lost_seconds))
        # torchrun's store outlives its attempts, and its agents count them differently.
        self.store = dist.PrefixStore(ranks.from_rank0(os.urandom(4).hex()), store)
        self.say, self.lost_seconds, self.interval = say, lost_seconds, min(2.0, lost_seconds / 5)
        self.name = f"rank {ranks.rank()} on {platform.node()}"
        self.due: float | None = None
        self.step = 0
        self.heard, self.word = time.monotonic(), b""  # when rank 0 was last heard of, and its beat then
        self.verdict: Verdict | None = None
        self.beats: list[tuple[str, float]] = []  # of every rank: its last beat, and when rank 0 first saw it
        self.hosts: list[str] = ranks.gathered(platform.node())
        self.ended, self.leaving = threading.Event(), threading.Lock()
        self.store.set(f"beat{ranks.rank()}", "0 0")  # its number, and the step
        ranks.wait()
        for work in (self._talk, self._watch):
            threading.Thread(target=work, daemon=True, name=f"watchdog{work.__name__}").start()

    def _talk(self) -> None:
        for number in itertools.count(1):
            if self.ended.wait(self.interval):
                return
            with suppress(RuntimeError):  # the store is gone; _watch knows how long
                self.store.set(f"beat{ranks.rank()}", f"{number} {self.step}")
                if ranks.rank() == 0:
                    self._listen()
                if self.store.check(["verdict"]):
                    self.verdict = Verdict(**json.loads(self.store.get("verdict")))
                if (word := self.store.get("beat0")) != self.word:  # the store may be torchrun's, and rank 0 dead
                    self.heard, self.word = time.monotonic(), word

    def _listen(self) -> None:
        beats = [b.decode() for b in self.store.multi_get([f"beat{r}" for r in range(ranks.world())])]
        now, before = time.monotonic(), self.beats or [("", 0.0)] * len(beats)
        self.beats = [old if old[0] == beat else (beat, now) for old, beat in zip(before, beats, strict=True)]
        patience = 2.5 * self.interval if self.store.check(["suspect"]) else self.lost_seconds
        silent = [r for r, (_, since) in enumerate(self.beats) if now - since > patience]
        if silent:
            silent.sort(key=lambda r: self.beats[r][1])  # the longest first
            told = ", ".join(f"rank {r} on {self.hosts[r]}" for r in silent[:8])
            told += f" and {len(silent) - 8} more" if len(silent) > 8 else ""
            beat, since = self.beats[silent[0]]
            step, log = f", after step {beat.split()[1]}", "; its log.rankN.txt may tell more"
            self._post(Verdict(LOST, GONE.format(who=told, seconds=now - since, step=step, log=log, go_on=go_on())))

    def _watch(self) -> None:
        while not self.ended.wait(min(0.5, self.interval)):
            silence = time.monotonic() - self.heard
            if self.verdict is None and self.due is not None and time.monotonic() > self.due:
                hung = Verdict(LOST, f"{self.name} made no step in time; the last was step {self.step}.", stacks=True)
                self._soon(lambda: self._post(hung))  # noqa: B023
                self.verdict = self.verdict or hung
            elif self.verdict is None and silence > self.lost_seconds:
                self.verdict = self._without_rank0(silence)
            if self.verdict is not None:
                self._leave(self.verdict)

    def _post(self, verdict: Verdict) -> None:
        """The first verdict counts."""
        text = self.store.compare_set("verdict", "", json.dumps(asdict(verdict)))
        self.verdict = Verdict(**json.loads(text))

    def _without_rank0(self, silence: float) -> Verdict:
        """Nobody else will say it."""
        who = f"{self.name} does not reach the store at" if ranks.rank() == 0 else f"rank 0 on {self.hosts[0]},"
        who += f" {os.environ['MASTER_ADDR']}"
        verdict = Verdict(LOST, GONE.format(who=who, seconds=silence, step="", log="", go_on=go_on()))
        if ranks.rank() != 0:
            self.say(f"{self.name}: {verdict.text}")
        return verdict

    def failed(self, error: Exception) -> None:
        """Tell the others why this rank ends. Returns where the rank shall tell it by itself."""
        code = error.code if isinstance(error, ToolkitError) else BUG
        lines = "".join(traceback.format_exception(error)).rstrip().splitlines()
        text = "\n".join(lines[-LAST_LINES:]) if code == BUG else str(error)
        mine = Verdict(code, f"{self.name} failed:\n{text}")
        if code != BUG and ranks.rank() != 0:
            ranks.until(lambda: self.verdict is not None, 2 * self.interval)  # what all ranks refuse, rank 0 says
        elif PEER.search(str(error)):
            self._soon(lambda: self.store.set("suspect", self.name))
            ranks.until(lambda: self.verdict is not None, 5 * self.interval)
            silence = time.monotonic() - self.heard
            if self.verdict is None and ranks.rank() != 0 and silence > 2.5 * self.interval:
                self.verdict = self._without_rank0(silence)
        if self.verdict is None:
            self.ended.set()  # this thread leaves, not _watch
            self._soon(lambda: self._post(mine))
        verdict = self.verdict or mine
        if verdict != mine or ranks.rank() != 0:
            print("\n".join(lines), file=sys.stderr, flush=True)  # into this rank's log
            self._leave(verdict)
        self._soon(self._acknowledge, 4 * self.interval)

    def _leave(self, verdict: Verdict) -> None:
        self.leaving.acquire()  # and never released: of two threads that leave, one speaks
        if verdict.stacks:
            print(verdict.text, file=sys.stderr, flush=True)
            faulthandler.dump_traceback(all_threads=True)
        self._soon(self._acknowledge, 4 * self.interval)
        if ranks.rank() == 0:
            self.say(verdict.text + (" Where every rank stood is in log.rank*.txt." if verdict.stacks else ""))
        else:
            time.sleep(1)  # a launcher ends all ranks once one has left: rank 0 shall have spoken by then
        os._exit(verdict.code)

    def _acknowledge(self) -> None:
        """Rank 0 may hold the store: it stays until all have read the verdict."""
        self.store.add("seen", 1)
        ranks.until(lambda: self.store.add("seen", 0) >= ranks.world(), 3 * self.interval)

    def _soon(self, work: Callable[[], Any], seconds: float | None = None) -> None:
        """``work`` with the store, which may never answer."""

        def quietly() -> None:
            with suppress(RuntimeError):
                work()

        thread = threading.Thread(target=quietly, daemon=True)
        thread.start()
        thread.join(seconds or self.interval)
