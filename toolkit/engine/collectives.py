"""What DeepSpeed's collectives send, and how long this rank waits for them.

traffic = Traffic()          # from now on every call of deepspeed.comm is counted
sent, seconds = traffic.read()

Bytes are those that a rank puts on the wire in a ring of n ranks, the convention of the ZeRO paper (section 7) and
of NCCL's bus bandwidth. Seconds are those that the computation is held up: the call, and the wait for one begun
asynchronously; on CUDA by events on the stream of the call, so that nothing is made to wait for the count. On a side
stream (overlap_comm) they are the collective's own, though computing may hide them.

DeepSpeed's comms_logger (0.19.8) is not used: it blocks the device after each call, it takes only the begin of an
asynchronous one, and its latency of a call is the sum of all since the start (timers(…).elapsed(reset=False)).
"""

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch.distributed import get_world_size

# Bytes sent per byte of the message, by the number of ranks.
WIRE: dict[str, Callable[[int], float]] = {
    **dict.fromkeys(("all_reduce", "all_reduce_coalesced", "inference_all_reduce"), lambda n: 2 * (n - 1) / n),
    **dict.fromkeys(("reduce_scatter", "reduce_scatter_tensor", "reduce", "broadcast"), lambda n: (n - 1) / n),
    **dict.fromkeys(("all_to_all", "all_to_all_single"), lambda n: (n - 1) / n),
    **dict.fromkeys(("all_gather", "all_gather_into_tensor", "all_gather_coalesced"), lambda n: n - 1),
    **dict.fromkeys(("send", "isend", "batch_isend_irecv"), lambda n: 1),
    **dict.fromkeys(("recv", "irecv", "barrier"), lambda n: 0),
}
_MESSAGE = ("input_tensor", "input_list", "input_tensors", "input_tensor_list", "input", "tensors", "tensor")


class Traffic:
    """Bytes and seconds since the last reading, of this rank. The newest one counts."""

    def __init__(self) -> None:
        import deepspeed.comm.comm as dist

        self.counting = True
        self.cuda = torch.cuda.is_available() and dist.cdb.get_backend() == "nccl"
        self.sent = self.seconds = 0.0
        self.events: list[tuple[Any, Any]] = []
        for name in WIRE:
            method = getattr(type(dist.cdb), name).__get__(dist.cdb)  # not one of an earlier Traffic
            setattr(dist.cdb, name, self._counted(name, method))

    def read(self) -> tuple[float, float]:
        """Bytes sent and seconds held up since the last call; waits for the device."""
        if self.cuda:
            torch.cuda.synchronize()
        result = self.sent, self.seconds + sum(begin.elapsed_time(end) for begin, end in self.events) / 1000
        self.sent, self.seconds, self.events = 0.0, 0.0, []
        return result

    @contextmanager
    def clock(self) -> Iterator[None]:
        """Add what happens inside to the seconds."""
        if not self.counting:
            yield
        elif self.cuda:
            begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))  # type: ignore[no-untyped-call]
            begin.record()
            yield
            end.record()
            self.events.append((begin, end))
        else:
            start = time.perf_counter()
            yield
            self.seconds += time.perf_counter() - start

    def _counted(self, name: str, method: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> Any:
            if self.counting and name != "barrier":
                group = kwargs.get("group", args[2] if len(args) > 2 else None)
                self.sent += WIRE[name](get_world_size(group)) * _size(_message(name, args, kwargs))
            with self.clock():
                work = method(*args, **kwargs)
            if isinstance(work, list):
                return [_Waited(w, self) for w in work]
            return _Waited(work, self) if hasattr(work, "wait") else work

        return call


class _Waited:
    """A handle of an asynchronous collective; waiting for it counts."""

    def __init__(self, work: Any, traffic: Traffic) -> None:
        self._work, self._traffic = work, traffic

    def wait(self, *args: Any) -> Any:
        with self._traffic.clock():
            return self._work.wait(*args)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._work, name)


def _message(name: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """What this rank gives to a collective: a tensor, a list of them, or of sends and receives."""
    found = next((kwargs[key] for key in _MESSAGE if key in kwargs), None)
    return found if found is not None else args[1 if name == "all_gather_coalesced" else 0]


def _size(message: Any) -> int:
    if isinstance(message, torch.Tensor):
        return message.nbytes
    return sum(_size(getattr(m, "tensor", m)) for m in message if getattr(m, "op", "isend") == "isend")
