"""Every launcher gives the one-process result; a rank that fails, or a signal, ends all ranks."""

import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from test_resume import processes_of

from engine.distributed import Place, choose_device, first_host, read_place, same_kind_of_device
from engine.resume import load_last
from main_task_retrieval import main

ROOT = Path(__file__).parent.parent
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
LAUNCHER_NAMES = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")


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


def free_port() -> str:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return str(probe.getsockname()[1])


def environment(**more: str) -> dict[str, str]:
    clean = {k: v for k, v in os.environ.items() if k not in LAUNCHER_NAMES and not k.startswith("SLURM")}
    return clean | {"OMP_NUM_THREADS": "1"} | more


def start(command: list[str], **more: str) -> subprocess.Popen:
    return subprocess.Popen(
        [sys.executable, *command],
        cwd=ROOT,
        env=environment(**more),
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        start_new_session=True,
    )


def torchrun(flags: list[str], script: tuple[str, ...] = (MAIN,)) -> list[subprocess.Popen]:
    return [start(["-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", *script, *flags])]


def two_nodes(flags: list[str]) -> list[subprocess.Popen]:
    port = free_port()
    return [
        start(
            [
                "-m",
                "torch.distributed.run",
                "--nnodes=2",
                f"--node_rank={node}",
                "--master_addr=127.0.0.1",
                f"--master_port={port}",
                "--nproc_per_node=1",
                MAIN,
                *flags,
            ]
        )
        for node in range(2)
    ]


def launch(flags: list[str]) -> list[subprocess.Popen]:
    port = f"--master_port={free_port()}"
    return [start(["-m", "torch.distributed.launch", port, "--nproc_per_node=2", MAIN, *flags])]


def srun(flags: list[str], script: tuple[str, ...] = (MAIN,)) -> list[subprocess.Popen]:
    """Three tasks with what srun sets; the port follows from the job's id, which here follows from a free port."""
    job = str(int(free_port()) % 15000)
    return [
        start(
            [*script, *flags],
            SLURM_PROCID=str(task),
            SLURM_NTASKS="3",
            SLURM_LOCALID=str(task),
            SLURM_JOB_NODELIST="localhost",
            SLURM_JOB_ID=job,
        )
        for task in range(3)
    ]


def finish(processes: list[subprocess.Popen], seconds: float = 120) -> list[tuple[int, str]]:
    """Exit status and standard error of each; all are ended, whatever happens."""
    try:
        return [(p.returncode, text) for p in processes for text in [p.communicate(timeout=seconds)[1]]]
    finally:
        for process in processes:
            if process.poll() is None:
                process.send_signal(signal.SIGKILL)
                process.wait()


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


@pytest.mark.parametrize(
    "launcher",
    [two_nodes, launch, srun],
    ids=["two_nodes", "launch", "srun"],
)
def test_launchers(flags, alone, tmp_path, launcher):
    """Four steps on 2 (srun: 3) gloo ranks: loss and weights of one process, within float32 rounding."""
    for status, errors in finish(launcher(flags_to(flags, tmp_path / "out"))):
        assert status == 0, errors
    ours, theirs = (json.loads((folder / "history.jsonl").read_text()) for folder in (tmp_path / "out", alone))
    assert ours["steps"] == theirs["steps"] == 4
    assert ours["loss"] == pytest.approx(theirs["loss"], rel=1e-5)
    ranks = 3 if launcher is srun else 2
    assert len(load_last(tmp_path / "out" / "checkpoint_last.pt")["random"]) == ranks
    ours, theirs = (torch.load(folder / "pytorch_model.bin") for folder in (tmp_path / "out", alone))
    for name, weight in theirs.items():
        torch.testing.assert_close(ours[name], weight, rtol=1e-4, atol=1e-5)


def failing(how: str, rank: int) -> tuple[str, str, str]:
    return (str(ROOT / "tests" / "failing_rank.py"), how, str(rank))


@pytest.mark.parametrize(("how", "rank"), [("raise", 0), ("kill", 1)])
def test_torchrun_ends_all_ranks_when_one_fails(flags, tmp_path, how, rank):
    """Within a minute (and 30 s for the imports); torchrun shows the rank's traceback, or the signal that ended it."""
    [(status, errors)] = finish(torchrun(flags_to(flags, tmp_path / "out"), failing(how, rank)), 90)
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


@pytest.mark.parametrize(("how", "rank"), [("raise", 1), ("freeze", 2)])
def test_one_failing_rank_ends_all(flags, tmp_path, how, rank):
    """Without a launcher that would end the others: lost connections do, or the time-out of collectives (here 5 s)."""
    processes = srun(flags_to(flags, tmp_path / "out"), failing(how, rank))
    if how == "freeze":  # itself it ends only when killed, after the others
        found = finish([p for r, p in enumerate(processes) if r != rank], 90)
        processes[rank].kill()
        finish([processes[rank]])
    else:
        found = finish(processes, 90)  # 30 s of it for the imports
    assert all(status != 0 for status, _ in found), found
    if how == "raise":
        assert f"[rank{rank}]: ValueError: planned failure" in found[rank][1]
        assert "in step" in found[rank][1]  # its traceback
        assert all("planned failure" not in found[r][1] for r in {0, 1, 2} - {rank})
    if how == "freeze":
        assert all(": Traceback" in errors for _, errors in found), found
        assert any("imed out" in errors or "imeout" in errors for _, errors in found), found


def test_a_rank_that_starts_late_is_waited_for(flags, tmp_path):
    """Longer than the time-out of collectives, which applies only once all have met."""
    [(status, errors)] = finish(torchrun(flags_to(flags, tmp_path / "out"), failing("late", 0)))
    assert status == 0, errors


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
    [(status, errors)] = finish([start([MAIN, *command])])
    assert status == 1
    assert errors.startswith("error: --resume_model nowhere.pt: no such file")
    assert len(errors.splitlines()) == 1


def test_a_signal_to_torchrun_saves_and_leaves_no_process(flags, tmp_path):
    command = flags_to(flags, tmp_path / "out")
    command[command.index("--epochs") + 1] = "500"
    [process] = torchrun(command)
    deadline = time.monotonic() + 120
    while not (tmp_path / "out" / "history.jsonl").exists():
        assert process.poll() is None, process.stderr.read()
        assert time.monotonic() < deadline
        time.sleep(0.05)
    os.kill(process.pid, signal.SIGTERM)
    [(status, _)] = finish([process], 60)
    assert status != 0
    assert load_last(tmp_path / "out" / "checkpoint_last.pt")["progress"]["epoch"] >= 1
    while processes_of(process.pid):
        assert time.monotonic() < deadline, processes_of(process.pid)
        time.sleep(0.1)
