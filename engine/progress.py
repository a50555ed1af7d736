"""Logging and progress: a bar on a terminal, plain lines elsewhere, rank 0 only."""

from __future__ import annotations

import logging
import sys
import time
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import TypeVar

from tqdm import tqdm

T = TypeVar("T")
log = logging.getLogger("retrieval")
SECONDS_BETWEEN_LINES = 15


def setup_logging(folder: Path | None, is_main: bool) -> None:
    """Messages to standard output and, with more detail, to ``folder/log.txt``; other ranks report warnings only."""
    log.handlers.clear()
    log.propagate = False
    log.setLevel(logging.DEBUG if is_main else logging.WARNING)
    console = logging.StreamHandler(sys.stdout)
    console.setLevel(logging.INFO)
    console.setFormatter(logging.Formatter("%(message)s"))
    log.addHandler(console)
    if is_main and folder is not None:
        to_file = logging.FileHandler(folder / "log.txt", encoding="utf-8")
        to_file.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(message)s"))
        log.addHandler(to_file)


def progress(items: Iterable[T], description: str, total: int | None = None, enabled: bool = True) -> Iterator[T]:
    """Pass `items` through, showing how far we are: tqdm on a terminal, a line now and then elsewhere."""
    total = len(items) if total is None and hasattr(items, "__len__") else total  # type: ignore[arg-type]
    if not enabled:
        yield from items
    elif sys.stderr.isatty():
        yield from tqdm(items, desc=description, total=total, dynamic_ncols=True, leave=False)
    else:
        last = time.monotonic()
        for done, item in enumerate(items, start=1):
            yield item
            if time.monotonic() - last > SECONDS_BETWEEN_LINES:
                last = time.monotonic()
                log.info("%s: %d%s", description, done, f" of {total}" if total else "")
