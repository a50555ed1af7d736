"""Evaluating a set with many captions a video: each video read and encoded once, against once per caption.

The other side does what CLIP4Clip and InternVideo do on MSVD: batches of (caption, video) pairs, a video decoded and
encoded anew for each of its captions. Same model, same decoder, same matrix; both sides run in turn in one process.
"""

import argparse
import tempfile
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch

from benchmarks.timing import compare, make_sample_data
from dataloaders.annotation_files import AnnotationFiles
from dataloaders.datasets import PairDataset, VideoSource, pad_frames
from dataloaders.registry import load_split
from dataloaders.split import RetrievalSplit
from engine.build import build_model, find_weights
from engine.data import Loaders
from engine.distributed import World
from engine.evaluate import evaluate
from engine.options import parse_options
from modules.model import VideoTextModel
from modules.tokenizer import Tokenizer

BATCH = 32


@torch.inference_mode()
def once_per_caption(model: VideoTextModel, split: RetrievalSplit, source: VideoSource) -> torch.Tensor:
    """The matrix by reading one video a caption; of each video's features, the last ones read are kept."""
    pairs, tokenize = PairDataset(split, source, expand=True), partial(Tokenizer(), max_words=32)
    texts: list[Any] = []
    videos: dict[int, torch.Tensor] = {}
    for start in range(0, len(pairs), BATCH):
        items: list[Any] = [pairs[0, i] for i in range(start, min(start + BATCH, len(pairs)))]
        features = model.encode_video(*pad_frames([item.frames for item in items]))
        videos |= {item.index: feature for item, feature in zip(items, features)}
        texts.append(model.encode_text(*tokenize([item.caption for item in items])))
    return model.similarity(torch.cat(texts), torch.stack([videos[i] for i in range(len(videos))]))


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
        flags = {"pretrained_clip_name": f"{name}/clip/tiny_clip.pt", "datatype": "msvd", "data_path": f"{name}/msvd"}
        flags |= {"features_path": f"{name}/msvd/videos", "output_dir": name, "num_thread_reader": "0"}
        flags |= {"batch_size_val": str(BATCH), "precision": "fp32"}
        options = parse_options(["--do_eval", *(f"--{flag}={value}" for flag, value in flags.items())])
        model = build_model(options, find_weights(options)).eval()
        captions = [f"caption {k} of video {v}" for v in range(args.videos) for k in range(args.captions)]
        owner = np.repeat(np.arange(args.videos), args.captions)
        split = RetrievalSplit("msvd", "test", small.videos, tuple(captions), owner, small.expected)
        tokenize = partial(model.clip.tokenizer, max_words=options.data.max_words)
        loaders = Loaders(options, World(0, 1, torch.device("cpu")), tokenize, model.clip.image.size)
        once_per_video = partial(evaluate, model, split, loaders)
        other = partial(once_per_caption, model, split, loaders.source(frame_order=0))
        found, matrix = compare(
            f"{args.videos} videos, {args.captions} captions each", once_per_video, other, args.rounds
        )
        torch.testing.assert_close(found.similarity, matrix, rtol=1e-4, atol=1e-4)


if __name__ == "__main__":
    main()
