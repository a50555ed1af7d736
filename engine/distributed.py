"""Everything that concerns several processes; the only reader of RANK, LOCAL_RANK, WORLD_SIZE and SLURM_*.

With one process every function here is the identity.
"""

from __future__ import annotations

import os
import re
import sys
import time
import traceback
from collections.abc import Mapping
from dataclasses import dataclass, field
from datetime import timedelta
from typing import NoReturn

import torch
import torch.distributed as dist

from engine.rank_watch import GRACE_SECONDS, RankWatch, leave

MEETING_TIMEOUT = timedelta(minutes=5)
COLLECTIVE_TIMEOUT = timedelta(minutes=30)  # a rank may wait this long for one that writes a checkpoint or compiles
_watch: list[RankWatch] = []  # the watch of this process; empty when it is alone


@dataclass(frozen=True)
class World:
    """Who this process is."""

    rank: int
    size: int
    device: torch.device

    @property
    def is_main(self) -> bool:
        return self.rank == 0


@dataclass(frozen=True)
class Place:
    """What the launcher said: this process among all, and where they meet if the launcher did not set that itself."""

    rank: int = 0
    size: int = 1
    local_rank: int = 0
    meeting_point: Mapping[str, str] = field(default_factory=dict)  # MASTER_ADDR and MASTER_PORT under SLURM
    one_device_each: bool = False  # SLURM may show each task its own GPU only


def first_host(nodelist: str) -> str:
    """The first host of SLURM's compressed list: ``gpu[003-005,9],login1`` -> ``gpu003``. Raises ValueError."""
    first = re.match(r"(?:[^,\[\]\s]|\[[^\[\]]+\])+", nodelist)
    if not first:
        raise ValueError(f"SLURM_JOB_NODELIST {nodelist!r} is not a list of hosts; set MASTER_ADDR to rank 0's host")
    return re.sub(r"\[([^],-]+)[^]]*\]", r"\1", first.group())


def read_place(env: Mapping[str, str]) -> Place:
    """The launcher's environment (torchrun, torch.distributed.launch, srun) -> :class:`Place`; alone without one.

    A launcher started by srun wins over srun. Under srun the meeting point is the first host of the step and a port
    derived from the job's id, so that all tasks agree without talking and two jobs on one host do not meet.
    """
    if "RANK" in env and "WORLD_SIZE" in env:
        return Place(int(env["RANK"]), int(env["WORLD_SIZE"]), int(env.get("LOCAL_RANK", 0)))
    tasks = int(env.get("SLURM_STEP_NUM_TASKS", env.get("SLURM_NTASKS", 1)))
    if "SLURM_PROCID" not in env or tasks < 2:
        return Place()
    nodes = env.get("SLURM_STEP_NODELIST", env.get("SLURM_JOB_NODELIST", "localhost"))
    job, step = (int(re.sub(r"\D", "", env.get(name, "")) or 0) for name in ("SLURM_JOB_ID", "SLURM_STEP_ID"))
    meeting_point = {"MASTER_PORT": str(15000 + (job + 7919 * step) % 15000)}
    if "MASTER_ADDR" not in env:
        meeting_point["MASTER_ADDR"] = first_host(nodes)
    return Place(int(env["SLURM_PROCID"]), tasks, int(env.get("SLURM_LOCALID", 0)), meeting_point, True)


def choose_device(name: str, place: Place) -> torch.device:
    """``auto`` takes CUDA where there is one. Raises ValueError when CUDA is asked for by name and absent."""
    if name == "cpu" or (name == "auto" and not torch.cuda.is_available()):
        return torch.device("cpu")
    if not torch.cuda.is_available():
        raise ValueError("--device cuda: no CUDA device is visible to torch; use --device cpu or --device auto")
    count = torch.cuda.device_count()
    index = 0 if count == 1 and place.one_device_each else place.local_rank
    if index >= count:
        raise ValueError(
            f"--device {name}: local rank {index} but {count} CUDA devices; start at most {count} "
            "processes on this host, or use --device cpu"
        )
    torch.cuda.set_device(index)
    return torch.device("cuda", index)


def setup(device: str) -> World:
    """Read the launcher's environment, choose the device, join the other ranks: NCCL on CUDA, gloo on the CPU.

    Raises ValueError when the device is not there or the others cannot be met.
    """
    place = read_place(os.environ)
    if place.size == 1:
        return World(0, 1, choose_device(device, place))
    for name, value in place.meeting_point.items():
        os.environ.setdefault(name, value)
    store = _meet(place)
    # The watch first: a rank whose device is not there must not keep the others waiting.
    _watch.append(RankWatch(dist.PrefixStore("watch", store), place.rank, place.size))
    chosen = choose_device(device, place)
    on_cuda = chosen.type == "cuda"
    dist.init_process_group(
        "nccl" if on_cuda else "gloo",
        store=store,
        rank=place.rank,
        world_size=place.size,
        timeout=COLLECTIVE_TIMEOUT,
        device_id=chosen if on_cuda else None,
    )
    return World(place.rank, place.size, chosen)


def _meet(place: Place) -> dist.Store:
    try:
        store, _, _ = next(dist.rendezvous("env://", place.rank, place.size, timeout=MEETING_TIMEOUT))
    except (dist.DistError, ValueError) as error:
        where = f"MASTER_ADDR={os.environ.get('MASTER_ADDR')} MASTER_PORT={os.environ.get('MASTER_PORT')}"
        raise ValueError(
            f"rank {place.rank} did not meet the other {place.size - 1} processes at {where}: {error}. "
            "Were all of them started, and is the port free?"
        ) from error
    return store


def shutdown() -> None:
    """Leave together with the others, if there are any; whoever is first waits, still watching."""
    if dist.is_initialized():
        dist.barrier()
        while _watch:
            _watch.pop().stop()
        dist.destroy_process_group()


def in_company() -> bool:
    """Whether other ranks have been met and not left yet."""
    return bool(_watch)


def fail(error: Exception) -> NoReturn:
    """End all ranks because of `error`, showing this rank's traceback unless another rank failed first."""
    watch = _watch[0]
    who = f"rank {watch.rank} of {watch.size}"
    # Torch reports a lost peer as RuntimeError; ask why it was lost before blaming this rank.
    elsewhere = watch.failure_elsewhere(GRACE_SECONDS) if isinstance(error, RuntimeError) else None
    if elsewhere:
        leave(f"{who} ends: {elsewhere}")
    _tell_and_leave(f"{who} failed: {type(error).__name__}: {error}", "".join(traceback.format_exception(error)), 1)


def stop_all(reason: str, status: int) -> NoReturn:
    """End all ranks because this one was asked to stop."""
    _tell_and_leave(f"rank {_watch[0].rank} was {reason}", "", status)


def _tell_and_leave(what: str, more: str, status: int) -> NoReturn:
    print(what, more, sep="\n" if more else "", file=sys.stderr, flush=True)
    _watch[0].report(what)
    if _watch[0].rank == 0:
        time.sleep(GRACE_SECONDS)  # this process may hold the store: the others have to read the report first
    leave("", status)
