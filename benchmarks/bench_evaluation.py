"""Evaluating a set with many captions a video: each video read and encoded once, against once per caption.

The other side does what CLIP4Clip and InternVideo do on MSVD: batches of (caption, video) pairs, a video decoded and
encoded anew for each of its captions. Same model, same decoder, same matrix; both sides run in turn in one process.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from functools import partial
from pathlib import Path

import numpy as np
import torch

from dataloaders.datasets import PairDataset, VideoSource, pad_frames
from dataloaders.loaders import CaptionBatches, video_loader
from dataloaders.registry import AnnotationFiles, load_split
from dataloaders.split import RetrievalSplit
from dataloaders.video.frames import FrameSampling
from engine.build import build_model
from engine.distributed import World
from engine.evaluate import evaluate
from engine.options import ModelOptions
from modules.model import VideoTextModel
from modules.tokenizer import Tokenizer
from preprocess.make_sample_data import main as make_sample_data

BATCH = 32


@torch.inference_mode()
def once_per_caption(model: VideoTextModel, split: RetrievalSplit, source: VideoSource) -> torch.Tensor:
    """The matrix by reading one video a caption; of each video's features, the last ones read are kept."""
    pairs, tokenize = PairDataset(split, source, expand=True), partial(Tokenizer(), max_words=32)
    texts, videos = [], {}
    for start in range(0, len(pairs), BATCH):
        items = [pairs[0, i] for i in range(start, min(start + BATCH, len(pairs)))]
        features = model.encode_video(*pad_frames([item.frames for item in items]))
        videos |= {item.index: feature for item, feature in zip(items, features)}
        texts.append(model.encode_text(*tokenize([item.caption for item in items])))
    return model.similarity(torch.cat(texts), torch.stack([videos[i] for i in range(len(videos))]))


def once_per_video(model: VideoTextModel, split: RetrievalSplit, source: VideoSource) -> torch.Tensor:
    """The project's own way."""
    captions = partial(CaptionBatches, tokenize=partial(Tokenizer(), max_words=32), batch_size=BATCH)
    loader = video_loader(split, source, batch_size=BATCH, num_workers=0)
    world = World(0, 1, torch.device("cpu"))
    return evaluate(model, split, loader, captions, world, "fp32").similarity


def main() -> None:
    parser = argparse.ArgumentParser("benchmarks.bench_evaluation", allow_abbrev=False, description=__doc__)
    parser.add_argument("--videos", type=int, default=20)
    parser.add_argument("--captions", type=int, default=41, help="captions a video; MSVD's test set has 41")
    parser.add_argument("--rounds", type=int, default=3)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        root = Path(name)
        make_sample_data(
            ["--output_dir", name, "--datatype", "msvd", "--n_train", "4", "--n_val", "4", "--n_test", str(args.videos)]
        )
        small = load_split("msvd", "test", AnnotationFiles(data_path=root / "msvd"), root / "msvd" / "videos")
        model = build_model(ModelOptions(pretrained_clip_name=str(root / "clip" / "tiny_clip.pt")))[0].eval()
        captions = [f"caption {k} of video {v}" for v in range(args.videos) for k in range(args.captions)]
        owner = np.repeat(np.arange(args.videos), args.captions)
        split = RetrievalSplit("msvd", "test", small.videos, tuple(captions), owner, small.expected)
        source = VideoSource(FrameSampling("second", 1, 12, 2), model.clip.sizes.image_resolution)
        pairs = []
        for _ in range(args.rounds):
            seconds, matrices = [], []
            for way in (once_per_video, once_per_caption):
                began = time.perf_counter()
                matrices.append(way(model, split, source))
                seconds.append(time.perf_counter() - began)
            torch.testing.assert_close(*matrices, rtol=1e-4, atol=1e-4)
            pairs.append(seconds)
    once, often = (statistics.median(column) for column in zip(*pairs))
    print(
        f"{args.videos} videos, {args.captions} captions each, same matrix: once per video {once:.2f} s, once per "
        f"caption {often:.2f} s, ratio {statistics.median(b / a for a, b in pairs):.1f}"
    )


if __name__ == "__main__":
    main()
