"""Everything that concerns several processes; the only reader of RANK, LOCAL_RANK, WORLD_SIZE and SLURM_*.

With one process every function here is the identity.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from datetime import timedelta

import torch
import torch.distributed as dist
from torch import Tensor

from modules.representation import Representation, as_parts, pad_to


@dataclass(frozen=True)
class World:
    """Who this process is."""

    rank: int
    size: int
    device: torch.device

    @property
    def is_main(self) -> bool:
        return self.rank == 0


def choose_device(name: str, local_rank: int) -> torch.device:
    """``auto`` takes CUDA where there is one. Raises ValueError when CUDA is asked for by name and absent."""
    if name == "cpu" or (name == "auto" and not torch.cuda.is_available()):
        return torch.device("cpu")
    if not torch.cuda.is_available():
        raise ValueError("--device cuda: no CUDA device is visible to torch; use --device cpu or --device auto")
    if local_rank >= torch.cuda.device_count():
        raise ValueError(f"--device {name}: local rank {local_rank} but {torch.cuda.device_count()} CUDA devices")
    torch.cuda.set_device(local_rank)
    return torch.device("cuda", local_rank)


def setup(device: str) -> World:
    """Read the launcher's environment (torchrun, torch.distributed.launch, srun), join the group, choose the device."""
    env = os.environ
    if "RANK" in env and "WORLD_SIZE" in env:
        rank, size, local = int(env["RANK"]), int(env["WORLD_SIZE"]), int(env.get("LOCAL_RANK", 0))
    elif int(env.get("SLURM_NTASKS", 1)) > 1 and "SLURM_PROCID" in env and "MASTER_ADDR" in env:
        rank, size, local = (int(env[k]) for k in ("SLURM_PROCID", "SLURM_NTASKS", "SLURM_LOCALID"))
    else:
        rank, size, local = 0, 1, 0
    chosen = choose_device(device, local)
    if size > 1:
        dist.init_process_group(
            "nccl" if chosen.type == "cuda" else "gloo", rank=rank, world_size=size, timeout=timedelta(minutes=30)
        )
    return World(rank, size, chosen)


def shutdown() -> None:
    """Leave the process group, if there is one."""
    if dist.is_initialized():
        dist.destroy_process_group()


def barrier() -> None:
    if dist.is_initialized():
        dist.barrier()


def gather_rows(x: Representation | None, device: torch.device | None = None) -> Representation:
    """Concatenate `x` of all ranks along dim 0, in rank order: a tensor [n, ...] or a tuple of such.

    Ranks may differ in n, and in the other sizes (caption lengths): the smaller are padded with zeros. A rank without
    any item gives None and its `device`. Differentiable, and exact under DistributedDataParallel: every rank computes
    the same whole-batch loss from the result, the backward pass sums the ranks' gradients into the local rows, and
    DDP's division by the number of ranks makes of it the gradient that one process would compute on the whole batch.
    """
    if not dist.is_initialized():
        if x is None:
            raise ValueError("nothing to gather: no rank has an item")
        return x
    kinds = gather_objects(None if x is None else [(tuple(p.shape), p.dtype) for p in as_parts(x)])
    known = next((kind for kind in kinds if kind is not None), None)
    if known is None:
        raise ValueError("nothing to gather: no rank has an item")
    counts = [0 if kind is None else kind[0][0][0] for kind in kinds]
    gathered = []
    for i, (shape, dtype) in enumerate(known):
        part = torch.empty(0, *shape[1:], dtype=dtype, device=device) if x is None else as_parts(x)[i]
        largest = [max(sizes) for sizes in zip(*(kind[i][0] for kind in kinds if kind is not None))]
        padded = pad_to(part, largest)
        # Not every backend moves booleans.
        rows = _AllGather.apply(padded.byte() if dtype == torch.bool else padded).to(dtype)
        gathered.append(torch.cat([p[:n] for p, n in zip(rows.split(largest[0]), counts)]))
    several = gather_objects(isinstance(x, tuple))
    return tuple(gathered) if any(several) else gathered[0]


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


def gather_objects(value: object) -> list:
    """The value of every rank, in rank order; for small picklable things."""
    if not dist.is_initialized():
        return [value]
    values: list = [None] * dist.get_world_size()
    dist.all_gather_object(values, value)
    return values
