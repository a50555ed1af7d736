"""One optimiser step, whatever the number of ranks and of pieces: loss, exact gradient, clipping, update."""

from __future__ import annotations

import math
import random
import shutil
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from checkpoints.names import parameter_name
from engine.compat import Compat
from engine.data import autocast
from engine.distributed import World, agree, average_gradients, broadcast_parameters, gather_objects, gather_rows
from engine.groups import TrainOptions
from modules.encoders.base import frame_places
from modules.model import Gather, VideoTextModel
from modules.optim import BertAdam, parameter_groups
from modules.representation import as_parts, concat, each, pad_to
from modules.transformer import Transformer

# All blocks share one function, which torch counts its graphs by: towers and head, of fixed and of varying sizes, with
# and without gradients make more than the 8 that it allows.
GRAPHS = 64


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


def trade(model: VideoTextModel, device: torch.device, grad_checkpointing: bool, compile_blocks: bool) -> None:
    """Apply --grad_checkpointing (memory for time) and --compile (start-up for time) to the transformers in place.

    Compiled are blocks, not stacks of them: a stack would hand its gradients to DistributedDataParallel all at once, at
    its end. Names of parameters stay as they are. Raises ValueError when torch.compile has no compiler to use.
    """
    if compile_blocks:
        # On CUDA, Triton builds the launchers of its kernels with a C compiler; on the CPU kernels are C++ themselves.
        language, *names = ("C", "gcc", "clang", "cc") if device.type == "cuda" else ("C++", "g++", "clang++", "c++")
        if not any(map(shutil.which, names)):
            told = f"--compile needs a {language} compiler for {device.type} and none is on PATH"
            raise ValueError(f"{told}: install {names[0]}, or leave it out")
        torch._dynamo.config.recompile_limit = GRAPHS
    for module in model.modules():
        if isinstance(module, Transformer):
            module.checkpointing = grad_checkpointing
        if compile_blocks and getattr(module, "is_block", False):
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


@contextmanager
def tensor_float32(allowed: bool) -> Iterator[None]:
    """Within, where `allowed`, CUDA multiplies float32 numbers as TF32, with 10 bits of mantissa in place of 23.

    Outside it does not: so it is by torch's default for matrices, and by choose_device for convolutions.
    """
    if allowed:
        torch.set_float32_matmul_precision("high")
        torch.backends.cudnn.allow_tf32 = True
    try:
        yield
    finally:
        if allowed:
            torch.set_float32_matmul_precision("highest")
            torch.backends.cudnn.allow_tf32 = False


def move(arrays: Iterable[Tensor], device: torch.device) -> list[Tensor]:
    return [x.to(device, non_blocking=True) for x in arrays]


def cached_backward(
    model: VideoTextModel,
    arrays: Sequence[Tensor],
    pieces: int,
    device: torch.device,
    autocast: Callable[[], AbstractContextManager],
    scale: Callable[[Tensor], Tensor] = lambda loss: loss,
    draws: torch.Generator | None = None,
    gather: Gather = lambda rows: rows,
) -> Tensor:
    """The exact gradient of a large batch in the memory of a small one; returns the loss, a detached scalar.

    GradCache (Gao et al., arXiv 2101.06983): the contrastive loss needs all representations of the batch at once, but
    not the activations behind them. So: encode piece by piece without keeping activations; take the loss of all
    representations and its gradient with respect to them; encode again piece by piece, now backpropagating that
    gradient. Cost: one more forward pass. Pieces are of videos. Texts are encoded once and whole, and keep their
    activations: in small pieces they would leave a GPU idle, and a clip of 12 frames has some 20 times as many.

    arrays: token_ids int64 [B, L], token_mask bool [B, L], frames uint8 [B, T, 3, S, S], frame_mask bool [B, T] of
    this rank, each moved to `device` once. `scale` is applied to the loss before backpropagation (the loss scale of
    float16); `draws` goes to the model's loss; `gather` joins the ranks' rows. The gradient of all ranks' batches is
    left in ``.grad`` on every rank.
    """
    captions, clips = arrays[:2], zip(*(x.chunk(pieces) for x in arrays[2:]))
    jobs = [move((frames, mask, frame_places(mask)), device) for frames, mask in clips]
    with autocast():
        text = model.encode_text(*move(captions, device))
    outputs, states = [], []  # the second pass draws the dropout of the first
    with torch.no_grad():
        for job in jobs:
            states.append(random_state(device))
            with autocast():
                outputs.append(model.encode_video(*job))
    video = each(concat(outputs), lambda x: x.requires_grad_(x.is_floating_point()))
    del outputs
    with autocast():
        loss = model.loss(text, video, draws, gather)
    scale(loss).backward()

    after = random_state(device)
    gradients = [x.grad.split(len(jobs[0][0])) if x.grad is not None else None for x in as_parts(video)]
    for number, (job, state) in enumerate(zip(jobs, states)):
        set_random_state(state, device)
        with autocast():
            again = as_parts(model.encode_video(*job))
        wanted = [(x, g[number]) for x, g in zip(again, gradients) if g is not None and x.requires_grad]
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
    tf32: bool = False  # float32 products on CUDA may be rounded to TF32

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
            loss = self.wrapped(*move([*arrays, frame_places(arrays[3])], device), draws, gather)
        self.scaler.scale(loss).backward()
        return loss.detach()

    def step(self, batch: Any, shares: Shares | None = None) -> tuple[float, float]:
        """One optimiser step on a batch of pairs: (loss, gradient norm before clipping). shares: see :meth:`backward`.

        Order as in CLIP4Clip: backward, clip the global norm, update, clamp the logit scale. Raises NonFiniteError,
        on all ranks and before anything is updated, for a NaN or infinite loss or gradient (in float16 an overflowing
        gradient is the loss scaler's business: it leaves the step out).
        """
        with tensor_float32(self.tf32):
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
