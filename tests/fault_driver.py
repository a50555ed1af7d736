"""Run ``main_task_retrieval.py`` again and again in processes that die as planned; a helper of test_resume.py.

    python fault_driver.py PLANS FLAG...

PLANS is a JSON list, one plan per process:
    {"kill_after_step": n}    SIGKILL itself after its n-th step, before anything is saved
    {"kill_in_write": n}      halfway through its n-th checkpoint_last.pt
    {"kill_before_last": 1}   between an epoch's weights and its checkpoint
    {"terminate_at_step": n}  SIGTERM to itself during the step
    {"full_disk": n}          its n-th checkpoint meets a full disk: "filler", a path on a small disk, is filled up, or,
                              without that, the size of files is limited
    {}                        run to the end
The imports are paid once: every process is a fork of this one, which computes nothing itself. Printed at the end: a
JSON list of [exit status, optimiser steps in checkpoint_last.pt].
"""

import errno
import io
import json
import os
import resource
import signal
import sys
import traceback
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))

import torch  # noqa: E402

import engine.resume  # noqa: E402
import engine.train  # noqa: E402
import main_task_retrieval  # noqa: E402
from engine.step import Trainer  # noqa: E402


def die() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def after_call(owner, name: str, number: int, act) -> None:
    """Have `act` happen right after the `number`-th call of ``owner.name``."""
    original, calls = getattr(owner, name), []

    def wrapped(*args, **kwargs):
        result = original(*args, **kwargs)
        calls.append(None)
        if len(calls) == number:
            act()
        return result

    setattr(owner, name, wrapped)


def at_write(number: int, act) -> None:
    """Have ``act(content, file)`` write the `number`-th checkpoint_last.pt of this process."""
    original, calls = torch.save, []

    def save(content, file):
        calls.append(None)
        (act if len(calls) == number else original)(content, file)

    class Torch:
        """torch as engine/resume.py sees it; pytorch_model.bin is written by another module."""

        def __getattr__(self, name):
            return save if name == "save" else getattr(torch, name)

    engine.resume.torch = Torch()


def half_a_write(content, file) -> None:
    whole = io.BytesIO()
    torch.save(content, whole)
    file.write(whole.getvalue()[: whole.tell() // 2])
    file.flush()
    die()


def full_disk(filler: str | None):
    def act(content, file) -> None:
        if filler is None:
            resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, resource.RLIM_INFINITY))
        else:
            with open(filler, "wb", buffering=0) as rest:
                try:
                    while rest.write(bytes(1 << 16)):
                        pass
                except OSError as error:
                    if error.errno != errno.ENOSPC:  # no space left is what this is for
                        raise
        torch.save(content, file)

    return act


def arrange(plan: dict) -> None:
    if "kill_after_step" in plan:
        after_call(Trainer, "step", plan["kill_after_step"], die)
    if "terminate_at_step" in plan:
        after_call(Trainer, "step", plan["terminate_at_step"], lambda: os.kill(os.getpid(), signal.SIGTERM))
    if "kill_before_last" in plan:
        after_call(engine.train, "write_history", plan["kill_before_last"], die)
    if "kill_in_write" in plan:
        at_write(plan["kill_in_write"], half_a_write)
    if "full_disk" in plan:
        at_write(plan["full_disk"], full_disk(plan.get("filler")))


def one_process(plan: dict, flags: list[str]) -> int:
    """Exit status of a fork that follows `plan`; minus the signal that ended it."""
    child = os.fork()
    if child == 0:
        try:
            arrange(plan)
            status = main_task_retrieval.main(flags)
        except BaseException:
            traceback.print_exc()
            status = 99
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)
    status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    if "filler" in plan:
        Path(plan["filler"]).unlink()
    return status


def saved_steps(folder: Path) -> int:
    path = folder / "checkpoint_last.pt"
    if not path.exists():
        return 0
    content = engine.resume.load_last(path)
    counts = {state["step"] for state in content["optimizer"]["state"].values()}
    return max(counts, default=0)


if __name__ == "__main__":
    torch.set_num_threads(1)
    plans, flags = json.loads(sys.argv[1]), sys.argv[2:]
    out = Path(flags[flags.index("--output_dir") + 1])
    report = [(one_process(plan, flags), saved_steps(out)) for plan in plans]
    print("\n" + json.dumps(report))
