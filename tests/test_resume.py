"""Kills, full disks and signals at any step: nothing is lost but the steps since the last save."""

import contextlib
import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from launching import LIMIT, ROOT, small_disk

import engine.step
from checkpoints.whole import remove_leftovers, write_whole
from engine.resume import load_last
from engine.step import random_state, set_random_state
from main_task_retrieval import main

TIMINGS = {"seconds", "clips_per_second", "data_wait", "peak_memory_mb"}  # of history.jsonl; all else must agree
# 48 clips in batches of 12, one caption drawn for each: 4 steps an epoch, 12 in all.
TRAIN = [
    "--do_train",
    "--epochs",
    "3",
    "--batch_size",
    "12",
    "--lr",
    "1e-3",
    "--coef_lr",
    "1",
    "--freeze_layer_num",
    "-1",
    "--save_steps",
    "3",
]
SAVE_STEPS, STEPS = 3, 12


def flags_to(flags: list[str], folder: Path, *more: str) -> list[str]:
    """The flags of a training run that writes to `folder`."""
    flags = list(flags)
    flags[flags.index("--output_dir") + 1] = str(folder)
    return [*TRAIN, *flags, *more]


def run_plans(plans: list[dict], flags: list[str]) -> list[tuple[int, int]]:
    done = subprocess.run(
        [sys.executable, str(ROOT / "tests" / "fault_driver.py"), json.dumps(plans), *flags],
        cwd=ROOT,
        text=True,
        capture_output=True,
        timeout=LIMIT,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
    )
    assert done.returncode == 0, done.stderr
    return [tuple(pair) for pair in json.loads(done.stdout.splitlines()[-1])]


def outcome(folder: Path) -> tuple[dict, dict, list, dict]:
    """Selected weights, last weights, history and metrics of a finished run."""
    history = [json.loads(line) for line in (folder / "history.jsonl").read_text().splitlines()]
    return (
        torch.load(folder / "pytorch_model.bin", weights_only=True),
        load_last(folder / "checkpoint_last.pt")["model"],
        [{k: v for k, v in line.items() if k not in TIMINGS} for line in history],
        json.loads((folder / "results.json").read_text())["metrics"],
    )


def assert_same_outcome(ours: Path, theirs: Path) -> None:
    got, want = outcome(ours), outcome(theirs)
    for mine, yours in zip(got[:2], want[:2]):
        assert mine.keys() == yours.keys()
        assert all(torch.equal(mine[name], yours[name]) for name in mine)
    assert got[2:] == want[2:]
    assert len(got[2]) == 3


@pytest.fixture(scope="module")
def whole(sample, tmp_path_factory):
    """A run that nothing interrupts; its flags to repeat."""
    data, out = sample / "msrvtt", tmp_path_factory.mktemp("whole")
    flags = [
        "--datatype",
        "msrvtt",
        "--train_csv",
        f"{data}/MSRVTT_train.9k.csv",
        "--val_csv",
        f"{data}/MSRVTT_JSFUSION_test.csv",
        "--data_path",
        f"{data}/MSRVTT_data.json",
        "--features_path",
        f"{data}/videos/all",
        "--output_dir",
        str(out),
        "--max_frames",
        "3",
        "--num_thread_reader",
        "1",
        "--pretrained_clip_name",
        f"{sample}/clip/tiny_clip.pt",
        "--device",
        "cpu",
    ]
    assert run_plans([{}], flags_to(flags, out)) == [(0, STEPS)]
    return flags, out


def plans_for(seed: int, filler: str | None) -> list[dict]:
    """Eleven deaths: random steps, two checkpoints half written, one before the epoch's checkpoint, two full disks."""
    chosen = random.Random(seed)
    full = {"filler": filler} if filler else {}
    plans = [{"kill_after_step": chosen.randint(1, 3)} for _ in range(5)]
    plans += [{"kill_in_write": chosen.randint(1, 2)} for _ in range(2)]
    plans += [{"full_disk": 1} | full, {"full_disk": 2} | full, {"kill_before_last": 1}, {"terminate_at_step": 1}]
    chosen.shuffle(plans)
    return plans


def test_eleven_deaths_change_nothing(whole, tmp_path):
    """Weights, history and metrics to the bit; after every death all but the steps since the last save is there."""
    flags, undisturbed = whole
    seed = int(os.environ.get("FAULT_SEED", "0"))
    with small_disk(tmp_path / "disk", megabytes=200) as mounted:
        out = tmp_path / "disk" / "run"
        plans = [*plans_for(seed, str(tmp_path / "disk" / "filler") if mounted else None), {}]
        report = run_plans(plans, flags_to(flags, out, "--resume_model", "auto"))
        before = 0
        for plan, (status, saved) in zip(plans, report):
            assert saved >= before, plan
            died = next(
                (
                    s
                    for kind, s in (("kill", -signal.SIGKILL), ("term", 143), ("full", 1))
                    if any(name.startswith(kind) for name in plan)
                ),
                0,
            )
            assert status in (died, 0), (plan, report)  # 0 when the run is over before its death comes
            done = plan.get("kill_after_step", 0) if status else 0
            assert saved > before + done - SAVE_STEPS - 1, (plan, report)
            before = saved
        assert sum(status != 0 for status, _ in report) >= 10, report
        assert report[-1] == (0, STEPS)
        assert_same_outcome(out, undisturbed)
        assert not [p.name for p in out.iterdir() if p.name.endswith(".tmp")]


def test_a_write_that_fails_leaves_the_file_before(tmp_path):
    path = tmp_path / "checkpoint_last.pt"
    path.write_bytes(b"before")

    def fail(file):
        file.write(b"half")
        raise OSError("No space left on device")

    with pytest.raises(OSError, match=r"cannot write .*checkpoint_last.pt: No space left on device. Is the disk full"):
        write_whole(path, fail)
    assert [p.name for p in tmp_path.iterdir()] == ["checkpoint_last.pt"]
    assert path.read_bytes() == b"before"
    (tmp_path / ".checkpoint_last.pt.4242.tmp").write_bytes(b"of a killed run")
    (tmp_path / ".mine.tmp").write_bytes(b"of someone else")
    remove_leftovers(tmp_path)
    assert sorted(p.name for p in tmp_path.iterdir()) == [".mine.tmp", "checkpoint_last.pt"]


def processes_of(session: int) -> list[str]:
    """Command lines of the processes in a session, zombies excepted."""
    found = []
    for entry in Path("/proc").iterdir():
        with contextlib.suppress(OSError):
            if entry.name.isdigit() and os.getsid(int(entry.name)) == session:
                state = (entry / "stat").read_text().rsplit(")", 1)[1].split()[0]
                found += [(entry / "cmdline").read_text()] if state != "Z" else []
    return found


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_saves_and_leaves_no_process(whole, tmp_path, number):
    """To the whole process group, as a terminal's Ctrl-C and SLURM do it: loader workers get it too."""
    command = flags_to(whole[0], tmp_path / "out", "--num_thread_reader", "2", "--epochs", "500", "--save_steps", "0")
    process = subprocess.Popen(
        [sys.executable, "main_task_retrieval.py", *command],
        cwd=ROOT,
        text=True,
        start_new_session=True,
        stderr=subprocess.PIPE,
        stdout=subprocess.DEVNULL,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
    )
    deadline = time.monotonic() + LIMIT
    while not (tmp_path / "out" / "history.jsonl").exists():
        assert process.poll() is None
        assert time.monotonic() < deadline
        time.sleep(0.05)
    os.killpg(process.pid, number)
    message = process.communicate(timeout=LIMIT)[1]
    assert process.returncode == 128 + number
    assert f"stopped by {number.name}; training goes on from its last checkpoint" in message
    assert load_last(tmp_path / "out" / "checkpoint_last.pt")["progress"]["epoch"] >= 1
    while processes_of(process.pid):
        assert time.monotonic() < deadline, processes_of(process.pid)
        time.sleep(0.1)


def changed(flags: list[str], **values: object) -> list[str]:
    flags = list(flags)
    for name, value in values.items():
        flags[flags.index(f"--{name}") + 1] = str(value)
    return flags


def test_what_may_change_and_what_may_not(whole, tmp_path, capsys):
    flags, out = whole
    last = str(out / "checkpoint_last.pt")
    resumed = flags_to(flags, tmp_path / "other", "--resume_model", last)
    assert main(changed(resumed, lr="2e-3", batch_size="16")) == 1
    message = capsys.readouterr().err
    assert "--batch_size 12 -> 16; --lr 0.001 -> 0.002. Give those of the interrupted run" in message
    fewer = tmp_path / "fewer.csv"
    fewer.write_text("".join(Path(flags[flags.index("--train_csv") + 1]).read_text().splitlines(keepends=True)[:-1]))
    assert main([*changed(resumed, train_csv=fewer), "--allow_missing"]) == 1
    message = capsys.readouterr().err
    assert "training data 48 videos" in message
    assert "-> 47 videos" in message
    # Elsewhere, with other workers, lines and pieces; the run is over, so what was selected comes along.
    assert (
        main(
            [
                *changed(resumed, num_thread_reader="0"),
                "--n_display",
                "1",
                "--batch_size_val",
                "6",
                "--gradient_accumulation_steps",
                "2",
            ]
        )
        == 0
    )
    assert "--gradient_accumulation_steps 1 -> 2: exact but for rounding" in capsys.readouterr().out
    assert (tmp_path / "other" / "pytorch_model.bin").read_bytes() == (out / "pytorch_model.bin").read_bytes()


def test_auto_starts_afresh_without_a_checkpoint(whole, tmp_path):
    flags = changed(flags_to(whole[0], tmp_path / "new", "--resume_model", "auto"), epochs="1")
    assert main([*flags, "--select_on", "last"]) == 0
    found = json.loads((tmp_path / "new" / "results.json").read_text())
    assert found["protocol"]["selected_on"] == "last"
    ours, theirs = (
        torch.load(tmp_path / "new" / name, weights_only=True) for name in ("pytorch_model.bin", "checkpoint_last.pt")
    )
    assert all(torch.equal(ours[name], theirs["model"][name]) for name in ours)
    assert "a fresh start" in (tmp_path / "new" / "log.txt").read_text()


def test_a_loss_that_is_not_finite_names_its_clips(whole, tmp_path, capsys, monkeypatch):
    original, seen = engine.step.Trainer.backward, []

    def backward(trainer, batch, *shares):
        seen.append(batch.video_ids)
        loss = original(trainer, batch, *shares)
        return loss * float("nan") if len(seen) == 3 else loss

    monkeypatch.setattr(engine.step.Trainer, "backward", backward)
    out = tmp_path / "out"
    assert main([*flags_to(whole[0], out), "--save_steps", "1"]) == 1
    assert "epoch 1 step 3: the loss is nan. The weights were not updated and" in capsys.readouterr().err
    noted = json.loads((out / "nonfinite_batch.json").read_text())
    assert noted == {"epoch": 0, "step": 3, "what": "the loss is nan", "video_ids": list(seen[2])}
    assert load_last(out / "checkpoint_last.pt")["progress"]["step"] == 2
    assert not (out / "pytorch_model.bin").exists()


def test_every_generator_is_put_back():
    import numpy as np

    cpu = torch.device("cpu")
    state = random_state(cpu)
    drawn = random.random(), np.random.rand(), np.random.randn(), torch.rand(1).item()
    set_random_state(state, cpu)
    assert drawn == (random.random(), np.random.rand(), np.random.randn(), torch.rand(1).item())
