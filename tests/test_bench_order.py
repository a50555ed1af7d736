"""The order benchmark: its accuracy on matrices that a reader can check, its frames, and a short run of it."""

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from benchmarks.bench_order import FRAMERATE, FRAMES, SECONDS, batches, interval, pair_wins
from dataloaders.video.frames import FrameSampling
from tools.sample_data.plan import RATES

ROOT = Path(__file__).parent.parent


def test_pair_wins_on_a_matrix_by_hand():
    """Videos 0-1 and 2-3 are pairs, 4 is none."""
    similarity = np.array(
        [
            [0.2, 0.8, 9, 9, 9],  # of video 0: 1 above itself
            [0.3, 0.7, 9, 9, 9],  # of video 1: itself above 0
            [9, 9, 0.5, 0.5, 9],  # of video 2: a tie with 3
            [9, 9, 0.4, 0.6, 9],  # of video 3: itself above 2
            [0, 0, 0, 0, 0],
        ]
    )
    t2v, v2t = pair_wins(similarity, np.array([[0, 1], [2, 3]]))
    assert t2v.tolist() == [[False, True], [False, True]]
    # video 0: 0.2 against 0.3; video 1: 0.7 against 0.8; video 2: 0.5 against 0.4; video 3: 0.6 against 0.5
    assert v2t.tolist() == [[False, False], [True, True]]


def test_interval():
    """Wilson's for 50 of 100, with continuity neither here nor there: 40.4 to 59.6; for 10 of 10: 72.2 to 100."""
    assert interval(np.tile([True, False], (100, 1))) == pytest.approx((40.38, 59.62), abs=0.01)
    assert interval(np.ones((10, 2), dtype=bool)) == pytest.approx((72.25, 100), abs=0.01)


@pytest.mark.parametrize("rate", RATES)
def test_the_frames_of_a_reversed_clip_are_those_of_the_clip(rate):
    """Four frames, and mirroring their places in the clip gives the same places."""
    count = round(float(SECONDS) * float(rate))
    chosen = FrameSampling("stride", FRAMERATE, FRAMES).choose(float(rate), count)
    assert len(chosen) == 4
    assert [count - 1 - index for index in reversed(chosen)] == chosen


def test_batches_hold_whole_pairs():
    pairs = np.arange(20).reshape(10, 2)
    found = list(batches(pairs, 4, np.random.default_rng(0)))
    assert [len(index) for index in found] == [8, 8]
    assert all((index[::2] + 1 == index[1::2]).all() for index in found)
    assert len(set(np.concatenate(found))) == 16


def bench_order(flags: str, folder: Path) -> subprocess.CompletedProcess:
    command = [sys.executable, "-m", "benchmarks.bench_order", *flags.split(), "--output_dir", str(folder)]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True)


SHORT = "--epochs 1 --clip_epochs 1 --n_train 2 --n_test 1"


@pytest.fixture(scope="module")
def finished(tmp_path_factory) -> tuple[Path, subprocess.CompletedProcess]:
    """Every kind of head: with a position table, without, and the tower with temporal parts of its own."""
    folder = tmp_path_factory.mktemp("order")
    heads = "--heads meanP seqTransf clip_evl"
    return folder, bench_order(f"{heads} {SHORT} --order_pairs 3 --batch_pairs 4 --seed 0", folder)


def test_short_run_prints_the_table(finished):
    _, done = finished
    assert done.returncode == 0, done.stderr
    tables = done.stdout.split("| head |")[1:]  # one as soon as a head is done
    rows = [line.split("|")[1].strip() for line in tables[-1].splitlines() if line.startswith("|")]
    assert (len(tables), rows) == (3, ["---", "meanP", "seqTransf", "clip_evl"])


def test_clips_of_other_options_are_kept_until_force_is_given(finished):
    folder, _ = finished
    for more, status in ("--seed 1", 1), ("--seed 1 --force", 0):
        done = bench_order(f"--heads meanP {SHORT} --order_pairs 1 {more}", folder)
        assert done.returncode == status, done.stderr
        assert ("pass --force to write over it" in done.stderr) == bool(status)


def test_an_impossible_number_names_its_flag(tmp_path):
    done = bench_order("--order_pairs 0", tmp_path)
    assert done.returncode == 2
    assert "--order_pairs must be >= 1, got 0" in done.stderr
