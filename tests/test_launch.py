"""Every launcher gives the one-process result; a rank that fails, or a signal, ends all ranks."""

import json
import os
import signal
import subprocess
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from launching import LIMIT, ROOT, SlurmRun, finish, processes_of, reserved_port, run_tasks, start

from engine.distributed import Place, choose_device, first_host, read_place, same_kind_of_device
from engine.resume import load_last
from main_task_retrieval import main

MAIN = "main_task_retrieval.py"
TRAIN = [
    "--do_train",
    "--epochs",
    "1",
    "--batch_size",
    "12",
    "--lr",
    "1e-3",
    "--coef_lr",
    "1",
    "--freeze_layer_num",
    "-1",
    "--select_on",
    "last",
]


@pytest.mark.parametrize(
    ("nodes", "host"),
    [
        ("gpu7", "gpu7"),
        ("gpu[003-005,9],login1", "gpu003"),
        ("a,b", "a"),
        ("rack[1-2]n[04,07].site", "rack1n04.site"),
        ("n[12]", "n12"),
        ("host-a-[1-3]", "host-a-1"),
        ("10.0.0.1,10.0.0.2", "10.0.0.1"),
    ],
)
def test_the_first_host_of_a_slurm_list(nodes, host):
    assert first_host(nodes) == host


def test_what_is_not_a_list_of_hosts_is_refused():
    with pytest.raises(ValueError, match="SLURM_JOB_NODELIST '' is not a list of hosts; set MASTER_ADDR"):
        first_host("")


def test_places():
    assert read_place({}) == Place()
    torchrun = {"RANK": "3", "WORLD_SIZE": "4", "LOCAL_RANK": "1"}
    assert read_place(torchrun) == Place(3, 4, 1)
    slurm = {
        "SLURM_PROCID": "5",
        "SLURM_NTASKS": "8",
        "SLURM_LOCALID": "1",
        "SLURM_JOB_NODELIST": "gpu[03-04]",
        "SLURM_JOB_ID": "1234567",
    }
    assert read_place(slurm) == Place(5, 8, 1, {"MASTER_ADDR": "gpu03", "MASTER_PORT": "19567"})
    assert read_place(slurm | torchrun) == Place(3, 4, 1)  # torchrun started by srun
    assert "MASTER_ADDR" not in read_place(slurm | {"MASTER_ADDR": "other"}).meeting_point
    assert read_place(slurm | {"SLURM_STEP_NUM_TASKS": "1"}) == Place()  # srun -n 1 within a larger job
    step = read_place(slurm | {"SLURM_STEP_NODELIST": "gpu04", "SLURM_STEP_ID": "2"})
    assert step.meeting_point == {"MASTER_ADDR": "gpu04", "MASTER_PORT": str(15000 + (1234567 + 2 * 7919) % 15000)}


def test_devices(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(torch.cuda, "set_device", lambda index: None)
    assert choose_device("auto", Place(1, 2, 1, {"MASTER_PORT": "19567"})) == torch.device("cuda", 0)
    with pytest.raises(ValueError, match="--device auto: local rank 1 but 1 CUDA devices; start at most 1 processes"):
        choose_device("auto", Place(1, 2, 1))


@pytest.fixture
def port() -> Iterator[int]:
    with reserved_port() as number:
        yield number


def torchrun(*command: str) -> subprocess.Popen:
    return start(["-m", "torch.distributed.run", *command])


def two_nodes(flags: list[str], port: int) -> list[subprocess.Popen]:
    meeting_point = ("--nnodes=2", "--master_addr=127.0.0.1", f"--master_port={port}", "--nproc_per_node=1")
    return [torchrun(*meeting_point, f"--node_rank={node}", MAIN, *flags) for node in range(2)]


def launch(flags: list[str], port: int) -> list[subprocess.Popen]:
    return [start(["-m", "torch.distributed.launch", f"--master_port={port}", "--nproc_per_node=2", MAIN, *flags])]


def flags_to(flags: list[str], folder: Path) -> list[str]:
    flags = list(flags)
    flags[flags.index("--output_dir") + 1] = str(folder)
    return [*TRAIN, *flags]


@pytest.fixture(scope="module")
def flags(sample) -> list[str]:
    data = sample / "msrvtt"
    return [
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
        "out",
        "--max_frames",
        "3",
        "--num_thread_reader",
        "0",
        "--pretrained_clip_name",
        f"{sample}/clip/tiny_clip.pt",
        "--device",
        "cpu",
    ]


@pytest.fixture(scope="module")
def alone(flags, tmp_path_factory) -> Path:
    """The run of one process."""
    out = tmp_path_factory.mktemp("alone")
    assert main(flags_to(flags, out)) == 0
    return out


def assert_same_run(out: Path, alone: Path, ranks: int) -> None:
    """Four steps on gloo ranks: loss and weights of one process, within float32 rounding."""
    ours, theirs = (json.loads((folder / "history.jsonl").read_text()) for folder in (out, alone))
    assert ours["steps"] == theirs["steps"] == 4
    assert ours["loss"] == pytest.approx(theirs["loss"], rel=1e-5)
    assert len(load_last(out / "checkpoint_last.pt")["random"]) == ranks
    ours, theirs = (torch.load(folder / "pytorch_model.bin") for folder in (out, alone))
    for name, weight in theirs.items():
        torch.testing.assert_close(ours[name], weight, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("launcher", [two_nodes, launch])
def test_launchers(flags, alone, tmp_path, port, launcher):
    for status, errors in finish(launcher(flags_to(flags, tmp_path / "out"), port), tmp_path):
        assert status == 0, errors
    assert_same_run(tmp_path / "out", alone, 2)


@pytest.mark.parametrize(("how", "rank"), [("raise", 0), ("kill", 1)])
def test_torchrun_ends_all_ranks_when_one_fails(flags, tmp_path, how, rank):
    """It shows the rank's traceback, or the signal that ended it."""
    script = (str(ROOT / "tests" / "failing_rank.py"), how, str(rank), *flags_to(flags, tmp_path / "out"))
    [(status, errors)] = finish([torchrun("--standalone", "--nproc_per_node=2", *script)], tmp_path)
    assert status != 0
    summary = errors[errors.index("failing_rank.py FAILED") :]
    if how == "raise":
        assert f"[rank{rank}]: Traceback" in errors
        assert f"[rank{rank}]: ValueError: planned failure" in errors
        cause = summary[summary.index("Root Cause") :]
        assert f"(local_rank: {rank})" in cause
        assert "in step" in cause
        assert "ValueError: planned failure" in cause
    else:
        assert "Signal 9 (SIGKILL) received by PID" in summary
    if (how, rank) == ("raise", 0):  # rank 0 keeps the log
        assert "ValueError: planned failure" in (tmp_path / "out" / "log.txt").read_text()


@pytest.fixture(scope="module")
def slurm(flags, tmp_path_factory) -> dict[str, SlurmRun]:
    runs = {
        "srun": {},
        **{how: {"how": how, "rank": rank} for how, rank in {"raise": 1, "freeze": 2, "late": 0}.items()},
    }
    return run_tasks(tmp_path_factory.mktemp("slurm"), runs, [*TRAIN, *flags])


def test_srun(slurm, alone):
    out, tasks = slurm["srun"]
    assert all(status == 0 for status, _ in tasks), tasks
    assert_same_run(out, alone, len(tasks))


@pytest.mark.parametrize(("how", "failed"), [("raise", 1), ("freeze", 2)])
def test_one_failing_rank_ends_all(slurm, how, failed):
    """Without a launcher that would end the others: lost connections do, or the time-out of collectives."""
    _, tasks = slurm[how]
    assert all(status != 0 for status, _ in tasks), tasks
    others = [errors for task, (_, errors) in enumerate(tasks) if task != failed]
    if how == "raise":
        assert f"[rank{failed}]: ValueError: planned failure" in tasks[failed][1]
        assert "in step" in tasks[failed][1]  # its traceback
        assert all("planned failure" not in errors for errors in others)
    else:
        assert all(": Traceback" in errors for errors in others), tasks
        assert any("imed out" in errors or "imeout" in errors for errors in others), tasks


def test_a_rank_that_starts_late_is_waited_for(slurm):
    """Longer than the time-out of collectives, which applies only once all have met."""
    assert all(status == 0 for status, _ in slurm["late"][1]), slurm["late"]


@pytest.mark.parametrize(("chosen", "told"), [("cuda", "rank 1: none"), ("cpu", "rank 1: cpu")])
def test_a_rank_with_another_kind_of_device_is_named(monkeypatch, tmp_path, chosen, told):
    """Two ranks as threads that meet at a store; one sees CUDA, the other does not."""
    store, errors = dist.HashStore(), {}

    def rank(number: int) -> None:
        place = Place(number, 2, 0)
        try:
            same_kind_of_device("auto", place, store)
        except ValueError as error:
            errors[number] = str(error)

    def choose(name: str, place: Place) -> torch.device:
        if place.rank == 0:
            return torch.device("cuda", 0)
        if chosen == "cuda":
            raise ValueError("--device cuda: no CUDA device is visible to torch")
        return torch.device("cpu")

    monkeypatch.setattr("engine.distributed.choose_device", choose)
    threads = [threading.Thread(target=rank, args=(number,)) for number in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(20)
    assert f"most have cuda, but {told}. Check the driver" in errors[0]
    assert ("no CUDA device" if chosen == "cuda" else told) in errors[1]


def test_an_error_of_one_process_is_one_line(flags, tmp_path):
    command = [*flags_to(flags, tmp_path / "out"), "--resume_model", "nowhere.pt"]
    [(status, errors)] = finish([start([MAIN, *command])], tmp_path)
    assert status == 1
    assert errors.startswith("error: --resume_model nowhere.pt: no such file")
    assert len(errors.splitlines()) == 1


def test_a_signal_to_torchrun_saves_and_leaves_no_process(flags, tmp_path):
    command = flags_to(flags, tmp_path / "out")
    command[command.index("--epochs") + 1] = "500"
    process = torchrun("--standalone", "--nproc_per_node=2", MAIN, *command)
    deadline = time.monotonic() + LIMIT
    while not (tmp_path / "out" / "history.jsonl").exists():
        if process.poll() is not None or time.monotonic() > deadline:
            pytest.fail(f"no epoch is over: {finish([process], tmp_path)}")
        time.sleep(0.05)
    assert len(processes_of(tmp_path)) == 3
    os.kill(process.pid, signal.SIGTERM)
    process.wait(LIMIT)
    assert process.returncode != 0
    while processes_of(tmp_path):
        assert time.monotonic() < deadline, finish([process], tmp_path)
        time.sleep(0.1)
    assert load_last(tmp_path / "out" / "checkpoint_last.pt")["progress"]["epoch"] >= 1
