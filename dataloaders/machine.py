"""What this process may use of the machine: cores and memory, as scheduler and control groups limit them."""

import math
import os
from collections.abc import Iterator
from pathlib import Path

CGROUPS = Path("/sys/fs/cgroup")
MOST_WORKERS = 16  # by default; more seldom help and each has clips in memory


def usable_cores() -> int:
    """Cores that this process can keep busy: those of its affinity mask, or less by a quota of its control group."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    quotas = []
    for folder in _own_groups("cpu"):
        if words := _read(folder / "cpu.max").split():  # version 2: "200000 100000", or "max 100000"
            quotas += [int(words[0]) / int(words[1])] if words[0] != "max" else []
        elif quota := _read(folder / "cpu.cfs_quota_us"):  # version 1, -1 for none
            quotas += [int(quota) / int(_read(folder / "cpu.cfs_period_us"))] if int(quota) > 0 else []
    return max(1, min([cores, *map(math.ceil, quotas)]))


def default_workers(processes: int) -> int:
    """Loader workers for one of `processes` processes of a run on this machine."""
    return max(1, min(usable_cores() // processes, MOST_WORKERS))


def free_memory() -> float:
    """Bytes that this process could still get: what the system has left, or less by its control groups' limits."""
    found = [math.inf]
    for line in _read(Path("/proc/meminfo")).splitlines():
        if line.startswith("MemAvailable:"):
            found.append(int(line.split()[1]) * 1024.0)
    for folder in _own_groups("memory"):
        limit = _read(folder / "memory.max") or _read(folder / "memory.limit_in_bytes")
        if limit.strip().isdigit():
            stat = dict(line.split() for line in _read(folder / "memory.stat").splitlines())
            taken = [int(stat.get(name, 0)) for name in ("anon", "shmem", "total_rss", "total_shmem")]
            found.append(float(limit) - sum(taken))  # what the page cache holds can be had back
    return max(0.0, min(found))


def _own_groups(controller: str) -> Iterator[Path]:
    """Folders of this process's control groups, of version 1 and 2, up to the root."""
    for line in _read(Path("/proc/self/cgroup")).splitlines():
        _, controllers, inside = line.split(":", 2)
        if controllers and controller not in controllers.split(","):
            continue
        root = CGROUPS / controllers if controllers else CGROUPS
        root = root if root.is_dir() else CGROUPS / controller
        # In a container the path may be that of the host; its root is there in any case.
        path = root / inside.lstrip("/")
        yield from (folder for folder in (path, *path.parents) if folder.is_relative_to(root) and folder.is_dir())


def _read(path: Path) -> str:
    try:
        return path.read_text()
    except OSError:
        return ""
