"""One optimiser step, whatever the number of ranks and of pieces: loss, exact gradient, clipping, update."""

from __future__ import annotations

import math
import shutil
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from engine.cached_step import cached_backward
from engine.distributed import World
from engine.evaluate import autocast
from engine.gather import broadcast_parameters, gather_objects
from engine.options import TrainOptions
from modules.encoders.clip import Transformer
from modules.model import VideoTextModel
from modules.optim import BertAdam, parameter_groups


class TrainingError(RuntimeError):
    """Training cannot go on; the message says at which step and with which clips."""


class NonFiniteError(TrainingError):
    """A loss or gradient is NaN or infinite; nothing was updated. `video_ids`: the clips of all ranks' batches."""

    def __init__(self, what: str, video_ids: list[str]) -> None:
        super().__init__(what)
        self.what, self.video_ids = what, video_ids


def build_optimizer(model: VideoTextModel, options: TrainOptions, compat: str, total_steps: int) -> BertAdam:
    """BertAdam with the settings of CLIP4Clip over the four parameter groups.

    The sources train all that is named ``clip.`` at the small rate of pre-trained weights, at which temporal parts that
    start from nothing would stay there: only `compat` keeps that.
    """
    new = model.new_parts if compat == "none" else ()
    groups = parameter_groups(model, options.lr, options.coef_lr, options.weight_decay, compat, new)
    return BertAdam(
        groups,
        lr=options.lr,
        warmup=options.warmup_proportion,
        schedule="warmup_cosine",
        t_total=total_steps,
        betas=(0.9, 0.98),
        eps=1e-6,
        weight_decay=options.weight_decay,
        max_grad_norm=1.0,
    )


def trade(model: VideoTextModel, device: torch.device, grad_checkpointing: bool, compile_towers: bool) -> None:
    """Apply --grad_checkpointing (memory for time) and --compile (start-up for time) to the transformers in place.

    Names of parameters stay as they are. Raises ValueError when torch.compile has no C++ compiler to use.
    """
    stacks = [module for module in model.modules() if isinstance(module, Transformer)]
    for stack in stacks:
        stack.checkpointing = grad_checkpointing
    if compile_towers:
        if device.type == "cpu" and not any(map(shutil.which, ("g++", "clang++", "c++"))):
            raise ValueError(
                "--compile needs a C++ compiler on the CPU and none is on PATH: install g++, or leave --compile out"
            )
        for stack in stacks:
            stack.compile()


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
            device_ids = [self.world.device.index] if self.world.device.type == "cuda" else None
            # A static graph: heads may leave parameters unused, and checkpointing may use one twice.
            self.wrapped = DistributedDataParallel(self.model, device_ids=device_ids, static_graph=True)
        else:
            broadcast_parameters(self.model.parameters())

    def rates(self) -> list[float]:
        """Learning rates of the next step, one per parameter group that has parameters."""
        groups = self.optimizer.param_groups
        return [rate for rate, group in zip(self.optimizer.current_lrs(), groups) if group["params"]]

    def backward(self, batch: Any) -> Tensor:
        """The loss of all ranks' batches, detached; leaves its gradient, the same on every rank, in ``.grad``."""
        device = self.world.device
        arrays = (batch.token_ids, batch.token_mask, batch.frames, batch.frame_mask)
        cast = partial(autocast, device, self.precision)
        # From the number of the step: the same on every rank, and the same again after a resume.
        draws = torch.Generator().manual_seed(self.seed * 1_000_003 + self.optimizer.steps_taken())
        if self.pieces > 1:
            return cached_backward(self.model, arrays, self.pieces, device, cast, self.scaler.scale, draws)
        with cast():
            loss = self.wrapped(*(x.to(device, non_blocking=True) for x in arrays), generator=draws)
        self.scaler.scale(loss).backward()
        return loss.detach()

    def step(self, batch: Any) -> tuple[float, float]:
        """One optimiser step on a batch of pairs: (loss, gradient norm before clipping).

        Order as in CLIP4Clip: backward, clip the global norm, update, clamp the logit scale. Raises NonFiniteError,
        on all ranks and before anything is updated, for a NaN or infinite loss or gradient (in float16 an overflowing
        gradient is the loss scaler's business: it leaves the step out).
        """
        loss = self.backward(batch)
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
