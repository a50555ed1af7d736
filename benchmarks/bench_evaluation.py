"""Evaluating a set with many captions a video: each video read and encoded once, against once per caption.

The other side does what CLIP4Clip and InternVideo do on MSVD: batches of (caption, video) pairs, a video decoded and
encoded anew for each of its captions. Same model, same decoder, same matrix; both sides run in turn in one process.
"""

import argparse
import subprocess
import sys
import tempfile
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch

from benchmarks.timing import race, write_races
from dataloaders.datasets import PairDataset, pad_frames
from dataloaders.split import RetrievalSplit
from engine.build import build_model, find_weights
from engine.data import Loaders, load_data
from engine.distributed import World
from engine.evaluate import evaluate
from engine.options import parse_options
from modules.model import VideoTextModel

BATCH = 32
FLAGS = f"""--do_eval --datatype msvd --data_path {{root}}/msvd --features_path {{root}}/msvd/videos
    --pretrained_clip_name {{root}}/clip/tiny_clip.pt --output_dir {{root}} --num_thread_reader 0
    --batch_size_val {BATCH} --precision fp32"""


@torch.inference_mode()
def once_per_caption(model: VideoTextModel, split: RetrievalSplit, loaders: Loaders) -> torch.Tensor:
    """The matrix by reading one video a caption; of each video's features, the last ones read are kept."""
    pairs = PairDataset(split, loaders.source(frame_order=0), expand=True)
    texts: list[Any] = []
    videos: dict[int, torch.Tensor] = {}
    for start in range(0, len(pairs), BATCH):
        items: list[Any] = [pairs[0, i] for i in range(start, min(start + BATCH, len(pairs)))]
        features = model.encode_video(*pad_frames([item.frames for item in items]))
        videos |= {item.index: feature for item, feature in zip(items, features)}
        texts.append(model.encode_text(*loaders.tokenize([item.caption for item in items])))
    return model.similarity(torch.cat(texts), torch.stack([videos[i] for i in range(len(videos))]))


def main() -> None:
    parser = argparse.ArgumentParser("benchmarks.bench_evaluation", allow_abbrev=False, description=__doc__)
    parser.add_argument("--videos", type=int, default=20)
    parser.add_argument("--captions", type=int, default=41, help="captions a video; MSVD's test set has 41")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--json", type=Path, help="write what was measured to this file as well")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as root:
        sample = f"-m tools.sample_data --datatype msvd --n_train 4 --n_val 4 --n_test {args.videos}".split()
        subprocess.run([sys.executable, *sample, "--output_dir", root], check=True)
        options = parse_options([word.format(root=root) for word in FLAGS.split()])
        model = build_model(options, find_weights(options)).eval()
        captions = tuple(f"caption {k} of video {v}" for v in range(args.videos) for k in range(args.captions))
        owner = np.repeat(np.arange(args.videos), args.captions)
        split = replace(load_data(options, "test"), captions=captions, caption_to_video=owner)
        tokenize = partial(model.clip.tokenizer, max_words=options.data.max_words)
        loaders = Loaders(options, World(0, 1, torch.device("cpu")), tokenize, model.clip.image)
        ours, other = (partial(way, model, split, loaders) for way in (evaluate, once_per_caption))
        title = f"{args.videos} videos, {args.captions} captions each"
        found = race(title, {"ours": ours, "other": other}, args.rounds)
        torch.testing.assert_close(found["ours"].similarity.matrix, found["other"], rtol=1e-4, atol=1e-4)
    write_races(args.json)


if __name__ == "__main__":
    main()
