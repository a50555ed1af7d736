"""An epoch of training a head on kept features of frozen towers, against encoding the clips in every epoch.

As MSR-VTT has it: 9,000 clips x 12 frames of width 512 and 180,000 captions, of which one is drawn for each clip;
random numbers in files as --feature_cache writes them. "ours" reads and trains a whole epoch. "towers" is what
encoding the same epoch in a ViT-B/32 takes without training or decoding, reckoned up from --sample clips and captions.
"""

import argparse
import tempfile
import time
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch

from checkpoints.whole import write_whole
from dataloaders.datasets import PairDataset
from dataloaders.feed import Feed, Reading
from dataloaders.loaders import GlobalBatchSampler
from dataloaders.split import Expected, RetrievalSplit, VideoClip
from engine.distributed import World
from engine.features import FeaturePairs, Table
from engine.step import Trainer
from modules.encoders.clip import CLIP, ClipSizes
from modules.heads import HEADS
from modules.model import VideoTextModel
from modules.optim import BertAdam, freeze, parameter_groups

VIT_B_32 = ClipSizes(512, 224, 12, 768, 32, 77, 49408, 512, 8, 12, 12)
CLIPS, FRAMES, CAPTIONS, BATCH, KEPT = 9000, 12, 20, 128, 64
WORDS = 15


def table(folder: Path, size: int, *shape: int) -> Table:
    """Features [size, *shape] in files of KEPT items."""

    def batches() -> Any:
        for start in range(0, size, KEPT):
            index = torch.arange(start, min(start + KEPT, size))
            mask = torch.ones(len(index), shape[0] if len(shape) > 1 else WORDS, dtype=torch.bool)
            path = folder / f"{len(shape)}_{start}.pt"
            write_whole(path, partial(torch.save, {"features": torch.randn(len(index), *shape), "mask": mask}))
            yield index, torch.load(path, mmap=True)

    return Table.of(size, batches())


def main() -> None:
    parser = argparse.ArgumentParser("benchmarks.bench_features", allow_abbrev=False, description=__doc__)
    parser.add_argument("--sim_header", nargs="+", default=["meanP", "seqLSTM", "seqTransf"], choices=sorted(HEADS))
    parser.add_argument("--clips", type=int, default=CLIPS)
    parser.add_argument("--sample", type=int, default=16)
    args = parser.parse_args()
    torch.manual_seed(0)
    encoder = CLIP(VIT_B_32, "quick_gelu").eval()
    freeze(encoder, encoder.blocks + 1)
    sample, mask = args.sample, torch.ones(args.sample, FRAMES, dtype=torch.bool)
    pixels, ids = torch.zeros(sample, FRAMES, 3, 224, 224, dtype=torch.uint8), torch.randint(1, 99, (sample, WORDS))
    began = time.perf_counter()
    with torch.no_grad():
        encoder.encode_frames(pixels, mask)
        encoder.encode_text(ids)
    towers = (time.perf_counter() - began) * args.clips / sample
    print(f"{args.clips} clips, batch {BATCH}, {torch.get_num_threads()} threads; towers: {towers:.0f} s an epoch")
    videos = tuple(VideoClip(str(v)) for v in range(args.clips))
    captions, owner = tuple("a" for _ in range(args.clips * CAPTIONS)), np.repeat(np.arange(args.clips), CAPTIONS)
    split = RetrievalSplit("synthetic", "train", videos, captions, owner, Expected(None, None))
    with tempfile.TemporaryDirectory() as folder:
        tables = (table(Path(folder), len(captions), 512), table(Path(folder), args.clips, FRAMES, 512))
        pairs = PairDataset(split, SimpleNamespace(), expand=False)  # type: ignore[arg-type]
        for name in args.sim_header:
            model = VideoTextModel(encoder, HEADS[name](encoder.head_sizes))
            optimizer = BertAdam(parameter_groups(model.named_parameters(), 1e-4, 1e-3, 0.2), lr=1e-4)
            trainer = Trainer(model, optimizer, World(0, 1, torch.device("cpu")), "fp32", 1.0)
            dataset = FeaturePairs(pairs, *tables, {}, whole=False)
            batches = GlobalBatchSampler(args.clips, BATCH, 0, 1, seed=0)
            loader = Feed(dataset, batches, dataset.collate, Reading(), (), BATCH)
            began, waited = time.perf_counter(), 0.0
            asked = began
            for batch in loader:
                waited += time.perf_counter() - asked
                trainer.step(batch)
                asked = time.perf_counter()
            taken = time.perf_counter() - began
            told = f"{name}: {taken:.1f} s an epoch, {waited:.1f} s of it reading; towers / ours {towers / taken:.0f}"
            print(told, flush=True)


if __name__ == "__main__":
    main()
