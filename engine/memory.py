"""How much memory a training step will take, told before it is taken."""

from collections.abc import Iterable

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.autograd.graph import saved_tensors_hooks

from engine.data import autocast
from engine.options import Options
from engine.step import trade
from modules.encoders.base import frame_places
from modules.model import VideoTextModel


def kept_for_backward(model: VideoTextModel, precision: str, pairs: int, frames: int, words: int) -> int:
    """Bytes that autograd keeps of a forward pass, parameters excepted.

    Asked of torch itself: the pass runs on fake tensors, which have shapes and types and take neither memory nor time.
    Checkpointed blocks keep their inputs.
    """
    device, side = next(model.parameters()).device, model.clip.image.size
    storages: dict[int, torch.UntypedStorage] = {}

    def keep(x: Tensor) -> Tensor:
        if not (x.is_leaf and x.requires_grad):
            storages[x.untyped_storage()._cdata] = x.untyped_storage()  # held, so that no other gets its number
        return x

    def keep_input(_: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        keep(inputs[0])

    hooks = [m.register_forward_pre_hook(keep_input) for m in model.modules() if getattr(m, "is_block", False)]
    arrays: Iterable[Tensor] = (
        torch.zeros(pairs, words, dtype=torch.int64),
        torch.ones(pairs, words, dtype=torch.bool),
        torch.zeros(pairs, frames, 3, side, side, dtype=torch.uint8),
        mask := torch.ones(pairs, frames, dtype=torch.bool),
        frame_places(mask),
    )
    fakes = FakeTensorMode(allow_non_fake_inputs=True)
    with fakes, saved_tensors_hooks(keep, lambda x: x), autocast(device, precision):
        model(*(fakes.from_tensor(x).to(device) for x in arrays))
    for hook in hooks:
        hook.remove()
    return sum(storage.nbytes() for storage in storages.values())


def estimate_mb(model: VideoTextModel, options: Options, share: int) -> tuple[float, float]:
    """MiB that a step takes on each device: of the parameters and their moments, and on top at its peak.

    share: pairs of each process. Counted are what autograd keeps, which the largest of two small batches grows with,
    and the batch's pixels; workspaces of kernels and fragmentation are not.
    """
    data, training = options.data, options.train
    trade(model, next(model.parameters()).device, training.grad_checkpointing, compile_blocks=False)
    piece = -(-share // training.gradient_accumulation_steps)
    few, more = (
        kept_for_backward(model.train(), options.run.precision, n, data.max_frames, data.max_words) for n in (2, 4)
    )
    standing = sum(p.nbytes * (4 if p.requires_grad else 1) for p in model.parameters())
    pixels = share * data.max_frames * 3 * model.clip.image.size**2
    return standing / 2**20, (few + (more - few) / 2 * (piece - 2) + pixels) / 2**20
