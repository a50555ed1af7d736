"""Starting processes that meet at a port, and waiting for their end; a helper of the tests with several ranks."""

import json
import os
import random
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor, wait
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path

ROOT = Path(__file__).parent.parent
FIRST_PORT = 15000  # engine/distributed.py: the port of a SLURM job is this and its number, which is less than this
LIMIT = 300  # seconds that only a process which hangs takes; twenty would do on an idle machine
LAUNCHER_NAMES = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")
# --output_dir, and exit status and standard error of every task.
SlurmRun = tuple[Path, list[tuple[int, str]]]


@contextmanager
def reserved_port() -> Iterator[int]:
    """A port that a store can listen at and no other process gets, neither by chance nor from this function.

    It is bound here, and only then is it allowed to bind it again, as stores do.
    """
    with socket.socket() as holder:
        bound = False
        while not bound:
            with suppress(OSError):
                holder.bind(("127.0.0.1", random.randrange(FIRST_PORT, 2 * FIRST_PORT)))
                bound = True
        holder.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        yield holder.getsockname()[1]


def start(command: list[str]) -> subprocess.Popen:
    clean = {k: v for k, v in os.environ.items() if k not in LAUNCHER_NAMES and not k.startswith("SLURM")}
    return subprocess.Popen(
        [sys.executable, *command],
        cwd=ROOT,
        env=clean | {"OMP_NUM_THREADS": "1", "PYTHONFAULTHANDLER": "1"},
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        start_new_session=True,
    )


def processes_of(folder: Path) -> list[int]:
    """The processes whose command line names `folder`: launchers, and their ranks in sessions of their own."""
    found = []
    for entry in Path("/proc").glob("[0-9]*"):
        with suppress(OSError):
            if str(folder) in (entry / "cmdline").read_text():
                found.append(int(entry.name))
    return found


def finish(processes: list[subprocess.Popen], folder: Path) -> list[tuple[int, str]]:
    """Exit status and standard error of each, which with their ranks are all that name `folder` and are ended.

    Only a hang takes as long as LIMIT; then all print what they were doing, and the test fails with that.
    """
    stuck = False
    with ThreadPoolExecutor(len(processes)) as pool:  # all are read at once: none waits for another to be read
        reading = [pool.submit(process.communicate) for process in processes]
        try:
            stuck = bool(wait(reading, LIMIT).not_done)
        finally:
            for number in (signal.SIGABRT, signal.SIGKILL):
                for process in processes_of(folder):
                    with suppress(ProcessLookupError):
                        os.kill(process, number)
                wait(reading, 5)
    found = [(process.returncode, one.result()[1]) for process, one in zip(processes, reading)]
    said = "\n".join(
        f"== {p.args}\nstatus {p.returncode}\n{''.join(one.result())}" for p, one in zip(processes, reading)
    )
    assert not stuck, f"not over after {LIMIT} s\n{said}"
    return found


def run_tasks(folder: Path, runs: Mapping[str, Mapping], flags: Sequence[str]) -> dict[str, SlurmRun]:
    """Runs of ``main_task_retrieval.py`` with these flags as srun starts its tasks; each writes to folder/name.

    runs: name -> what slurm_tasks.py lets a run say of itself, beside name and job.
    """
    with ExitStack() as ports:
        told = [{"name": n, "job": ports.enter_context(reserved_port()) - FIRST_PORT, **run} for n, run in runs.items()]
        script = str(ROOT / "tests" / "slurm_tasks.py")
        [(status, errors)] = finish([start([script, str(folder), json.dumps(told), *flags])], folder)
    assert status == 0, errors
    return {name: (folder / name, tasks) for name, tasks in json.loads((folder / "report.json").read_text()).items()}


@contextmanager
def small_disk(folder: Path, megabytes: int):
    """A tmpfs of a few megabytes on `folder` where this process may mount one; tells whether it could."""
    folder.mkdir()
    options = ["-t", "tmpfs", "-o", f"size={megabytes}m", "tmpfs", str(folder)]
    mounted = os.geteuid() == 0 and subprocess.run(["mount", *options], capture_output=True).returncode == 0
    try:
        yield mounted
    finally:
        if mounted:
            subprocess.run(["umount", str(folder)], check=True)
