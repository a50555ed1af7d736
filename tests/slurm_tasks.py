"""``main_task_retrieval.py`` as srun starts it, one run after another; a helper of launching.py.

    python slurm_tasks.py FOLDER RUNS FLAG...

RUNS is a JSON list of {"name": of its output folder in FOLDER, "job": its number} and, if other than that,
"tasks": 3, "flags": [], further ones, "how": "nothing" and "rank": 0, as failing_rank.py takes them. The imports are
paid once: a run is so many forks of this process, which computes nothing. At the end FOLDER/report.json holds, by the
runs' names, [exit status, standard error] of every task.
"""

import json
import os
import signal
import sys
from pathlib import Path

import failing_rank

if "--do_train" in sys.argv:  # DistributedDataParallel would in every task; it takes longer than torch
    import torch._dynamo  # noqa: F401

DEFAULTS = {"tasks": 3, "flags": [], "how": "nothing", "rank": 0}


def start(run: dict, task: int, folder: Path, flags: list[str]) -> int:
    """The process of one task; it ends as a process of its own would, its traceback printed by the interpreter."""
    process = os.fork()
    if process:
        return process
    for stream in (1, 2):
        os.dup2(os.open(folder / f"{run['name']}_{task}_{stream}.txt", os.O_WRONLY | os.O_CREAT), stream)
    os.environ |= {
        "SLURM_PROCID": str(task),
        "SLURM_NTASKS": str(run["tasks"]),
        "SLURM_LOCALID": str(task),
        "SLURM_JOB_NODELIST": "localhost",
        "SLURM_JOB_ID": str(run["job"]),
    }
    flags = [*flags, *run["flags"], "--output_dir", str(folder / run["name"])]
    sys.exit(failing_rank.main(run["how"], run["rank"], flags))


def one_run(run: dict, folder: Path, flags: list[str]) -> list[tuple[int, str]]:
    processes = [start(run, task, folder, flags) for task in range(run["tasks"])]
    frozen = run["rank"] if run["how"] == "freeze" else None
    ended = {task: os.waitpid(process, 0)[1] for task, process in enumerate(processes) if task != frozen}
    if frozen is not None:  # itself it ends only when killed, after the others
        os.kill(processes[frozen], signal.SIGKILL)
        ended[frozen] = os.waitpid(processes[frozen], 0)[1]
    errors = [(folder / f"{run['name']}_{task}_2.txt").read_text() for task in range(run["tasks"])]
    return [(os.waitstatus_to_exitcode(ended[task]), text) for task, text in enumerate(errors)]


if __name__ == "__main__":
    folder, runs, flags = Path(sys.argv[1]), json.loads(sys.argv[2]), sys.argv[3:]
    report = {run["name"]: one_run(DEFAULTS | run, folder, flags) for run in runs}
    (folder / "report.json").write_text(json.dumps(report))
