"""One optimiser step, whatever the number of ranks and of pieces: loss, exact gradient, clipping, update."""

from __future__ import annotations

import math
import random
import shutil
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from checkpoints.names import parameter_name
from engine.compat import Compat
from engine.distributed import World, agree, average_gradients, broadcast_parameters, gather_objects, gather_rows
from engine.evaluate import autocast
from engine.options import TrainOptions
from modules.model import VideoTextModel
from modules.optim import BertAdam, parameter_groups
from modules.representation import Representation, as_parts, concat, each, pad_to


class TrainingError(RuntimeError):
    """Training cannot go on; the message says at which step and with which clips."""


class NonFiniteError(TrainingError):
    """A loss or gradient is NaN or infinite; nothing was updated. `video_ids`: the clips of all ranks' batches."""

    def __init__(self, what: str, video_ids: list[str]) -> None:
        super().__init__(what)
        self.what, self.video_ids = what, video_ids


def build_optimizer(model: VideoTextModel, options: TrainOptions, compat: Compat, total_steps: int) -> BertAdam:
    """BertAdam with the settings of CLIP4Clip over the four parameter groups."""
    named = [(parameter_name(name), parameter) for name, parameter in model.named_parameters()]
    new = model.new_parts if compat.new_parts_at_lr else ()
    groups = parameter_groups(named, options.lr, options.coef_lr, options.weight_decay, compat.decays_all, new)
    return BertAdam(groups, lr=options.lr, warmup=options.warmup_proportion, t_total=total_steps, betas=(0.9, 0.98))


def trade(model: VideoTextModel, device: torch.device, grad_checkpointing: bool, compile_towers: bool) -> None:
    """Apply --grad_checkpointing (memory for time) and --compile (start-up for time) to the transformers in place.

    Names of parameters stay as they are. Raises ValueError when torch.compile has no C++ compiler to use.
    """
    if compile_towers and device.type == "cpu" and not any(map(shutil.which, ("g++", "clang++", "c++"))):
        raise ValueError("--compile needs a C++ compiler on the CPU and none is on PATH: install g++, or leave it out")
    for module in model.modules():
        if hasattr(module, "checkpointing"):
            module.checkpointing = grad_checkpointing
            if compile_towers:
                module.compile()


def random_state(device: torch.device) -> dict[str, Any]:
    """Every generator of this process, in types that torch.load reads with weights_only."""
    legacy: Any = np.random.get_state()
    name, keys, *rest = legacy
    state = {
        "python": random.getstate(),
        "torch": torch.get_rng_state(),
        "numpy": [name, torch.from_numpy(keys.astype(np.int64)), *rest],
    }
    return state | ({"cuda": torch.cuda.get_rng_state(device)} if device.type == "cuda" else {})


def set_random_state(state: dict[str, Any], device: torch.device) -> None:
    """Undo :func:`random_state`."""
    name, keys, *rest = state["numpy"]
    random.setstate(state["python"])
    np.random.set_state((name, keys.numpy().astype(np.uint32), *rest))
    torch.set_rng_state(state["torch"])
    if device.type == "cuda" and "cuda" in state:
        torch.cuda.set_rng_state(state["cuda"], device)


@dataclass(frozen=True)
class Shares:
    """What every rank knows of the others' shares of a batch; all that is sent in a step besides tensors."""

    counts: list[int]  # readable pairs of each rank
    signal: int  # that any rank received, 0 if none
    tokens: int  # of the longest caption
    frames: int  # of the longest clip

    @classmethod
    def of(cls, batch: Any, signal: int = 0) -> Shares:
        """All ranks must call it."""
        tokens = 0 if batch.token_ids is None else batch.token_ids.shape[1]
        told = agree(len(batch.frames), signal, tokens, batch.frames.shape[1])
        return cls(told[:, 0].tolist(), *told[:, 1:].amax(dim=0).tolist())

    def pad(self, batch: Any) -> tuple[Tensor, ...]:
        """token_ids, token_mask, frames and frame_mask of `batch`, as long as the longest of all ranks."""
        text, video = (batch.token_ids, batch.token_mask), (batch.frames, batch.frame_mask)
        wanted = [(x, self.tokens) for x in text] + [(x, self.frames) for x in video]
        return tuple(pad_to(x, (len(x), longest, *x.shape[2:])) for x, longest in wanted)


def cached_backward(
    model: VideoTextModel,
    arrays: Sequence[Tensor],
    pieces: int,
    device: torch.device,
    autocast: Callable[[], AbstractContextManager],
    scale: Callable[[Tensor], Tensor] = lambda loss: loss,
    draws: torch.Generator | None = None,
    gather: Callable[[Representation], Representation] = lambda rows: rows,
) -> Tensor:
    """The exact gradient of a large batch in the memory of a small one; returns the loss, a detached scalar.

    GradCache (Gao et al., arXiv 2101.06983): the contrastive loss needs all representations of the batch at once, but
    not the activations behind them. So: encode piece by piece without keeping activations; take the loss of all
    representations and its gradient with respect to them; encode again piece by piece, now backpropagating that
    gradient. Cost: one more forward pass.

    arrays: token_ids int64 [B, L], token_mask bool [B, L], frames uint8 [B, T, 3, S, S], frame_mask bool [B, T] of
    this rank; they are cut into at most `pieces` pieces, and only one piece at a time moves to `device`. `scale` is
    applied to the loss before backpropagation (the loss scale of float16); `draws` goes to the model's loss; `gather`
    joins the ranks' rows. The gradient of all ranks' batches is left in ``.grad`` on every rank.
    """
    cuts = [x.chunk(pieces) for x in arrays]
    jobs = [(model.encode_text, piece) for piece in zip(*cuts[:2])]
    jobs += [(model.encode_video, piece) for piece in zip(*cuts[2:])]
    texts = len(cuts[0])

    def encode(job: tuple[Callable, Sequence[Tensor]]) -> Representation:
        with autocast():
            return job[0](*(x.to(device, non_blocking=True) for x in job[1]))

    outputs, states = [], []  # the second pass draws the dropout of the first
    with torch.no_grad():
        for job in jobs:
            states.append(random_state(device))
            outputs.append(encode(job))
    sides = (concat(outputs[:texts]), concat(outputs[texts:]))
    text, video = (each(side, lambda x: x.requires_grad_(x.is_floating_point())) for side in sides)
    del outputs
    with autocast():
        loss = model.loss(gather(text), gather(video), draws)
    scale(loss).backward()

    after = random_state(device)
    for side, first in ((text, 0), (video, texts)):
        members = [m.grad.split(len(jobs[first][1][0])) if m.grad is not None else None for m in as_parts(side)]
        for number in range(texts):
            set_random_state(states[first + number], device)
            again = as_parts(encode(jobs[first + number]))
            wanted = [(x, g[number]) for x, g in zip(again, members) if g is not None and x.requires_grad]
            if wanted:
                torch.autograd.backward(*map(list, zip(*wanted)))
    set_random_state(after, device)
    average_gradients(model.parameters())
    return loss.detach()


@dataclass
class Trainer:
    """A model in training and all that one step needs; `pieces` is --gradient_accumulation_steps, `seed` --seed."""

    model: VideoTextModel
    optimizer: BertAdam
    world: World
    precision: str
    max_grad_norm: float
    pieces: int = 1
    seed: int = 0

    def __post_init__(self) -> None:
        self.scaler = torch.amp.GradScaler(self.world.device.type, enabled=self.precision == "fp16")
        self.wrapped: nn.Module = self.model
        if self.world.size > 1 and self.pieces == 1:
            # A static graph: heads may leave parameters unused, and checkpointing may use one twice.
            mine = [self.world.device.index] if self.world.device.type == "cuda" else None
            how = {"device_ids": mine, "static_graph": True, "gradient_as_bucket_view": True}
            self.wrapped = DistributedDataParallel(self.model, **how)
        else:
            broadcast_parameters(self.model.parameters())

    def rates(self) -> list[float]:
        """Learning rates of the next step, one per parameter group that has parameters."""
        groups = self.optimizer.param_groups
        return [rate for rate, group in zip(self.optimizer.current_lrs(), groups) if group["params"]]

    def backward(self, batch: Any, shares: Shares | None = None) -> Tensor:
        """The loss of all ranks' batches, detached; leaves its gradient, the same on every rank, in ``.grad``.

        shares: ``Shares.of(batch)``, asked for here where it is not known yet.
        """
        device, shares = self.world.device, shares or Shares.of(batch)
        arrays, gather = shares.pad(batch), partial(gather_rows, counts=shares.counts)
        cast = partial(autocast, device, self.precision)
        # From the number of the step: the same on every rank, and the same again after a resume.
        draws = torch.Generator().manual_seed(self.seed * 1_000_003 + self.optimizer.steps_taken())
        if self.pieces > 1:
            return cached_backward(self.model, arrays, self.pieces, device, cast, self.scaler.scale, draws, gather)
        with cast():
            loss = self.wrapped(*(x.to(device, non_blocking=True) for x in arrays), generator=draws, gather=gather)
        self.scaler.scale(loss).backward()
        return loss.detach()

    def step(self, batch: Any, shares: Shares | None = None) -> tuple[float, float]:
        """One optimiser step on a batch of pairs: (loss, gradient norm before clipping). shares: see :meth:`backward`.

        Order as in CLIP4Clip: backward, clip the global norm, update, clamp the logit scale. Raises NonFiniteError,
        on all ranks and before anything is updated, for a NaN or infinite loss or gradient (in float16 an overflowing
        gradient is the loss scaler's business: it leaves the step out).
        """
        loss = self.backward(batch, shares)
        self.scaler.unscale_(self.optimizer)
        norm = nn.utils.clip_grad_norm_(self.model.parameters(), self.max_grad_norm)
        value, length = torch.stack([loss.float(), norm.float()]).tolist()  # one wait for the device
        if not math.isfinite(value) or not (math.isfinite(length) or self.scaler.is_enabled()):
            self.optimizer.zero_grad(set_to_none=True)
            what = f"the loss is {value}" if not math.isfinite(value) else f"the gradient norm is {length}"
            raise NonFiniteError(what, [i for part in gather_objects(list(batch.video_ids)) for i in part])
        self.scaler.step(self.optimizer)
        self.scaler.update()
        self.optimizer.zero_grad(set_to_none=True)
        self.model.clamp_logit_scale()
        return value, length
