"""The parts of the watchdog on real ranks over gloo: who is named, with which code all of them end."""

import os
import signal
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from forks import Ended, on_ranks

from toolkit.errors import BUG, LOST, OutOfMemory, Stopped
from toolkit.job import ranks, watchdog

LOST_SECONDS = 1.0  # beats are then 0.2 s apart


def ended(tmp_path: Path, body: Callable[[int], None]) -> list[Ended]:
    """How two ranks end that do ``body(rank)`` under the watchdog; what is for the terminal begins with ``say:``."""

    def work(rank: int) -> None:
        with watchdog.watching(lambda text: print(f"say: {text}", flush=True), LOST_SECONDS):
            body(rank)

    return on_ranks(2, tmp_path, work)


def codes(found: list[Ended]) -> list[int]:
    return [e.code for e in found]


def test_ranks_that_end_well_end_without_a_word(tmp_path: Path) -> None:
    def body(rank: int) -> None:
        watchdog.expect(minutes=1, step=3)
        time.sleep(3 * LOST_SECONDS if rank else 0)  # rank 0 waits, and beats meanwhile: it is not lost
        watchdog.expect(None)

    found = ended(tmp_path, body)
    assert codes(found) == [0, 0]
    assert not any("say:" in e.printed for e in found)


def test_a_rank_that_makes_no_step_in_time_is_named_and_all_stacks_are_shown(tmp_path: Path) -> None:
    def body(rank: int) -> None:
        watchdog.expect(minutes=1, step=7)
        if rank == 1:
            watchdog.expect(minutes=0.01)
        stuck_here()

    found = ended(tmp_path, body)
    assert codes(found) == [LOST, LOST]
    (said,) = [line for line in found[0].printed.splitlines() if line.startswith("say:")]
    assert said.startswith("say: rank 1 on ")
    assert "made no step in time; the last was step 7." in said
    assert all("stuck_here" in e.printed for e in found)


def stuck_here() -> None:
    time.sleep(20)


def test_a_rank_that_asked_for_no_step_is_never_late(tmp_path: Path) -> None:
    def body(rank: int) -> None:
        watchdog.expect(minutes=0.01)
        watchdog.expect(None)
        time.sleep(2)

    assert codes(ended(tmp_path, body)) == [0, 0]


@pytest.mark.parametrize("victim", [0, 1])
def test_a_killed_rank_is_named_by_the_other(tmp_path: Path, victim: int) -> None:
    def body(rank: int) -> None:
        watchdog.expect(minutes=1, step=5)
        if rank == victim:
            time.sleep(1)  # the other has heard of step 5
            os.kill(os.getpid(), signal.SIGKILL)
        time.sleep(60)

    found = ended(tmp_path, body)
    assert found[victim].code == -signal.SIGKILL
    other = found[1 - victim]
    assert other.code == LOST
    assert f"rank {victim} on " in other.printed
    assert "killed (out of memory?)" in other.printed
    if victim == 1:
        assert "after step 5" in other.printed


def test_all_ranks_end_with_the_code_of_the_one_that_failed(tmp_path: Path) -> None:
    def body(rank: int) -> None:
        if rank == 1:
            raise OutOfMemory("no room for 3 GiB.")
        time.sleep(60)

    found = ended(tmp_path, body)
    assert codes(found) == [OutOfMemory.code] * 2
    assert "say: rank 1 on " in found[0].printed
    assert "no room for 3 GiB." in found[0].printed


def test_a_bug_on_one_rank_shows_its_traceback_on_rank_0s_terminal(tmp_path: Path) -> None:
    def body(rank: int) -> None:
        if rank == 1:
            raise KeyError("a bug of ours")
        time.sleep(60)

    found = ended(tmp_path, body)
    assert codes(found) == [BUG, BUG]
    assert "KeyError: 'a bug of ours'" in found[0].printed


def test_a_peer_that_is_gone_is_the_cause_and_not_the_error_it_leads_to(tmp_path: Path) -> None:
    def body(rank: int) -> None:
        if rank == 1:
            os.kill(os.getpid(), signal.SIGKILL)
        time.sleep(0.5)
        raise RuntimeError("[gloo] Connection closed by peer")

    found = ended(tmp_path, body)
    assert found[0].code == LOST
    assert "rank 1 on " in found[0].printed
    assert "last heard of" in found[0].printed


def test_the_first_verdict_counts(tmp_path: Path) -> None:
    def body(rank: int) -> None:
        dog = watchdog._current
        assert dog is not None
        dog.ended.set()  # its threads rest
        for turn in range(2):
            if rank == turn:
                dog._post(watchdog.Verdict(LOST + rank, f"of rank {rank}"))
                assert dog.verdict == watchdog.Verdict(LOST, "of rank 0")
            ranks.wait()

    found = ended(tmp_path, body)
    assert codes(found) == [0, 0], [e.printed for e in found]


def test_a_run_that_was_stopped_leaves_by_its_exception_once_all_have_come(tmp_path: Path) -> None:
    def work(rank: int) -> float:
        with pytest.raises(Stopped), watchdog.watching(print, LOST_SECONDS):
            time.sleep(rank)
            raise Stopped("saved")
        return time.monotonic()

    found = on_ranks(2, tmp_path, work)
    assert codes(found) == [0, 0]
    assert abs(found[0].result - found[1].result) < 0.9  # rank 0 holds the store: it does not leave a second early


def test_without_lost_seconds_nobody_watches(tmp_path: Path) -> None:
    def work(rank: int) -> bool:
        with watchdog.watching(print, None):
            return watchdog._current is None

    assert on_ranks(1, tmp_path, work)[0].result
