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


def gather_rows(x: Tensor) -> Tensor:
    """Concatenate `x` [n, ...] of all ranks along dim 0, in rank order; ranks may differ in n.

    Differentiable, and exact under DistributedDataParallel: every rank computes the same whole-batch loss from the
    result, the backward pass sums the ranks' gradients into the local rows, and DDP's division by the number of
    ranks makes of it the gradient that one process would compute on the whole batch.
    """
    if not dist.is_initialized():
        return x
    counts = gather_objects(len(x))
    longest = max(counts)
    padded = torch.cat([x, x.new_zeros(longest - len(x), *x.shape[1:])]) if len(x) < longest else x
    parts = _AllGather.apply(padded).split(longest)
    return torch.cat([part[:count] for part, count in zip(parts, counts)])


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
