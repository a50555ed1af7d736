"""``main_task_retrieval.py`` in which one rank fails; a helper of test_launch.py.

    python failing_rank.py HOW RANK FLAG...

HOW: raise, a ValueError in the first step of RANK; kill, SIGKILL there; freeze, SIGSTOP there. The time after which a
silent rank counts as lost is cut to 5 s.
"""

import os
import signal
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))

import main_task_retrieval  # noqa: E402
from engine import rank_watch  # noqa: E402
from engine.step import Trainer  # noqa: E402


def fail_at_step(how: str, rank: int) -> None:
    original = Trainer.step

    def step(trainer, batch):
        if trainer.world.rank == rank:
            if how == "raise":
                raise ValueError("planned failure")
            os.kill(os.getpid(), {"kill": signal.SIGKILL, "freeze": signal.SIGSTOP}[how])
        return original(trainer, batch)

    Trainer.step = step


if __name__ == "__main__":
    rank_watch.SILENT_SECONDS = 5.0
    fail_at_step(sys.argv[1], int(sys.argv[2]))
    sys.exit(main_task_retrieval.main(sys.argv[3:]))
