"""Decoded frames to square uint8 images for an image tower. Normalisation happens on the device, in the model."""

from __future__ import annotations

import numpy as np
import torch
from torch.nn.functional import interpolate, pad

MODES = ("shortest", "squash", "longest")
INTERPOLATIONS = ("bicubic", "bilinear")


class FrameTransform:
    """All frames of a clip to squares at once, antialiased; the modes are those of open_clip's configurations.

    shortest: the short side to `size`, then the centre square: torchvision's ``Resize(size)`` and ``CenterCrop(size)``.
    squash: both sides to `size`. longest: the long side to `size`, black around the rest.
    Values stay within 2 of 255 of the same steps with PIL, at a fraction of the time. torch's own resize of uint8 is
    what torchvision calls, too; importing torchvision for it would double the time that a process takes to start.
    """

    def __init__(self, size: int, resize_mode: str = "shortest", interpolation: str = "bicubic") -> None:
        if size < 1:
            raise ValueError(f"image size must be >= 1 pixel, got {size}")
        for what, value, known in (("mode", resize_mode, MODES), ("interpolation", interpolation, INTERPOLATIONS)):
            if value not in known:
                raise ValueError(f"the {what} of a resize must be one of {', '.join(known)}, got {value!r}")
        self.size, self.resize_mode, self.interpolation = size, resize_mode, interpolation

    def shape(self, height: int, width: int) -> tuple[int, int]:
        """Height and width after the resize, before what is beyond the square is cut off or filled up."""
        if self.resize_mode == "squash":
            return self.size, self.size
        if self.resize_mode == "longest":
            ratio = max(height, width) / self.size
            return max(1, round(height / ratio)), max(1, round(width / ratio))
        short = min(height, width)
        return self.size * height // short, self.size * width // short  # the long side rounded down

    def __call__(self, frames: np.ndarray) -> torch.Tensor:
        """uint8 [T, H, W, 3] RGB array -> contiguous uint8 tensor [T, 3, size, size].

        Raises ValueError for another shape or dtype, or when there is no frame or no pixel.
        """
        if frames.dtype != np.uint8 or frames.ndim != 4 or frames.shape[-1] != 3 or 0 in frames.shape:
            raise ValueError(f"frames must be non-empty uint8 [T, H, W, 3], got {frames.dtype} {list(frames.shape)}")
        # The permuted view keeps its channels-last memory, for which torch's uint8 resize has a fast path.
        images = torch.from_numpy(np.ascontiguousarray(frames)).permute(0, 3, 1, 2)
        shape = self.shape(*images.shape[-2:])
        if shape != tuple(images.shape[-2:]):
            images = interpolate(images, shape, mode=self.interpolation, antialias=True)
        if self.resize_mode == "longest":
            above, left = ((self.size - side) // 2 for side in shape)
            return pad(images, (left, self.size - shape[1] - left, above, self.size - shape[0] - above)).contiguous()
        top, left = (round((side - self.size) / 2) for side in shape)
        return images[..., top : top + self.size, left : left + self.size].contiguous()
