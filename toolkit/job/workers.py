"""Where the processes that draw data come from: a server without threads, started before this process has any.

    begin()                                      # early: it imports what workers need while this process does the same
    DataLoader(…, multiprocessing_context="forkserver")

Forked from a rank instead, a worker now and then stood still in CPython's own PyOS_AfterFork_Child and the rank
waited for its first batch for ever: a rank has the threads of gloo, of autograd and of its monitors.
"""

import multiprocessing
import signal
from multiprocessing import forkserver, resource_tracker

PRELOADED = ("loader", "masked", "labelled", "parallel", "regression")


def begin() -> None:
    """Start the server, unless it runs already. It ends with this process; signals to all of a job leave it alone."""
    multiprocessing.set_forkserver_preload([f"toolkit.data.{name}" for name in PRELOADED])
    resource_tracker.ensure_running()  # else the server starts it, and that unblocks SIGTERM
    # Blocked in the server, in its workers and in all their threads; SIGINT it ignores itself.
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})
    try:
        forkserver.ensure_running()
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)
