"""Several processes: launching, ranks, devices and collectives.

The only reader of RANK, LOCAL_RANK, WORLD_SIZE and SLURM_*. With one process every collective is the identity. Tensors
travel over NCCL on CUDA and over gloo on the CPU; integers and objects always over gloo, so they wait for no kernel.
A rank that fails leaves with its traceback. Ending the others is the launcher's work (torchrun's agent, or
``srun --kill-on-bad-exit=1``); where there is none, they fail at their next collective, at the latest by its time-out.
"""

import os
import re
import socket
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import timedelta

import torch
import torch.distributed as dist
from torch import Tensor

from modules.representation import Representation, as_float32, concat, each, pad_to

MEETING_TIMEOUT = timedelta(minutes=5)
COLLECTIVE_TIMEOUT = timedelta(minutes=30)  # a rank may wait this long for one that writes a checkpoint or compiles


class AgreedError(RuntimeError):
    """Every rank raises it, at the same point and in the same words: rank 0 says them, and all leave together."""


@dataclass(frozen=True)
class World:
    """Who this process is. on_host: how many of the processes share its machine."""

    rank: int
    size: int
    device: torch.device
    on_host: int = 1

    @property
    def is_main(self) -> bool:
        return self.rank == 0


@dataclass(frozen=True)
class Place:
    """What the launcher said: this process among all, and where they meet if the launcher did not set that itself."""

    rank: int = 0
    size: int = 1
    local_rank: int = 0
    meeting_point: Mapping[str, str] = field(default_factory=dict)  # MASTER_ADDR and MASTER_PORT, under SLURM only


def first_host(nodelist: str) -> str:
    """The first host of SLURM's compressed list: ``gpu[003-005,9],login1`` -> ``gpu003``. Raises ValueError."""
    if not (first := re.match(r"(?:[^,\[\]\s]|\[[^\[\]]+\])+", nodelist)):
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
    return Place(int(env["SLURM_PROCID"]), tasks, int(env.get("SLURM_LOCALID", 0)), meeting_point)


def choose_device(name: str, place: Place) -> torch.device:
    """``auto`` takes CUDA where there is one. Raises ValueError when CUDA is asked for by name and absent."""
    if name == "cpu" or (name == "auto" and not torch.cuda.is_available()):
        return torch.device("cpu")
    if not torch.cuda.is_available():
        raise ValueError("--device cuda: no CUDA device is visible to torch; use --device cpu or --device auto")
    count = torch.cuda.device_count()
    index = 0 if count == 1 and place.meeting_point else place.local_rank  # SLURM may show a task its own GPU only
    if index >= count:
        problem = f"--device {name}: local rank {index} but {count} CUDA devices"
        raise ValueError(f"{problem}; start at most {count} processes on this host, or use --device cpu")
    torch.cuda.set_device(index)
    torch.backends.cudnn.allow_tf32 = False  # --precision fp32 is float32, also in the patch convolution
    # cuDNN's attention plans anew for every shape, and batches differ in real frames and in tokens.
    torch.backends.cuda.enable_cudnn_sdp(False)
    return torch.device("cuda", index)


def setup(device: str) -> World:
    """Read the launcher's environment, choose the device, join the other ranks.

    Raises ValueError when the device is not there, the others cannot be met, or have another kind of device.
    """
    place = read_place(os.environ)
    if place.size == 1:
        return World(0, 1, choose_device(device, place))
    for name, value in place.meeting_point.items():
        os.environ.setdefault(name, value)
    try:
        store, _, _ = next(dist.rendezvous("env://", place.rank, place.size, timeout=MEETING_TIMEOUT))
        chosen = same_kind_of_device(device, place, store)
    except dist.DistError as error:
        where = " ".join(f"{name}={os.environ.get(name)}" for name in ("MASTER_ADDR", "MASTER_PORT"))
        problem = f"rank {place.rank} did not meet the other {place.size - 1} processes at {where}: {error}"
        raise ValueError(f"{problem}. Were all of them started, and is the port free?") from error
    backend, device_id = ("cpu:gloo,cuda:nccl", chosen) if chosen.type == "cuda" else ("gloo", None)
    dist.init_process_group(backend, None, COLLECTIVE_TIMEOUT, place.size, place.rank, store, device_id=device_id)
    hosts = gather_objects(socket.gethostname())
    return World(place.rank, place.size, chosen, hosts.count(hosts[place.rank]))


def same_kind_of_device(name: str, place: Place, store: dist.Store) -> torch.device:
    """This rank's device. Raises ValueError naming the ranks that chose another kind, or have none."""
    chosen = None
    try:
        chosen = choose_device(name, place)
    finally:  # a rank without a device tells the others, which would wait for it
        store.set(f"device of rank {place.rank}", chosen.type if chosen else "none")
    kinds = [store.get(f"device of rank {rank}").decode() for rank in range(place.size)]
    most = max(("cuda", "cpu"), key=kinds.count)
    if odd := [f"rank {rank}: {kind}" for rank, kind in enumerate(kinds) if kind != most]:
        problem = f"the ranks must have the same kind of device; most have {most}, but {', '.join(odd)}"
        raise ValueError(f"--device {name}: {problem}. Check the driver on the hosts of those, or use --device cpu")
    return chosen


def shutdown() -> None:
    """Leave together with the others, if there are any."""
    if dist.is_initialized():
        barrier()
        leave()


def leave() -> None:
    """End the threads of the process group: the end of Python would find them running and abort."""
    if dist.is_initialized():
        dist.destroy_process_group()


@contextmanager
def main_first() -> Iterator[None]:
    """Rank 0 goes through the block first, the others after it: for what one process should do, like a download."""
    follows = dist.is_initialized() and dist.get_rank() > 0
    if follows:
        barrier()
    yield
    if not follows:
        barrier()


def agree(*values: int) -> Tensor:
    """A few integers of every rank: int64 [W, n], in rank order, on the CPU."""
    mine = torch.tensor([values], dtype=torch.int64)
    if not dist.is_initialized():
        return mine
    everyone = [torch.empty_like(mine) for _ in range(dist.get_world_size())]
    dist.all_gather(everyone, mine)
    return torch.cat(everyone)


def barrier() -> None:
    agree(0)


def gather_objects(value: object) -> list:
    """The value of every rank, in rank order; for small picklable things, and not within a step."""
    if not dist.is_initialized():
        return [value]
    values: list = [None] * dist.get_world_size()
    dist.all_gather_object(values, value)
    return values


def gather_rows(x: Representation, counts: Sequence[int]) -> Representation:
    """Concatenate `x` of all ranks along dim 0, in rank order: a tensor [n, ...] or a tuple of such.

    counts: every rank's n, known from :func:`agree`; the other sizes are the same on all ranks. Floating tensors become
    float32 on the way, as their gradients are summed over the ranks. Differentiable, and exact under
    DistributedDataParallel: every rank computes the same whole-batch loss from the result, the backward pass sums the
    ranks' gradients into the local rows, and DDP divides by the number of ranks: the gradient of one process.
    """

    def gather(part: Tensor) -> Tensor:
        padded = pad_to(part, (max(counts), *part.shape[1:]))
        # Not every backend moves booleans.
        rows = _AllGather.apply(padded.byte() if part.dtype == torch.bool else padded).to(part.dtype)
        return torch.cat([share[:n] for share, n in zip(rows.split(max(counts)), counts)])

    return each(as_float32(x), gather) if dist.is_initialized() else x


class _AllGather(torch.autograd.Function):
    """Rows of all ranks, equally many each; backward sums over the ranks what each asks of the local rows."""

    @staticmethod
    def forward(ctx, x: Tensor) -> Tensor:
        ctx.rows = len(x)
        parts = [torch.empty_like(x) for _ in range(dist.get_world_size())]
        dist.all_gather(parts, x.contiguous())
        return torch.cat(parts)

    @staticmethod
    def backward(ctx, gradient: Tensor) -> Tensor:
        total = gradient.contiguous()
        dist.all_reduce(total)
        return total[dist.get_rank() * ctx.rows :][: ctx.rows]


def same_sizes(x: Representation | None, device: torch.device) -> Representation:
    """`x` padded with zeros to the largest sizes on any rank, dim 0 excepted, as :func:`gather_rows` wants it.

    A rank without any item gives None and gets a representation of no items on `device`.
    """
    mine = None if x is None else each(x, lambda part: part.new_empty(0, *part.shape[1:], device="cpu"))
    empty = concat([kind for kind in gather_objects(mine) if kind is not None])  # as wide as the widest
    empty = each(empty, lambda part: part.to(device))
    return empty if x is None else concat([x, empty])


def average_gradients(parameters: Iterable[Tensor]) -> None:
    """Replace every gradient by its mean over the ranks, all in one collective: what DDP does piece by piece."""
    if not dist.is_initialized():
        return
    gradients = [p.grad for p in parameters if p.grad is not None]
    flat = torch.cat([g.flatten() for g in gradients])
    dist.all_reduce(flat)
    means = (flat / dist.get_world_size()).split([g.numel() for g in gradients])
    for gradient, mean in zip(gradients, means):
        gradient.copy_(mean.view_as(gradient))


def broadcast_parameters(parameters: Iterable[Tensor]) -> None:
    """Give every rank rank 0's values."""
    if dist.is_initialized():
        for parameter in parameters:
            dist.broadcast(parameter.detach(), src=0)
