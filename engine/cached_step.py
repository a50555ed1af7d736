"""The exact gradient of a large batch in the memory of a small one.

GradCache (Gao et al., arXiv 2101.06983): the contrastive loss needs all representations of the batch at once, but not
the activations behind them. So: encode piece by piece without keeping activations; take the loss of all
representations and its gradient with respect to them; encode again piece by piece, now backpropagating that gradient.
Cost: one more forward pass.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from typing import Protocol

import torch
from torch import Tensor

from engine.gather import average_gradients, gather_rows
from modules.representation import Representation, as_parts


class TwoPhaseModel(Protocol):
    """What the step needs of a model: encoders of each side, and the loss of what they give."""

    def encode_text(self, token_ids: Tensor, token_mask: Tensor) -> Representation: ...
    def encode_video(self, frames: Tensor, frame_mask: Tensor) -> Representation: ...
    def loss(self, text: Representation, video: Representation, generator: torch.Generator | None) -> Tensor: ...
    def parameters(self): ...


class RandomState:
    """Torch's generators as they are now, so that a second pass can draw the same (dropout) as the first."""

    def __init__(self, device: torch.device) -> None:
        self.cpu = torch.get_rng_state()
        self.cuda = torch.cuda.get_rng_state(device) if device.type == "cuda" else None
        self.device = device

    def restore(self) -> None:
        torch.set_rng_state(self.cpu)
        if self.cuda is not None:
            torch.cuda.set_rng_state(self.cuda, self.device)


def _leaves(parts: Sequence[Representation]) -> Representation:
    """Representations of the pieces -> that of the whole, as leaves whose gradient will be wanted (masks excepted)."""
    if isinstance(parts[0], Tensor):
        whole = torch.cat(list(parts))
        return whole.requires_grad_(whole.is_floating_point())
    return tuple(_leaves([part[i] for part in parts]) for i in range(len(parts[0])))


def cached_backward(
    model: TwoPhaseModel,
    arrays: Sequence[Tensor],
    pieces: int,
    device: torch.device,
    autocast: Callable[[], AbstractContextManager],
    scale: Callable[[Tensor], Tensor] = lambda loss: loss,
    draws: torch.Generator | None = None,
) -> Tensor:
    """Loss of the whole batch over all ranks (a detached scalar); the gradient is left in ``.grad`` on every rank.

    arrays: token_ids int64 [B, L], token_mask bool [B, L], frames uint8 [B, T, 3, S, S], frame_mask bool [B, T] of
    this rank; they are cut into at most `pieces` pieces, and only one piece at a time moves to `device`. `scale` is
    applied to the loss before backpropagation (the loss scale of float16); `draws` goes to the model's loss.
    """
    cuts = [x.chunk(pieces) for x in arrays]
    jobs = [(model.encode_text, piece) for piece in zip(*cuts[:2])]
    jobs += [(model.encode_video, piece) for piece in zip(*cuts[2:])]
    texts = len(cuts[0])

    def encode(job: tuple[Callable, Sequence[Tensor]]) -> Representation:
        with autocast():
            return job[0](*(x.to(device, non_blocking=True) for x in job[1]))

    outputs, states = [], []
    with torch.no_grad():
        for job in jobs:
            states.append(RandomState(device))
            outputs.append(encode(job))
    text, video = _leaves(outputs[:texts]), _leaves(outputs[texts:])
    del outputs
    with autocast():
        loss = model.loss(gather_rows(text), gather_rows(video), draws)
    scale(loss).backward()

    after = RandomState(device)
    for side, first in ((text, 0), (video, texts)):
        members = [m.grad.split(len(jobs[first][1][0])) if m.grad is not None else None for m in as_parts(side)]
        for number in range(texts):
            states[first + number].restore()
            again = as_parts(encode(jobs[first + number]))
            wanted = [(x, g[number]) for x, g in zip(again, members) if g is not None and x.requires_grad]
            if wanted:
                torch.autograd.backward(*map(list, zip(*wanted)))
    after.restore()
    average_gradients(model.parameters())
    return loss.detach()
