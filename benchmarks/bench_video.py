"""Speed of turning a video file into the frames that a model takes, against the ways of other codebases.

    python -m benchmarks.bench_video [--rounds 5] [--size 224]

Contenders, one thread each, in random order within every round, on files made here:
    ours          probe, choose, decode selectively (PyAV), resize the uint8 batch
    clip4clip     OpenCV, one seek per frame; PIL resize and crop; float tensors, normalised; a float64 array
    cv-sequential OpenCV, every frame grabbed, the wanted ones retrieved; then the same PIL path
Printed: the median time of each, and the median over rounds of (their time / our time).
"""

from __future__ import annotations

import argparse
import tempfile
import time
from collections.abc import Callable
from fractions import Fraction
from pathlib import Path

import av
import cv2
import numpy as np
import torch
from PIL import Image
from torchvision import transforms

from dataloaders.video.decode import read_frames
from dataloaders.video.frames import FrameSampling
from dataloaders.video.transforms import FrameTransform

MEAN, STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)
# name -> seconds, width, height, frames wanted
CLIPS = {
    "15 s 320x240, 12 frames": (15, 320, 240, 12),
    "15 s 1280x720, 12 frames": (15, 1280, 720, 12),
    "120 s 640x360, 64 frames": (120, 640, 360, 64),
}
FPS = 30


def make_film(path: Path, seconds: int, width: int, height: int) -> None:
    """A filmed-looking clip: a slow pan over a smooth, textured scene, moving blobs and sensor noise; x264 defaults."""
    generator = np.random.default_rng(0)
    scene = _scene(generator, height, width + 2 * seconds * FPS)
    noise = generator.normal(0, 2, (8, height, width, 1)).astype(np.float32)
    with av.open(str(path), "w") as container:
        stream = container.add_stream("libx264", rate=FPS, options={"preset": "medium", "crf": "23"})
        stream.width, stream.height, stream.pix_fmt = width, height, "yuv420p"
        for number in range(seconds * FPS):
            image = scene[:, number : number + width].astype(np.float32) + noise[number % 8]
            frame = np.ascontiguousarray(np.clip(image, 0, 255).astype(np.uint8))
            for blob in range(3):
                x = int(width * (0.5 + 0.4 * np.sin(number / 25 + 2 * blob)))
                y = int(height * (0.5 + 0.3 * np.cos(number / 35 + blob)))
                cv2.circle(frame, (x, y), height // 10, (200 - 60 * blob, 80 + 50 * blob, 90), -1)
            picture = av.VideoFrame.from_ndarray(frame, format="rgb24")
            picture.pts, picture.time_base = number, Fraction(1, FPS)
            container.mux(stream.encode(picture))
        container.mux(stream.encode(None))


def _scene(generator: np.random.Generator, height: int, width: int) -> np.ndarray:
    """uint8 [height, width, 3]: random colours at four scales, the finer the fainter."""
    scene = np.zeros((height, width, 3), np.float32)
    for cells, strength in ((4, 120), (12, 60), (40, 30), (120, 15)):
        coarse = generator.random((cells, cells * width // height + 1, 3), np.float32)
        scene += strength * cv2.resize(coarse, (width, height), interpolation=cv2.INTER_CUBIC)
    return np.clip(scene, 0, 255).astype(np.uint8)


def pil_pipeline(size: int) -> Callable[[np.ndarray], torch.Tensor]:
    steps = transforms.Compose(
        [
            transforms.Resize(size, interpolation=transforms.InterpolationMode.BICUBIC),
            transforms.CenterCrop(size),
            transforms.ToTensor(),
            transforms.Normalize(MEAN, STD),
        ]
    )
    return lambda bgr: steps(Image.fromarray(cv2.cvtColor(bgr, cv2.COLOR_BGR2RGB)))


def open_capture(path: Path) -> cv2.VideoCapture:
    return cv2.VideoCapture(str(path), cv2.CAP_FFMPEG, [cv2.CAP_PROP_N_THREADS, 1])


def _choose(capture: cv2.VideoCapture, sampling: FrameSampling) -> list[int]:
    return sampling.choose(capture.get(cv2.CAP_PROP_FPS), int(capture.get(cv2.CAP_PROP_FRAME_COUNT)))


def _as_float64(images: list[torch.Tensor], max_frames: int) -> np.ndarray:
    clip = np.zeros((max_frames, *images[0].shape))
    clip[: len(images)] = torch.stack(images).numpy()
    return clip


def seek_for_each_frame(path: Path, sampling: FrameSampling, size: int) -> np.ndarray:
    prepare, capture = pil_pipeline(size), open_capture(path)
    images = []
    for index in _choose(capture, sampling):
        capture.set(cv2.CAP_PROP_POS_FRAMES, index)
        read, frame = capture.read()
        if not read:
            break
        images.append(prepare(frame))
    capture.release()
    return _as_float64(images, sampling.max_frames)


def grab_every_frame(path: Path, sampling: FrameSampling, size: int) -> np.ndarray:
    prepare, capture = pil_pipeline(size), open_capture(path)
    indices = set(_choose(capture, sampling))
    images = []
    for index in range(max(indices) + 1):
        if not capture.grab():
            break
        if index in indices:
            images.append(prepare(capture.retrieve()[1]))
    capture.release()
    return _as_float64(images, sampling.max_frames)


def ours(path: Path, sampling: FrameSampling, size: int) -> torch.Tensor:
    return FrameTransform(size)(read_frames(path, sampling))


CONTENDERS = {"ours": ours, "clip4clip": seek_for_each_frame, "cv-sequential": grab_every_frame}


def measure(path: Path, sampling: FrameSampling, size: int, rounds: int) -> dict[str, np.ndarray]:
    """Seconds per contender and round, after one unmeasured round."""
    generator = np.random.default_rng(0)
    seconds: dict[str, list[float]] = {name: [] for name in CONTENDERS}
    for number in range(rounds + 1):
        for name in generator.permutation(list(CONTENDERS)):
            begin = time.perf_counter()
            CONTENDERS[name](path, sampling, size)
            if number:
                seconds[name].append(time.perf_counter() - begin)
    return {name: np.array(times) for name, times in seconds.items()}


def check_same_frames(path: Path, sampling: FrameSampling, size: int) -> float:
    """Largest mean difference of a frame between us and OpenCV sequential, in levels of 255. Raises on other frames."""
    theirs = grab_every_frame(path, sampling, size)
    pixels = (theirs * np.reshape(STD, (3, 1, 1)) + np.reshape(MEAN, (3, 1, 1))) * 255
    mine = ours(path, sampling, size).numpy().astype(float)
    difference = np.abs(mine - pixels[: len(mine)]).mean(axis=(1, 2, 3)).max()
    if difference > 1:
        raise AssertionError(f"{path}: the contenders give different frames, by {difference:.2f} levels on average")
    return float(difference)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=5, help="measured rounds per file")
    parser.add_argument("--size", type=int, default=224, help="side of the images in pixels")
    args = parser.parse_args()
    torch.set_num_threads(1)
    cv2.setNumThreads(1)
    with tempfile.TemporaryDirectory() as folder:
        for number, (name, (seconds, width, height, frames)) in enumerate(CLIPS.items()):
            path = Path(folder) / f"{number}.mp4"
            make_film(path, seconds, width, height)
            sampling = FrameSampling("stride", framerate=1, max_frames=frames)
            check_same_frames(path, sampling, args.size)
            times = measure(path, sampling, args.size, args.rounds)
            print(f"{name} ({path.stat().st_size / 1e6:.1f} MB), {args.rounds} rounds")
            for contender, taken in times.items():
                ratio = np.median(taken / times["ours"])
                print(f"  {contender:14s} {np.median(taken) * 1e3:8.1f} ms   {ratio:5.2f} x our time", flush=True)


if __name__ == "__main__":
    main()
