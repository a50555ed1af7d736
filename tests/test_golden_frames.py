"""Frame choice against the indices that the two reference projects choose (fixtures F1 and F2)."""

import json
import os
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dataloaders.video import FrameSampling
from dataloaders.video.frames import order_frames
from dataloaders.video.rules import RULES

GOLDEN_DIR = Path(os.environ.get("GOLDEN_DIR", Path(__file__).parent / "golden"))


def rows_of(prefix):
    found = sorted(GOLDEN_DIR.glob(f"{prefix}*.json"))
    assert found, f"no fixture {prefix}*.json in {GOLDEN_DIR}"
    return [row for path in found for row in json.loads(path.read_text())["data"]]


def choose(rule, row):
    sampling = FrameSampling(rule, row["framerate"], row["max_frames"], row["slice_framepos"])
    return sampling.choose(row["fps"], row["frame_count"], row["start"], row["end"])


@pytest.mark.parametrize(("rule", "prefix", "at_least"), [("second", "F1", 50), ("stride", "F2", 50)])
def test_every_row_of_the_references(rule, prefix, at_least):
    exact = refused = 0
    for row in rows_of(prefix):
        negative = min(row["start"] or 0, row["end"] or 0) < 0
        if "unreadable_frames" in row or (rule == "second" and negative):
            continue  # tested below: the reference stops or swallows an exception there
        if row.get("indices"):
            got = choose(rule, row)
            # The stride rule's original ignores the order option.
            assert (order_frames(got, row["frame_order"]) if rule == "second" else got) == row["indices"], row
            exact += 1
        else:
            with pytest.raises(ValueError, match="cannot choose frames"):
                choose(rule, row)
            refused += 1
    assert exact >= at_least
    assert refused >= 5


def test_unreadable_frames_are_not_a_matter_of_choice():
    rows = [row for row in rows_of("F1") if "unreadable_frames" in row]
    assert rows
    for row in rows:
        got = choose("second", row)
        assert got[: len(row["indices"])] == row["indices"]
        assert row["unreadable_frames"][0] in got  # chosen, so that the reader meets it and raises


@pytest.mark.parametrize("rule", ["stride", "second"])
def test_negative_times_count_as_zero(rule):
    assert FrameSampling(rule).choose(30.0, 90, -5, 2) == [0, 30, 60]
    assert FrameSampling(rule).choose(15.0, 438, 2, -1) == [0, 15, 30]


def test_the_rules_differ_in_rounding_the_frame_rate():
    assert FrameSampling("second").choose(29.97, 120) == [0, 29, 58, 87, 116]
    assert FrameSampling("stride").choose(29.97, 120) == [0, 30, 60, 90]
    assert FrameSampling("stride").choose(2.5, 8) == [0, 2, 4, 6]  # 2.5 rounds to the even 2


def test_only_one_end_of_the_span():
    assert FrameSampling("stride").choose(10.0, 50, start=3) == [30, 40]
    assert FrameSampling("second").choose(10.0, 50, start=3) == [30, 40]
    assert FrameSampling("stride").choose(10.0, 50, end=2) == [0, 10, 20]
    assert FrameSampling("second").choose(10.0, 50, end=2) == [0, 10, 20]


def test_which_frames_stay():
    kept = [FrameSampling("second", 1, 3, position).choose(10.0, 100) for position in (0, 1, 2)]
    assert kept == [[0, 10, 20], [70, 80, 90], [0, 40, 90]]
    last = RULES["second"].Options(slice_framepos=1)
    assert FrameSampling("second", 1, 3, options=last).choose(10.0, 100) == [70, 80, 90]


@pytest.mark.parametrize(
    ("rule", "fps", "count", "options", "cause"),
    [
        ("stride", 30.0, 0, {}, "0 frames"),
        ("second", 0.0, 10, {}, "frame rate is 0.0"),
        ("second", float("nan"), 10, {}, "frame rate is nan"),
        ("second", 0.9, 10, {}, "framerate 1 is too high for 0.9"),
        ("stride", 0.5, 10, {}, "framerate 1 is too high for 0.5"),
        ("second", 15.0, 60, {"framerate": 30}, "framerate 30 is too high"),
        ("stride", 10.0, 60, {"start": 6}, "start 6 s is past the end"),
        ("second", 10.0, 60, {"start": 6}, "start 6 s is past the end"),
        ("stride", 10.0, 60, {"start": float("nan")}, "not a time span"),
        ("nearest", 10.0, 60, {}, "frame rule must be one of second, stride, got 'nearest'"),
        ("stride", 10.0, 60, {"framerate": 0}, "framerate must be a whole number >= 1, got 0"),
        ("stride", 10.0, 60, {"max_frames": 0}, "max_frames must be >= 1, got 0"),
        ("stride", 10.0, 60, {"slice_framepos": 3}, "slice_framepos must be 0"),
    ],
)
def test_impossible_choices_name_the_cause(rule, fps, count, options, cause):
    span = {"start": options.pop("start")} if "start" in options else {}
    with pytest.raises(ValueError, match=cause):
        FrameSampling(rule, **options).choose(fps, count, **span)


@settings(max_examples=300, deadline=None)
@given(
    rule=st.sampled_from(["stride", "second"]),
    fps=st.floats(0.1, 240),
    count=st.integers(0, 5000),
    span=st.tuples(*[st.none() | st.integers(-10, 300) | st.floats(-10, 300)] * 2),
    framerate=st.integers(1, 40),
    max_frames=st.integers(1, 70),
    position=st.sampled_from([0, 1, 2]),
)
def test_a_choice_is_always_valid_or_refused(rule, fps, count, span, framerate, max_frames, position):
    sampling = FrameSampling(rule, framerate, max_frames, position)
    try:
        indices = sampling.choose(fps, count, *span)
    except ValueError as error:
        assert "cannot choose frames" in str(error)  # noqa: PT017
        return
    assert 1 <= len(indices) <= max_frames
    assert indices == sorted(set(indices))
    assert indices[0] >= 0
    assert indices[-1] < count


def test_frame_order():
    assert order_frames([0, 5, 9], 0) == [0, 5, 9]
    assert order_frames([0, 5, 9], 1) == [9, 5, 0]
    shuffled = order_frames(list(range(20)), 2, np.random.default_rng(0))
    assert sorted(shuffled) == list(range(20))
    assert shuffled != list(range(20))
    assert shuffled == order_frames(list(range(20)), 2, np.random.default_rng(0))
    with pytest.raises(ValueError, match="needs a numpy random Generator"):
        order_frames([0], 2)
    with pytest.raises(ValueError, match="frame_order must be 0"):
        order_frames([0], 3)


def test_sampling_options_are_checked_once_and_frozen():
    with pytest.raises(ValueError, match="max_frames must be >= 1, got -1"):
        FrameSampling("stride", 1, -1, 2)
    with pytest.raises(AttributeError):
        FrameSampling().max_frames = 3
