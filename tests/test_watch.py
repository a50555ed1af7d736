"""What a run shows: speed, waiting, time left, scalars, and the warning that names the flag to change."""

import io
import json
import logging
import sys
import time
import types

import pytest
import torch

from engine import progress
from engine.progress import Bar, EpochWatch, add_scalars, log, open_tensorboard, peak_memory_mb
from main_task_retrieval import main


@pytest.fixture
def lines():
    """Messages of the run's log."""
    found: list[str] = []
    handler = logging.Handler()
    handler.emit = lambda record: found.append(record.getMessage())
    log.handlers[:] = [handler]
    log.setLevel(logging.INFO)
    return found


class Clock:
    """time.perf_counter under the test's control."""

    def __init__(self, monkeypatch) -> None:
        self.now = 0.0
        monkeypatch.setattr(progress.time, "perf_counter", lambda: self.now)


def run_epoch(clock: Clock, wait: float, work: float, steps: int, enabled: bool = True) -> EpochWatch:
    watched = EpochWatch(0, steps, done=0, later=100, clips=8, every=10, enabled=enabled)

    def loader():
        for _ in range(steps):
            clock.now += wait
            yield None

    for _ in watched.batches(loader()):
        clock.now += work
        watched.stepped(loss=1.5, norm=2.0, rates=[1e-4, 1e-7, 1e-4])
    return watched


def test_speed_share_and_time_left(monkeypatch, lines):
    """1 s of waiting and 3 s of work a step, the first step untimed: 2 clips/s, a quarter, 100 steps x 4 s to come."""
    watched = run_epoch(Clock(monkeypatch), wait=1, work=3, steps=21)
    assert watched.timed == 20
    assert watched.clips_per_second == 8 / 4
    assert watched.data_wait == 0.25
    assert watched.time_left == 400
    assert lines[-1] == (
        "epoch 1 step 21/21  loss 1.5000  gradient norm 2.00  lr 1.00e-04, 1.00e-07  "
        "2.0 clips/s, 25% waiting for data, 0:06:40 left"
    )
    assert [line.split("  ")[0] for line in lines] == [f"epoch 1 step {n}/21" for n in (10, 20, 21)]


def test_a_bar_on_a_terminal(monkeypatch, lines):
    terminal = io.StringIO()
    terminal.isatty = lambda: True
    monkeypatch.setattr(sys, "stderr", terminal)
    watched = EpochWatch(2, 4, done=1, later=0, clips=8, every=50, enabled=True)
    for _ in watched.batches(range(3)):
        watched.stepped(loss=1.5, norm=2.0, rates=[1e-4])
    assert "epoch 3" in terminal.getvalue()
    assert "1/4" in terminal.getvalue()  # the step done before a resume counts
    assert watched.done == 4


@pytest.mark.parametrize(("wait", "enabled", "warned"), [(2, True, True), (0.5, True, False), (2, False, False)])
def test_a_starving_run_names_the_flag(monkeypatch, lines, wait, enabled, warned):
    run_epoch(Clock(monkeypatch), wait=wait, work=3, steps=40, enabled=enabled)
    said = [line for line in lines if "--num_thread_reader" in line]
    assert len(said) == warned
    if warned:
        assert said[0].startswith("40 % of the time goes into waiting for data: raise --num_thread_reader")


@pytest.mark.parametrize(("work", "left"), [(0.596, "0:01:00"), (36, "1:00:00"), (863.99, "23:59:59")])
def test_time_left_in_words(monkeypatch, lines, work, left):
    """100 steps to come."""
    run_epoch(Clock(monkeypatch), wait=0, work=work, steps=21)
    assert lines[-1].endswith(f"{left} left")


def test_a_bar_of_bytes(monkeypatch, lines):
    """Off a terminal: nothing at first, then a line after 15 s; on one, tqdm's bar; nothing on other ranks."""
    now = [0.0]
    monkeypatch.setattr(progress.time, "monotonic", lambda: now[0])
    for enabled in (True, False):
        with Bar("clip.pt", total=3_000_000, done=500_000, unit="B", enabled=enabled) as bar:
            bar.advance(1_000_000)
            assert len(lines) == (not enabled)
            now[0] += 16
            bar.advance(500_000)
    assert lines == ["clip.pt: 2.00MB of 3.00MB"]
    terminal = io.StringIO()
    terminal.isatty = lambda: True
    monkeypatch.setattr(sys, "stderr", terminal)
    with Bar("clip.pt", total=3_000_000, unit="B") as bar:
        time.sleep(0.2)  # tqdm draws ten times a second
        bar.advance(1_500_000, note="from a mirror")
    assert "50%" in terminal.getvalue()
    assert "1.50M/3.00M" in terminal.getvalue()
    assert "from a mirror" in terminal.getvalue()
    assert len(lines) == 1


def test_peak_memory():
    assert 50 < peak_memory_mb(torch.device("cpu")) < 1_000_000


def test_tensorboard_is_refused_before_work_when_absent(msrvtt_flags, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    began = time.monotonic()
    data = [*msrvtt_flags, "--do_train", "--tensorboard"]
    assert main(data) == 1
    assert time.monotonic() - began < 2
    assert "pip install tensorboard" in capsys.readouterr().err


def test_scalars(monkeypatch, tmp_path):
    """Through a stand-in for the package, which is optional: what is written, and where an interrupted run is cut."""
    made = []

    class SummaryWriter:
        def __init__(self, folder, purge_step):
            self.calls = [(folder, purge_step)]
            made.append(self)

        def add_scalar(self, *point):
            self.calls.append(point)

        def close(self):
            self.calls.append("closed")

    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", types.SimpleNamespace(SummaryWriter=SummaryWriter))
    writer = open_tensorboard(tmp_path, first_step=7)
    add_scalars(writer, {"train/loss": 0.5}, 7)
    writer.close()
    assert made[0].calls == [(str(tmp_path), 7), ("train/loss", 0.5, 7), "closed"]
    assert open_tensorboard(None) is None
    add_scalars(None, {"train/loss": 0.5}, 7)
    assert len(made) == 1


def test_history_holds_speed_and_memory(msrvtt_flags, tmp_path):
    assert main([*msrvtt_flags, "--do_train", "--epochs", "1", "--batch_size", "12"]) == 0
    line = json.loads((tmp_path / "out" / "history.jsonl").read_text())
    assert line["clips_per_second"] > 0
    assert 0 <= line["data_wait"] <= 1
    assert line["peak_memory_mb"] > 50
