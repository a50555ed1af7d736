"""One run, one folder: ``.running`` in --output_dir says who writes there, and keeps others out."""

from __future__ import annotations

import contextlib
import json
import os
import shlex
import signal
import socket
import threading
from collections.abc import Iterator, Sequence
from datetime import datetime
from pathlib import Path
from tempfile import NamedTemporaryFile
from typing import Any

from engine.distributed import AgreedError, World, gather_objects
from engine.progress import log

LOCK = ".running"
BEAT = 30.0  # seconds between signs of life: the file's time of change
SILENCE = 300.0  # seconds without one after which a run on another machine counts as dead


def process_start(pid: int) -> str | None:
    """What tells a process from others that had its number: its start, in ticks since boot; None when there is none."""
    try:
        text = Path(f"/proc/{pid}/stat").read_text()
    except FileNotFoundError:
        return None if Path("/proc/self/stat").exists() else "unknown"
    fields = text.rsplit(")", 1)[1].split()
    return None if fields[0] in "ZX" else fields[19]


def machine() -> list[str]:
    """What two processes must share for a process number to mean the same: boot and process namespace, and the name."""
    found = [socket.gethostname()]
    with contextlib.suppress(OSError):
        found.append(Path("/proc/sys/kernel/random/boot_id").read_text().strip())
        found.append(os.readlink("/proc/self/ns/pid"))
    return found


def in_the_way(path: Path) -> str | None:
    """Who holds the lock, in words; None when nobody does any more."""
    try:
        silent = silence(path)
        owner: dict[str, Any] = json.loads(path.read_text())
    except FileNotFoundError:
        return None
    except ValueError:  # its run is just writing it, or died while it did
        return None if silent > SILENCE else f"a run that is starting, or another file: {path}"
    told = f"process {owner['pid']} on {owner['machine'][0]}, since {owner['since']}: {owner['command']}"
    if owner["machine"] == machine():
        alive = process_start(owner["pid"]) in (owner["start"], "unknown")
        return f"a run is writing to it: {told}. Wait for it, stop it, or take another --output_dir" if alive else None
    if silent > SILENCE:
        return None
    rule = (
        f"Without a sign of life for {SILENCE / 60:.0f} minutes it will be passed over; the last was {silent:.0f} s ago"
    )
    return f"a run on another machine is writing to it: {told}. {rule}. If you know that it is dead: rm {path}"


def silence(path: Path) -> float:
    """Seconds since the file was changed, by the clock of its file system: those of two machines may differ."""
    with NamedTemporaryFile(dir=path.parent, prefix=".clock") as now:
        return os.stat(now.name).st_mtime - path.stat().st_mtime


def take(folder: Path, command: Sequence[str]) -> Path:
    """Make the lock. Raises ValueError when another run has it; the lock of a dead one is taken over."""
    path = folder / LOCK
    content = {"machine": machine(), "pid": os.getpid(), "start": process_start(os.getpid())}
    content |= {"since": datetime.now().isoformat(" ", "seconds"), "command": shlex.join(command)}
    while True:
        try:
            with open(path, "x") as file:
                json.dump(content, file, indent=1)
            return path
        except FileExistsError:
            pass
        with contextlib.suppress(FileNotFoundError):
            before = path.stat()
            if owner := in_the_way(path):
                raise ValueError(f"--output_dir {folder}: {owner}")
            remove(path, before)


def remove(path: Path, seen: os.stat_result) -> None:
    """Remove the lock that was `seen`, and no other that another process has made in its place meanwhile."""
    aside = path.with_name(f"{LOCK}.{os.getpid()}.{threading.get_ident()}")
    os.rename(path, aside)
    if (aside.stat().st_ino, aside.stat().st_mtime_ns) != (seen.st_ino, seen.st_mtime_ns):
        with contextlib.suppress(FileExistsError):
            os.link(aside, path)
    else:
        log.warning("%s was left by a run that is no more: taken over", path)
    aside.unlink()


@contextlib.contextmanager
def locked(folder: Path, world: World, command: Sequence[str]) -> Iterator[None]:
    """Hold the folder for this run; rank 0 does so for all. Raises AgreedError."""
    path, problem = None, ""
    if world.is_main:
        try:
            path = take(folder, command)
        except (ValueError, OSError) as error:
            problem = str(error)
    if problem := gather_objects(problem)[0]:
        raise AgreedError(problem)
    if path is None:
        yield
        return
    mine, over = path.stat().st_ino, threading.Event()
    beating = threading.Thread(target=live, args=(path, mine, over), daemon=True)
    beating.start()
    try:
        yield
    finally:
        over.set()
        beating.join()
        with contextlib.suppress(FileNotFoundError):
            if path.stat().st_ino == mine:
                path.unlink()


def live(path: Path, mine: int, over: threading.Event) -> None:
    """Give signs of life; end the run if another one has taken its folder over, as after a long suspension."""
    while not over.wait(BEAT):
        with contextlib.suppress(OSError):
            if path.stat().st_ino != mine:
                log.error("%s is now another run's: this one stops", path)
                os.kill(os.getpid(), signal.SIGTERM)
                return
            os.utime(path)
