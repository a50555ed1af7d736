"""Decoded frames to square uint8 images for a CLIP tower. Normalisation happens on the device, in the model."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch.nn.functional import interpolate


@dataclass(frozen=True)
class FrameTransform:
    """Frames of a clip to squares of `size` pixels, all at once, antialiased; raises ValueError for unknown values.

    resize_mode: shortest is torchvision's ``Resize(size)`` and ``CenterCrop(size)``; longest brings the long side to
    `size` and adds bars of `fill_color` (0..255) around; squash brings both sides to it. The last two are open_clip's.
    interpolation: bicubic or bilinear. Values stay within 2 of 255 of the same steps with PIL, at a fraction of the
    time. torch's own resize of uint8 is what torchvision calls, too; importing torchvision for it would double the time
    that a process takes to start.
    """

    size: int
    resize_mode: str = "shortest"
    interpolation: str = "bicubic"
    fill_color: Sequence[int] = (0, 0, 0)

    def __post_init__(self) -> None:
        if self.size < 1:
            raise ValueError(f"image size must be >= 1 pixel, got {self.size}")
        if self.resize_mode not in ("shortest", "longest", "squash"):
            raise ValueError(f"resize mode must be shortest, longest or squash, got {self.resize_mode!r}")
        if self.interpolation not in ("bicubic", "bilinear"):
            raise ValueError(f"interpolation must be bicubic or bilinear, got {self.interpolation!r}")

    def __call__(self, frames: np.ndarray) -> torch.Tensor:
        """uint8 [T, H, W, 3] RGB array -> contiguous uint8 tensor [T, 3, size, size].

        Raises ValueError for another shape or dtype, or when there is no frame or no pixel.
        """
        if frames.dtype != np.uint8 or frames.ndim != 4 or frames.shape[-1] != 3 or 0 in frames.shape:
            raise ValueError(f"frames must be non-empty uint8 [T, H, W, 3], got {frames.dtype} {list(frames.shape)}")
        # The permuted view keeps its channels-last memory, for which torch's uint8 resize has a fast path.
        images = torch.from_numpy(np.ascontiguousarray(frames)).permute(0, 3, 1, 2)
        height, width = images.shape[-2:]
        shape = self._resized(height, width)
        if shape != [height, width]:
            images = interpolate(images, shape, mode=self.interpolation, antialias=True)
        if self.resize_mode == "longest":
            return self._with_bars(images)
        top, left = (round((side - self.size) / 2) for side in shape)
        return images[..., top : top + self.size, left : left + self.size].contiguous()

    def _resized(self, height: int, width: int) -> list[int]:
        if self.resize_mode == "shortest":
            short = min(height, width)
            return [self.size * height // short, self.size * width // short]  # the long side rounded down
        if self.resize_mode == "longest":
            ratio = max(height, width) / self.size
            return [max(1, round(height / ratio)), max(1, round(width / ratio))]
        return [self.size, self.size]

    def _with_bars(self, images: torch.Tensor) -> torch.Tensor:
        """[T, 3, h, w], one side of `size` -> [T, 3, size, size]; of an odd rest the greater part is below or right."""
        (height, width), size = images.shape[-2:], self.size
        out = torch.tensor(self.fill_color, dtype=torch.uint8).view(1, 3, 1, 1).repeat(len(images), 1, size, size)
        top, left = (size - height) // 2, (size - width) // 2
        out[..., top : top + height, left : left + width] = images
        return out
