"""Collectives over the ranks: gathering rows and objects, averaging gradients. Alone, each is the identity."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager

import torch
import torch.distributed as dist
from torch import Tensor

from modules.representation import Representation, as_parts, pad_to


@contextmanager
def main_first() -> Iterator[None]:
    """Rank 0 goes through the block first, the others after it: for what one process should do, like a download."""
    follows = dist.is_initialized() and dist.get_rank() > 0
    if follows:
        barrier()
    yield
    if not follows:
        barrier()


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
    kinds = gather_objects(None if x is None else [(tuple(p.shape), p.dtype) for p in as_parts(x)])
    known = next((kind for kind in kinds if kind is not None), None)
    if known is None:
        raise ValueError("nothing to gather: no rank has an item")
    if not dist.is_initialized():
        return x
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


def average_gradients(parameters: Iterable[Tensor]) -> None:
    """Replace every gradient by its mean over the ranks, all in one collective: what DDP does piece by piece."""
    if not dist.is_initialized():
        return
    gradients = [p.grad for p in parameters if p.grad is not None]
    flat = torch.cat([g.flatten() for g in gradients])
    dist.all_reduce(flat)
    flat /= dist.get_world_size()
    for gradient, mean in zip(gradients, flat.split([g.numel() for g in gradients])):
        gradient.copy_(mean.view_as(gradient))


def broadcast_parameters(parameters: Iterable[Tensor]) -> None:
    """Give every rank rank 0's values."""
    if dist.is_initialized():
        for parameter in parameters:
            dist.broadcast(parameter.detach(), src=0)
