"""The step's sums over micro-batches and ranks against plain torch on the whole batch; DeepSpeed's part is played."""

from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from forks import on_ranks
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from toolkit.data.batch import IGNORED, Batch
from toolkit.engine.pipe import fill_and_drain
from toolkit.engine.pipe_schedule import PASSES
from toolkit.engine.plain import Engine
from toolkit.job.ranks import Replica
from toolkit.tasks.task import summed_loss

SAMPLES, MICRO = 16, 4
UNIT = 10.0


class Played:
    """As much of DeepSpeed as a step needs: it divides by the accumulation, and averages over the copies."""

    device = "cpu"

    def __init__(self, model: nn.Module, accumulation: int, copies: int) -> None:
        self.model, self.accumulation, self.copies = model, accumulation, copies
        self.eval, self.train, self.done = model.eval, model.train, 0

    def gradient_accumulation_steps(self) -> int:
        return self.accumulation

    def get_lr(self) -> list[float]:
        return [0.1]

    def __call__(self, x: Tensor) -> dict[str, Tensor]:
        return {"logits": self.model(x)}

    def backward(self, loss: Tensor) -> None:
        (loss / self.accumulation).backward()  # type: ignore[no-untyped-call]

    def step(self) -> None:
        self.done += 1
        for p in self.model.parameters() if self.done == self.accumulation and self.copies > 1 else ():
            assert p.grad is not None
            torch.distributed.all_reduce(p.grad)
            p.grad /= self.copies


def model() -> nn.Module:
    torch.manual_seed(0)
    return nn.Linear(4, 3)


def data() -> Batch:
    """Predictions are unevenly spread: the first micro-batch has one, the second three, …"""
    draws = torch.Generator().manual_seed(1)
    labels = torch.randint(3, (SAMPLES,), generator=draws)
    labels[torch.tensor([1, 2, 3, 6, 12, 13])] = IGNORED
    return {"x": torch.randn(SAMPLES, 4, generator=draws), "y": labels}


def task() -> Any:
    return SimpleNamespace(
        inputs=("x",),
        predicted=("word",),
        judged=("word",),
        unit=UNIT,
        losses=lambda outputs, batch: {"word": summed_loss(outputs["logits"], batch["y"])},
        correct=lambda outputs, batch: {"word": (outputs["logits"].argmax(-1) == batch["y"]).sum()},
        counts=lambda batch: {"word": float((batch["y"] != IGNORED).sum()), "sequences": float(len(batch["y"]))},
    )


def micro_batches(part: int, parts: int) -> Iterator[Batch]:
    for start in range(part * MICRO, SAMPLES, MICRO * parts):
        yield {name: tensor[start : start + MICRO] for name, tensor in data().items()}


def whole_batch() -> tuple[float, Tensor]:
    """Mean loss and gradient of all predictions at once."""
    net, batch = model(), data()
    loss = cross_entropy(net(batch["x"]), batch["y"])  # a mean over what is not -100
    loss.backward()  # type: ignore[no-untyped-call]
    return float(loss.detach()), next(net.parameters()).grad  # type: ignore[return-value]


@pytest.mark.parametrize(("world", "copies"), [(1, 1), (2, 2), (2, 1)], ids=["alone", "two copies", "one split copy"])
def test_a_step_is_that_of_the_whole_batch_however_it_is_divided(world: int, copies: int, tmp_path: Path) -> None:
    def work(rank: int) -> Any:
        net, part = model(), rank % copies
        engine = Engine(Played(net, SAMPLES // MICRO // copies, copies), task(), Replica(part, copies, world // copies))
        step = engine.train_batch(micro_batches(part, copies))
        return float(step.losses["word"]), step.counts, next(net.parameters()).grad

    ended = on_ranks(world, tmp_path, work)
    assert {e.code for e in ended} == {0}, [e.printed for e in ended]
    loss, gradient = whole_batch()
    assert sum(e.result[0] for e in ended) == pytest.approx(UNIT * loss), "shares of the mean add up over the ranks"
    for one in ended:
        assert one.result[1] == {"word": 10, "sequences": SAMPLES}
        torch.testing.assert_close(one.result[2], gradient)


def test_held_out_means_are_over_all_ranks_whatever_each_has(tmp_path: Path) -> None:
    def work(rank: int) -> Any:
        mine = list(micro_batches(0, 1))[slice(1, None) if rank else slice(1)]  # one micro-batch, and three
        return Engine(Played(model(), 1, 2), task(), Replica(rank, 2, 1)).evaluate(iter(mine))

    ended = on_ranks(2, tmp_path, work)
    assert {e.code for e in ended} == {0}, [e.printed for e in ended]
    batch = data()
    right = (model()(batch["x"]).argmax(-1) == batch["y"]).sum()
    for one in ended:
        assert one.result["word_loss"] == one.result["loss"] == pytest.approx(UNIT * whole_batch()[0])
        assert one.result["word_accuracy"] == pytest.approx(float(right) / 10)


def test_all_ranks_stop_where_one_wants_to(tmp_path: Path) -> None:
    def work(rank: int) -> bool:
        engine = Engine(Played(model(), 2, 2), task(), Replica(rank, 2, 1))
        return engine.train_batch(micro_batches(rank, 2), stop=rank == 1).stop

    assert [e.result for e in on_ranks(2, tmp_path, work)] == [True, True]


def test_gpipe_goes_backward_from_the_loss_of_the_same_micro_batch() -> None:
    began: list[tuple[int, str]] = []

    def forward(engine: Any, buffer_id: int) -> None:
        engine.loss = f"loss {buffer_id}"

    def backward(engine: Any, buffer_id: int) -> None:
        began.append((buffer_id, engine.loss))

    ds = SimpleNamespace(loss=None, _INSTRUCTION_MAP=dict(zip(PASSES, (forward, backward), strict=True)))
    fill_and_drain(ds)
    for what in PASSES:  # fills, then drains
        for buffer in range(3):
            ds._INSTRUCTION_MAP[what](ds, buffer_id=buffer)
    assert began == [(n, f"loss {n}") for n in range(3)]
