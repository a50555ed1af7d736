"""Speed of turning a video file into the frames that a model takes, against the ways of other codebases.

Contenders, one thread each, in random order within every round, on files made here:
    ours          probe, choose, decode selectively (PyAV), resize each frame as it comes: what a run does
    packets known the same, of a file whose packets are kept beside a frame cache: another choice of its frames
    floor         the same packets decoded and resized, with all plans made beforehand and nothing checked
    clip4clip     OpenCV, one seek per frame; PIL resize and crop; float tensors, normalised; a float64 array
    cv-sequential OpenCV, every frame grabbed, the wanted ones retrieved; then the same PIL path
    decord, torchcodec exact, torchcodec approximate
                  where these packages are installed: the wanted frames, then our resize
Printed: the median time of each, and the median over rounds of (their time / our time).
"""

import argparse
import tempfile
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

import av
import cv2
import numpy as np
import torch
from PIL import Image
from torchvision import transforms

from benchmarks.timing import race, write_races
from dataloaders.video.decode import plan_runs, read_frames
from dataloaders.video.frames import FrameSampling
from dataloaders.video.packets import VideoInfo, probe_video
from dataloaders.video.transforms import FrameTransform

MEAN, STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)
CLIPS = ((15, 320, 240, 12), (15, 1280, 720, 12), (120, 640, 360, 64))  # seconds, width, height, frames wanted
FPS = 30


def make_film(path: Path, seconds: int, width: int, height: int) -> None:
    """A filmed-looking clip: a slow pan over a textured scene, a moving blob and sensor noise; x264 defaults."""
    generator = np.random.default_rng(0)
    scene = np.zeros((height, width + 2 * seconds * FPS, 3), np.float32)
    for cells, strength in ((4, 120), (12, 60), (40, 30), (120, 15)):  # random colours, the finer the fainter
        coarse = generator.random((cells, cells * scene.shape[1] // height + 1, 3), np.float32)
        scene += strength * cv2.resize(coarse, scene.shape[1::-1], interpolation=cv2.INTER_CUBIC)
    noise = generator.normal(0, 2, (8, height, width, 1)).astype(np.float32)
    with av.open(str(path), "w") as container:
        stream = container.add_stream("libx264", rate=FPS, options={"preset": "medium", "crf": "23"})
        stream.width, stream.height, stream.pix_fmt = width, height, "yuv420p"
        for number in range(seconds * FPS):
            frame = np.clip(scene[:, number : number + width] + noise[number % 8], 0, 255).astype(np.uint8)
            center = (int(width * (0.5 + 0.4 * np.sin(number / 25))), int(height * (0.5 + 0.3 * np.cos(number / 35))))
            cv2.circle(frame, center, height // 6, (200, 80, 90), -1)
            container.mux(stream.encode(av.VideoFrame.from_ndarray(frame, format="rgb24")))
        container.mux(stream.encode(None))


def through_opencv(seeks: bool, path: Path, sampling: FrameSampling, size: int) -> np.ndarray:
    """float64 [max_frames, 3, size, size]: frames resized and cropped with PIL, normalised, the rest zero.

    `seeks`: go to each chosen frame; else grab every frame and retrieve the chosen ones.
    """
    bicubic = transforms.Resize(size, interpolation=transforms.InterpolationMode.BICUBIC)
    steps = [bicubic, transforms.CenterCrop(size), transforms.ToTensor(), transforms.Normalize(MEAN, STD)]
    prepare, clip = transforms.Compose(steps), np.zeros((sampling.max_frames, 3, size, size))
    capture = cv2.VideoCapture(str(path), cv2.CAP_FFMPEG, [cv2.CAP_PROP_N_THREADS, 1])
    chosen = list(sampling.choose(capture.get(cv2.CAP_PROP_FPS), int(capture.get(cv2.CAP_PROP_FRAME_COUNT))))
    images: list[torch.Tensor] = []
    for index in chosen if seeks else range(chosen[-1] + 1):
        if seeks:
            capture.set(cv2.CAP_PROP_POS_FRAMES, index)
        capture.grab()
        if index == chosen[len(images)]:
            images.append(prepare(Image.fromarray(cv2.cvtColor(capture.retrieve()[1], cv2.COLOR_BGR2RGB))))
    capture.release()
    clip[: len(images)] = torch.stack(images).numpy()
    return clip


def ours(path: Path, sampling: FrameSampling, size: int, info: VideoInfo | None = None) -> torch.Tensor:
    return torch.cat(read_frames(path, sampling, transform=FrameTransform(size), info=info))


def floor(path: Path, info: VideoInfo, wanted: Sequence[int], size: int) -> torch.Tensor:
    """The least that there is to do, of a file whose packets are known and told the truth."""
    images, position = [], 0
    times = set(info.packet_pts[info.frame_packets[wanted]].tolist())
    with av.open(str(path)) as container:
        stream = container.streams.video[0]
        decoder, packets = stream.codec_context, container.demux(stream)
        decoder.thread_count = 1
        for run in plan_runs(info, wanted):
            if run.first > position:
                container.seek(int(info.packet_pts[run.first]), stream=stream)
                packets = container.demux(stream)
            for here, packet in zip(range(run.first, run.last + 1), packets):
                decoder.skip_frame = "DEFAULT" if here in run.wanted or here == run.first else "NONREF"
                images += [f.to_ndarray(format="rgb24") for f in decoder.decode(packet) if f.pts in times]
            images += [f.to_ndarray(format="rgb24") for f in decoder.decode(None) if f.pts in times]
            decoder.flush_buffers()
            position = run.last + 1
    return FrameTransform(size)(np.stack(images))


def through_decord(path: Path, wanted: Sequence[int], size: int) -> torch.Tensor:
    import decord

    return FrameTransform(size)(decord.VideoReader(str(path), num_threads=1).get_batch(wanted).asnumpy())


def through_torchcodec(mode: str, path: Path, wanted: Sequence[int], size: int) -> torch.Tensor:
    from torchcodec.decoders import VideoDecoder

    decoder = VideoDecoder(path, seek_mode=mode, num_ffmpeg_threads=1, dimension_order="NHWC")
    return FrameTransform(size)(decoder.get_frames_at(wanted).data.numpy())


def contenders(path: Path, sampling: FrameSampling, size: int) -> dict[str, Callable[[], object]]:
    """Ways to read a clip, by name; those of packages that are not installed are left out."""
    info = probe_video(path)
    wanted = sampling.choose(info.fps, info.frame_count)
    ways: dict[str, Callable] = {"ours": partial(ours, path, sampling, size)}
    ways["packets known"] = partial(ours, path, sampling, size, info)
    ways["floor"] = partial(floor, path, info, wanted, size)
    ways["clip4clip"] = partial(through_opencv, True, path, sampling, size)
    ways["cv-sequential"] = partial(through_opencv, False, path, sampling, size)
    others = {"decord": through_decord}
    others |= {f"torchcodec {mode}": partial(through_torchcodec, mode) for mode in ("exact", "approximate")}
    for name, way in others.items():
        try:
            way(path, wanted, size)
        except (ImportError, RuntimeError) as error:  # the latter where torchcodec does not find FFmpeg's libraries
            print(f"left out: {name} ({str(error).splitlines()[0]})")
        else:
            ways[name] = partial(way, path, wanted, size)
    return ways


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=5, help="measured rounds per file")
    parser.add_argument("--size", type=int, default=224, help="side of the images in pixels")
    parser.add_argument("--quick", action="store_true", help="two rounds, the first file only")
    parser.add_argument("--json", type=Path, help="write what was measured to this file as well")
    args = parser.parse_args()
    torch.set_num_threads(1)
    cv2.setNumThreads(1)
    rounds, clips = (2, CLIPS[:1]) if args.quick else (args.rounds, CLIPS)
    with tempfile.TemporaryDirectory() as folder:
        for seconds, width, height, frames in clips:
            path = Path(folder) / f"{width}x{height}.mp4"
            make_film(path, seconds, width, height)
            sampling = FrameSampling("stride", framerate=1, max_frames=frames)
            title = f"{seconds} s {width}x{height}, {frames} frames ({path.stat().st_size / 1e6:.1f} MB)"
            found = race(title, contenders(path, sampling, args.size), rounds, warm_up=1)
            if not torch.equal(found["ours"], found["floor"]):
                raise AssertionError(f"{path}: the floor gives other frames")
            # A frame that differs by more than a level of 255 on average is another one.
            pixels = (found["cv-sequential"] * np.reshape(STD, (3, 1, 1)) + np.reshape(MEAN, (3, 1, 1))) * 255
            difference = np.abs(found["ours"].numpy() - pixels[: len(found["ours"])]).mean(axis=(1, 2, 3)).max()
            if difference > 1:
                raise AssertionError(f"{path}: the contenders give different frames, by {difference:.2f} levels")
    write_races(args.json)


if __name__ == "__main__":
    main()
