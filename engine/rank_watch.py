"""One rank that fails ends all ranks: a thread that watches the others through the store they met at.

gloo notices a lost peer by itself; NCCL, and ranks that wait for a slow one, would wait for the collective's timeout.
"""

from __future__ import annotations

import os
import sys
import threading
import time
from typing import NoReturn

from torch.distributed import Store

POLL_SECONDS = 1.0
SILENT_SECONDS = 45.0  # a rank that was killed leaves no word; after this long without a sign of life it counts as lost
GRACE_SECONDS = 3.0


class RankWatch:
    """Sends signs of life, looks for failures, and ends this process when another rank has failed or fell silent.

    store: shared by all ranks. Each rank listens to the next one only, so the load on the store is W messages a
    second; a failure is known to all through the one key ``failure``.
    """

    def __init__(self, store: Store, rank: int, size: int) -> None:
        self.store, self.rank, self.size, self.next = store, rank, size, (rank + 1) % size
        self.seen: str | None = None  # the failure that the thread came across
        self.stopped = threading.Event()
        self.thread = threading.Thread(target=self._watch, name="rank watch", daemon=True)
        self.thread.start()

    def report(self, what: str) -> None:
        """Tell the other ranks that this one, or one it listens to, has failed; the first report stands."""
        if self.store.add("failures", 1) == 1:
            self.store.set("failure", f"{self.rank}\n{what}")

    def failure_elsewhere(self, seconds: float) -> str | None:
        """What another rank reported, waiting up to `seconds` for it; None when nothing or only our own report came."""
        deadline = time.monotonic() + seconds
        while not self.seen:
            try:
                if self.store.check(["failure"]):
                    return self._elsewhere()
            except RuntimeError as error:  # what torch raises when the process that holds the store is gone
                return f"the process that the ranks meet at is gone ({error})"
            if time.monotonic() >= deadline:
                return None
            time.sleep(0.1)
        return self.seen

    def _elsewhere(self) -> str | None:
        who, what = self.store.get("failure").decode().split("\n", 1)
        return None if int(who) == self.rank else what

    def stop(self) -> None:
        self.stopped.set()
        self.thread.join()

    def _watch(self) -> None:
        heard, heard_at = -1, time.monotonic()
        while not self.stopped.wait(POLL_SECONDS):
            try:
                self.store.add(f"alive {self.rank}", 1)
                beats = self.store.add(f"alive {self.next}", 0)
                failure = self._elsewhere() if self.store.check(["failure"]) else None
            except RuntimeError as error:
                failure = f"the process that the ranks meet at is gone ({error})"
            else:
                if beats != heard:
                    heard, heard_at = beats, time.monotonic()
                elif time.monotonic() - heard_at > SILENT_SECONDS:
                    failure = f"rank {self.next} has given no sign of life for {SILENT_SECONDS:.0f} s"
                    self.report(failure)
            self.seen = failure
            if failure and not self.stopped.wait(GRACE_SECONDS):  # a rank that is ending by itself says more
                leave(f"rank {self.rank} of {self.size} ends: {failure}")


def leave(message: str, status: int = 1) -> NoReturn:
    """Print and end this process without waiting for anyone: the peers that a clean exit would wait for are gone."""
    print(message, file=sys.stderr)
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)
