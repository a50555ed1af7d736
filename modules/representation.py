"""What a head makes of a text or a video: a tensor, or a tuple of tensors, with one row per item in dim 0.

A tuple serves heads that keep more than one vector per item: tokens [N, L, D], their mask [N, L] and so on. Batches
differ in L, so joining them pads every dimension after the first with zeros (False in a mask).
"""

from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

Representation = Tensor | tuple[Tensor, ...]


def as_parts(x: Representation) -> tuple[Tensor, ...]:
    return x if isinstance(x, tuple) else (x,)


def each(x: Representation, change: Callable[[Tensor], Tensor]) -> Representation:
    """`change` applied to every tensor; a tensor stays a tensor, a tuple a tuple."""
    return tuple(change(part) for part in x) if isinstance(x, tuple) else change(x)


def count(x: Representation) -> int:
    """How many items."""
    return len(as_parts(x)[0])


def take(x: Representation, rows: slice | Tensor) -> Representation:
    """Some of the items, by slice or index."""
    return each(x, lambda part: part[rows])


def as_float32(x: Representation) -> Representation:
    """Floating tensors in float32; masks as they are."""
    return each(x, lambda part: part.float() if part.is_floating_point() else part)


def pad_to(x: Tensor, shape: Sequence[int]) -> Tensor:
    """`x` with zeros after its entries up to `shape`."""
    if not any(missing := [want - have for want, have in zip(shape, x.shape)]):
        return x
    return F.pad(x, [n for extra in reversed(missing) for n in (0, extra)])


def concat(batches: Sequence[Representation]) -> Representation:
    """All items of the batches in order, the shorter batches padded to the longest."""
    joined = []
    for parts in zip(*(as_parts(batch) for batch in batches)):
        longest = [max(sizes) for sizes in zip(*(part.shape[1:] for part in parts))]
        joined.append(torch.cat([pad_to(part, (len(part), *longest)) for part in parts]))
    return tuple(joined) if isinstance(batches[0], tuple) else joined[0]
