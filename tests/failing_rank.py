"""``main_task_retrieval.py`` in which one rank fails; a helper of test_launch.py.

    python failing_rank.py HOW RANK FLAG...

HOW: nothing, no rank fails; raise, a ValueError in the first step of RANK; kill, SIGKILL there; freeze, SIGSTOP there;
late, RANK joins the others 8 s after them, and that is all. The last two cut the time-out of collectives to 5 s.
"""

import os
import signal
import sys
import time
from datetime import timedelta
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))

from torch.distributed.elastic.multiprocessing.errors import record  # noqa: E402

import main_task_retrieval  # noqa: E402
from engine import distributed  # noqa: E402
from engine.step import Trainer  # noqa: E402


def fail_at_step(how: str, rank: int) -> None:
    original = Trainer.step

    def step(trainer, *arguments):
        if trainer.world.rank == rank:
            if how == "raise":
                raise ValueError("planned failure")
            os.kill(os.getpid(), {"kill": signal.SIGKILL, "freeze": signal.SIGSTOP}[how])
        return original(trainer, *arguments)

    Trainer.step = step


def main(how: str, rank: int, flags: list[str]) -> int:
    if how in ("freeze", "late"):
        distributed.COLLECTIVE_TIMEOUT = timedelta(seconds=5)
    if how == "late":
        if distributed.read_place(os.environ).rank == rank:
            time.sleep(8)
        distributed.setup("cpu")
        distributed.shutdown()
        return 0
    if how != "nothing":
        fail_at_step(how, rank)
    return record(main_task_retrieval.main)(flags)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1], int(sys.argv[2]), sys.argv[3:]))
