"""FrameTransform against torchvision's transforms on PIL images, the path of the reference projects."""

import numpy as np
import pytest
import torch
from PIL import Image
from torchvision.transforms import CenterCrop, Compose, InterpolationMode, Resize

from dataloaders.video.transforms import FrameTransform
from tests.video_files import picture


def pil_path(frames, size):
    steps = Compose([Resize(size, interpolation=InterpolationMode.BICUBIC), CenterCrop(size)])
    return np.stack([np.asarray(steps(Image.fromarray(frame))).transpose(2, 0, 1) for frame in frames])


@pytest.mark.parametrize("shape", [(240, 320), (320, 240), (101, 67), (224, 224), (100, 60), (225, 400), (720, 1280)])
@pytest.mark.parametrize("size", [224, 63])
def test_within_two_levels_of_pil(shape, size):
    noise = np.random.default_rng(0).integers(0, 256, (*shape, 3), np.uint8)
    frames = np.stack([picture(5, shape[1], shape[0]), noise])
    got = FrameTransform(size)(frames)
    assert got.shape == (2, 3, size, size)
    assert got.dtype == torch.uint8
    assert got.is_contiguous()
    difference = np.abs(got.numpy().astype(int) - pil_path(frames, size))
    assert difference.max() <= 2
    assert difference.mean() < 0.1


def test_the_centre_of_a_wide_picture_is_kept():
    frames = np.zeros((1, 4, 12, 3), np.uint8)
    frames[0, :, 4:8] = [10, 20, 30]
    assert FrameTransform(4)(frames)[0].flatten(1).tolist() == [[10] * 16, [20] * 16, [30] * 16]


def test_strided_frames_give_the_same_images():
    frames = np.stack([picture(number) for number in range(4)])
    mirrored = frames[:, :, ::-1]
    assert torch.equal(FrameTransform(32)(mirrored), FrameTransform(32)(mirrored.copy()))


@pytest.mark.parametrize(
    "frames",
    [
        np.zeros((2, 8, 8, 3), np.float32),
        np.zeros((8, 8, 3), np.uint8),
        np.zeros((2, 3, 8, 8), np.uint8),
        np.zeros((0, 8, 8, 3), np.uint8),
    ],
)
def test_other_arrays_are_refused(frames):
    with pytest.raises(ValueError, match=r"frames must be non-empty uint8 \[T, H, W, 3\]"):
        FrameTransform(8)(frames)


def test_size_must_be_positive():
    with pytest.raises(ValueError, match="image size must be >= 1 pixel, got 0"):
        FrameTransform(0)
