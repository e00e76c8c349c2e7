"""Pipeline schedules keep their papers' promises, and their pictures show what the events say."""

import json
import re
from collections import Counter
from dataclasses import asdict, replace
from itertools import pairwise, product
from pathlib import Path
from typing import Any

import pytest
from deepspeed.runtime.pipe.schedule import ForwardPass, TrainSchedule

from toolkit.cli import main as cli
from toolkit.engine.pipe_events import Event, Timeline, bubble_share, formula, load, mean_seconds
from toolkit.engine.pipe_schedule import SCHEDULES, GPipeSchedule, ideal
from toolkit.errors import ConfigError, ToolkitError
from toolkit.report.timeline import draw

SIZES = [(s, m) for s in (1, 2, 3, 8) for m in (1, 2, 7, 16)]
EVERY = {n: [(s, m) for s, m in SIZES if n != "dualpipev" or m >= 2 * s] for n in SCHEDULES}
COSTS = [(1.0, 2.0), (2.0, 1.0)]


def instructions(name: str, stages: int, micro_batches: int, stage: int) -> list[Any]:
    return [i for step in SCHEDULES[name](micro_batches, stages, stage).steps() for i in step]


def in_flight(events: list[Event], stage: int) -> int:
    """The most micro-batches whose activations a stage holds at once."""
    held, most = 0, 0
    for event in sorted((e for e in events if e.stage == stage), key=lambda e: e.start):
        held += 1 if event.kind == "forward" else -1
        most = max(most, held)
    return most


def route(stages: int, phases: int) -> list[tuple[int, int]]:
    """(phase, stage) in the order in which a forward passes them."""
    return [(0, s) for s in range(stages)] + [(1, s) for s in reversed(range(stages))][: stages * (phases - 1)]


# The schedules


@pytest.mark.parametrize("name", ["1f1b", "gpipe"])
def test_the_bubble_is_the_formula_of_the_paper(name: str) -> None:
    for (stages, micro_batches), (forward, backward) in product(SIZES, COSTS):
        share = bubble_share(ideal(name, stages, micro_batches, forward=forward, backward=backward), stages)
        assert share == pytest.approx(formula(stages, micro_batches), abs=1e-9), (stages, micro_batches)


def test_the_formula_is_the_one_of_gpipe() -> None:
    assert formula(4, 8) == pytest.approx(3 / 11)
    assert formula(1, 5) == 0


def test_dualpipev_idles_as_its_authors_say_without_deferred_weight_gradients() -> None:
    """(PP/2 - 1) (F&B + B - 3W) in DualPipe's README, and DualPipeV is its half: PP = 2 S parts on S ranks.

    Here F&B = F + B and W = 0, and one forward less: measured, for backwards of two forwards.
    """
    for stages, micro_batches in [(2, 4), (2, 16), (3, 6), (4, 8), (4, 11), (8, 16), (8, 32)]:
        part = {"forward": 1.0, "backward": 2.0}
        events = ideal("dualpipev", stages, micro_batches, forward=2 * part["forward"], backward=2 * part["backward"])
        idle = max(e.end for e in events) - 2 * micro_batches * sum(part.values())
        assert idle == pytest.approx((stages - 1) * (part["forward"] + 2 * part["backward"]) - part["forward"])
        assert bubble_share(events, stages) < formula(stages, micro_batches)


@pytest.mark.parametrize("name", ["1f1b", "gpipe"])
def test_gpipe_holds_every_micro_batch_and_1f1b_one_for_each_stage(name: str) -> None:
    for stages, micro_batches in SIZES:
        held = [in_flight(ideal(name, stages, micro_batches), s) for s in range(stages)]
        ahead = [micro_batches if name == "gpipe" else min(stages - s, micro_batches) for s in range(stages)]
        assert held == ahead
        buffers = [SCHEDULES[name](micro_batches, stages, s).num_pipe_buffers() for s in range(stages)]
        assert buffers == [max(2, n) for n in ahead]


@pytest.mark.parametrize("name", SCHEDULES)
def test_each_pass_runs_once_and_after_all_that_it_needs(name: str) -> None:
    for stages, micro_batches in EVERY[name]:
        events = ideal(name, stages, micro_batches)
        way = route(stages, 2 if name == "dualpipev" else 1)
        assert Counter((e.kind, e.phase, e.stage, e.micro_batch) for e in events) == dict.fromkeys(
            [(k, p, s, m) for k in ("forward", "backward") for p, s in way for m in range(micro_batches)], 1
        )
        at = {(e.kind, e.phase, e.stage, e.micro_batch): e for e in events}
        for m in range(micro_batches):
            path = [at["forward", p, s, m] for p, s in way] + [at["backward", p, s, m] for p, s in reversed(way)]
            assert all(a.end <= b.start for a, b in pairwise(path)), (stages, micro_batches)
        for stage in range(stages):
            mine = sorted((e.start, e.end) for e in events if e.stage == stage)
            assert all(a[1] <= b[0] for a, b in pairwise(mine)), (stages, micro_batches)


@pytest.mark.parametrize("name", ["1f1b", "gpipe"])
def test_blocking_messages_never_wait_in_a_circle(name: str) -> None:
    """Both ends of a message stand still until the other end is there, as in DeepSpeed's p2p."""
    for stages, micro_batches in EVERY[name]:
        assert_no_circle(name, stages, micro_batches)


def assert_no_circle(name: str, stages: int, micro_batches: int) -> None:
    messages = {"SendActivation": ("RecvActivation", 1), "SendGrad": ("RecvGrad", -1)}
    ends = {*messages, *(receive for receive, _ in messages.values())}
    left = [[i.name for i in instructions(name, stages, micro_batches, s) if i.name in ends] for s in range(stages)]
    while any(left):
        met = [
            (stage, stage + step)
            for stage in range(stages)
            for send, (receive, step) in messages.items()
            if left[stage][:1] == [send] and left[stage + step][:1] == [receive]
        ]
        assert met, f"deadlock: {[todo[:1] for todo in left]}"
        for stage in (s for pair in met for s in pair):
            left[stage].pop(0)


@pytest.mark.parametrize("stages", [1, 2, 4])
def test_gpipe_does_what_1f1b_does_in_another_order(stages: int) -> None:
    """The same instructions as often, the same micro-batch order of each kind, and the same end of the step."""
    for stage in range(stages):
        ours, theirs = (instructions(name, stages, 8, stage) for name in ("gpipe", "1f1b"))
        assert Counter(i.name for i in ours) == Counter(i.name for i in theirs)
        assert [i.name for i in ours[-3:]] == [i.name for i in theirs[-3:]]
        assert [i.buffer_id for i in ours if i.name == "BackwardPass"] == list(range(8))
        fetched = [ours[n + 1] for n, i in enumerate(ours) if i.name == "LoadMicroBatch"]
        assert all(isinstance(i, ForwardPass) for i in fetched)
    assert GPipeSchedule(8, stages, 0).num_pipe_buffers() == 8
    assert SCHEDULES["1f1b"] is TrainSchedule


def test_costs_are_those_of_all_that_a_rank_holds() -> None:
    for name in SCHEDULES:
        events = ideal(name, 2, 4, forward=3.0, backward=5.0)
        assert sum(e.end - e.start for e in events if e.kind == "forward") == pytest.approx(2 * 4 * 3.0)
        assert sum(e.end - e.start for e in events if e.kind == "backward") == pytest.approx(2 * 4 * 5.0)


@pytest.mark.parametrize(
    ("name", "stages", "micro_batches", "message"),
    [
        ("1fb1", 4, 8, "schedule=1fb1: no such pipeline schedule. Did you mean '1f1b'?"),
        ("dualpipev", 4, 7, "Use at least 8 micro-batches, or 1f1b."),
        ("gpipe", 0, 8, "stages=0, micro_batches=8"),
        ("gpipe", 2, 0, "stages=2, micro_batches=0"),
    ],
)
def test_what_no_schedule_can_do_is_refused(name: str, stages: int, micro_batches: int, message: str) -> None:
    with pytest.raises(ConfigError, match=re.escape(message)):
        ideal(name, stages, micro_batches)


# The file of a run


def measured(name: str = "1f1b", stages: int = 2, micro_batches: int = 4) -> dict[str, Any]:
    """A run as its engine writes it."""
    events = [asdict(e) for e in ideal(name, stages, micro_batches, forward=0.02, backward=0.04)]
    return {"schedule": name, "stages": stages, "micro_batches": micro_batches, "step": 20, "events": events}


def without_an_event(tree: dict[str, Any]) -> None:
    del tree["events"][5]


def without_the_last(tree: dict[str, Any]) -> None:
    tree["events"].remove(max(tree["events"], key=lambda e: (e["stage"], e["kind"], e["micro_batch"])))


def one_twice(tree: dict[str, Any]) -> None:
    tree["events"][5] = tree["events"][4]


def overlapping(tree: dict[str, Any]) -> None:
    tree["events"][0]["end"] += 0.01


def endless(tree: dict[str, Any]) -> None:
    tree["events"][0]["end"] = float("nan")


def without_time(tree: dict[str, Any]) -> None:
    tree["events"][0]["end"] = tree["events"][0]["start"]


def sideways(tree: dict[str, Any]) -> None:
    tree["events"][0]["kind"] = "sideways"


def unknown_schedule(tree: dict[str, Any]) -> None:
    tree["schedule"] = "zigzag"


def test_a_file_is_read_as_it_was_written(tmp_path: Path) -> None:
    path = tmp_path / "timeline.json"
    path.write_text(json.dumps(measured("dualpipev")))
    timeline = load(path)
    assert timeline.events == tuple(ideal("dualpipev", 2, 4, forward=0.02, backward=0.04))
    assert (mean_seconds(timeline, "forward"), mean_seconds(timeline, "backward")) == pytest.approx((0.02, 0.04))
    path.write_text(timeline.model_dump_json())
    assert load(path) == timeline


def test_clocks_may_differ_by_a_few_microseconds() -> None:
    tree = measured()
    tree["events"][0]["end"] += 2e-6
    assert Timeline.model_validate(tree).stages == 2


@pytest.mark.parametrize(
    ("broken", "message"),
    [
        (without_an_event, "15 events where 1f1b has 16 passes"),
        (without_the_last, "15 events where 1f1b has 16 passes. Let"),
        (one_twice, "16 events where 1f1b has 16 passes; the first that is odd: stage "),
        (overlapping, "stage 0 has passes that overlap or take no time"),
        (without_time, "stage 0 has passes that overlap or take no time"),
        (endless, "events.0.end: Input should be a finite number"),
        (sideways, "events.0.kind: Input should be 'forward' or 'backward'"),
        (unknown_schedule, "schedule: Input should be '1f1b', 'gpipe' or 'dualpipev'"),
    ],
)
def test_a_broken_file_is_refused_in_one_line(broken: Any, message: str, tmp_path: Path) -> None:
    tree = measured()
    broken(tree)
    path = tmp_path / "timeline.json"
    path.write_text(json.dumps(tree))
    with pytest.raises(ToolkitError, match=re.escape(message)) as refused:
        load(path)
    assert str(refused.value).startswith(str(path)) and "\n" not in str(refused.value)


@pytest.mark.parametrize("text", ["", "{", "[]", '{"schedule": "1f1b"}', "\x00"])
def test_what_is_no_timeline_is_refused_in_one_line(text: str, tmp_path: Path) -> None:
    path = tmp_path / "timeline.json"
    path.write_text(text)
    with pytest.raises(ToolkitError) as refused:
        load(path)
    assert "\n" not in str(refused.value)


# The picture


def svg_texts(path: Path) -> list[str]:
    """What the figure says: matplotlib draws letters as paths and keeps each text as a comment."""
    return re.findall(r"<!-- (.*?) -->", path.read_text())


def test_a_picture_shows_every_micro_batch_on_every_stage_and_the_bubbles(tmp_path: Path) -> None:
    timelines = {"GPipe": ideal("gpipe", 4, 8), "DualPipeV": ideal("dualpipev", 4, 8)}
    png, svg = draw(timelines, tmp_path / "deep" / "v1.2", title="four stages", unit="units")
    assert (png.name, svg.name) == ("v1.2.png", "v1.2.svg")
    assert png.read_bytes().startswith(b"\x89PNG")
    texts = svg_texts(svg)
    assert texts.count("7") == 4 * 2 + 4 * 4
    assert texts.count("stage 3") == 2
    assert "GPipe: 27.3 % bubbles; (S−1)/(M+S−1) = 27.3 %" in texts
    assert "DualPipeV: 22.6 % bubbles; 1F1B: 27.3 %" in texts
    assert {"four stages", "time (units)", "forward, second half", "bubble"} <= set(texts)
    assert sorted(p.name for p in png.parent.iterdir()) == ["v1.2.png", "v1.2.svg"]


def test_a_panel_begins_with_its_first_pass(tmp_path: Path) -> None:
    events = ideal("1f1b", 2, 4)
    later = [replace(e, start=e.start + 8, end=e.end + 8) for e in events]
    first, second = (
        draw({"1F1B": e}, tmp_path / name, title="t", unit="units")[0] for e, name in [(events, "a"), (later, "b")]
    )
    assert first.read_bytes() == second.read_bytes()


def test_numbers_too_large_for_their_boxes_are_left_out(tmp_path: Path) -> None:
    _, svg = draw({"GPipe": ideal("gpipe", 2, 128)}, tmp_path / "t", title="many", unit="units")
    assert "127" not in svg_texts(svg)


def test_the_command_draws_a_run_below_its_schedule(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("DS_ACCELERATOR", "cpu")
    tree = measured()
    for event in tree["events"]:  # the step has begun long before, and the last backward takes longer
        event["start"], event["end"] = event["start"] + 5, event["end"] + 5
    last = max(tree["events"], key=lambda e: e["end"])
    last["end"] += 0.1
    (tmp_path / "timeline.json").write_text(json.dumps(tree))
    cli.main(["timeline", str(tmp_path)])
    busy, seconds = 2 * 4 * 0.06 + 0.1, 5 * 0.06 + 0.1
    equal = 5 * (0.06 + 0.1 / 8)  # (M + S - 1) passes of the mean time
    said = capsys.readouterr().out
    assert f"1F1B, stages of equal speed: 20.0 % bubbles in {equal:.4g} s" in said
    assert f"1F1B, measured: {100 * (1 - busy / 2 / seconds):.1f} % bubbles in {seconds:.4g} s" in said
    texts = svg_texts(tmp_path / "timeline.svg")
    assert f"{tmp_path.name}, step 20: 2 stages, 4 micro-batches" in texts
    assert (tmp_path / "timeline.png").stat().st_size > 1000


def test_the_command_draws_the_schedules_that_the_numbers_allow(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("DS_ACCELERATOR", "cpu")
    monkeypatch.chdir(tmp_path)
    cli.main(["timeline"])
    assert capsys.readouterr().out.splitlines()[:3] == [
        "1F1B: 27.3 % bubbles",
        "GPipe: 27.3 % bubbles",
        "DualPipeV: 22.6 % bubbles",
    ]
    assert (tmp_path / "timeline.png").exists()
    cli.main(["timeline", "--stages", "2", "--micro-batches", "2", "--out", "fig.png"])
    assert "Left out: schedule=dualpipev with 2 stages and 2 micro-batches" in capsys.readouterr().out
    assert (tmp_path / "fig.png").exists() and (tmp_path / "fig.svg").exists()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["runs/none"], "runs/none/timeline.json: no such file"),
        (["runs/none", "--stages", "2"], "give a run or these options, not both"),
        (["--schedule", "dualpipev", "--micro-batches", "4"], "Use at least 8 micro-batches"),
        (["--stages", "0"], "stages=0, micro_batches=8: a pipeline needs at least one of each"),
    ],
)
def test_the_command_refuses_in_one_line(
    arguments: list[str],
    message: str,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("DS_ACCELERATOR", "cpu")
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as stopped:
        cli.main(["timeline", *arguments])
    assert stopped.value.code == 2
    said = capsys.readouterr().err
    assert message in said and said.count("\n") == 1
