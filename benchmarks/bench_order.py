"""Which heads see the order of frames: each is trained on pairs of clips that are each other played backwards.

Both clips of a pair have the same frames, so a model that looks at frames without their order cannot tell which of the
two a caption means: 50 %, a coin. Clips last SECONDS at 25, 29.97 or 30 frames per second and give the four frames
at 0, 1/3, 2/3 and the end: the choice of frames is then its own mirror image. Were it not, the frames of a clip and of
its reverse would differ a little and an order-blind head could learn that.

First a small CLIP learns, with meanP, what clips show. From it every head starts, as heads do in practice, and gets the
same steps on the pairs of the training split; a batch holds whole pairs, so that order is what is left to learn.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import torch
from torch import Tensor

from benchmarks.order_scores import Score, kind_of, pair_wins, table
from dataloaders.datasets import VideoDataset
from engine.build import build_model, checkpoint_tensors
from engine.data import Evaluator, load_data
from engine.distributed import World, setup
from engine.options import Options, parse_options
from engine.progress import log, progress, setup_logging
from engine.step import Trainer, build_optimizer
from main_task_retrieval import resolve, seed_everything
from modules.metrics import retrieval_metrics
from modules.model import VideoTextModel
from modules.tokenizer import Tokenizer
from preprocess.make_sample_data import main as make_sample_data

HEADS = {
    "meanP": ["--sim_header", "meanP"],
    "seqLSTM": ["--sim_header", "seqLSTM"],
    "seqTransf": ["--sim_header", "seqTransf", "--cross_num_hidden_layers", "2"],
    "tightTransf": ["--sim_header", "tightTransf", "--cross_num_hidden_layers", "2"],
    "xpool": ["--sim_header", "xpool"],
    "wti": ["--interaction", "wti"],
    # What is new in this tower starts at zero and gets ten times the rate of the rest, which keeps that of the others.
    "clip_evl": ["--clip_evl", "--lr", "1e-2", "--coef_lr", "0.1"],
}
SECONDS, FRAMES, FRAMERATE, WORDS = "1.018", 4, 3, 32
CLIP = {"resolution": 64, "patch": 16, "vision_layers": 3, "text_layers": 3}
CLIP_BATCH = 64  # of the common CLIP's training
# CLIP4Clip's heads start with the text tower's positions, which a small CLIP has 100 times smaller than its features:
# no head would tell its frames apart within these steps.
POSITIONS_STD = 0.5
POSITIONS = ("frame_position_embeddings.weight", "cross.embeddings.position_embeddings.weight")


@dataclass(frozen=True)
class Clips:
    """A split in memory: `frames` uint8 [V, FRAMES, 3, S, S], tokens of the one caption of each, `pairs` int [P, 2]."""

    video_ids: list[str]
    frames: Tensor
    token_ids: Tensor
    token_mask: Tensor
    pairs: np.ndarray

    def batch(self, index: np.ndarray) -> SimpleNamespace:
        present = torch.ones(len(index), self.frames.shape[1], dtype=torch.bool)
        return SimpleNamespace(
            token_ids=self.token_ids[index],
            token_mask=self.token_mask[index],
            frame_mask=present,
            frames=self.frames[index],
            video_ids=[self.video_ids[i] for i in index],
        )


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser("benchmarks.bench_order", allow_abbrev=False, description=__doc__.splitlines()[0])
    add = parser.add_argument
    add("--heads", nargs="+", choices=HEADS, default=list(HEADS), metavar="HEAD", help=", ".join(HEADS))
    add("--clip_epochs", type=int, default=14, help="of the common CLIP over all training clips")
    add("--epochs", type=int, default=20, help="of each head over the training pairs")
    add("--batch_pairs", type=int, default=16, help="pairs of clips per step")
    add("--lr", type=float, default=1e-3)
    add(
        "--n_train",
        type=int,
        default=800,
        help="training clips beside the pairs; of these there are --order_pairs x --n_train / --n_test",
    )
    add("--n_test", type=int, default=100, help="test clips beside the pairs")
    add("--order_pairs", type=int, default=100, help="pairs of test clips")
    add("--seed", type=int, default=0, help="of the clips, of the untrained CLIP and of training")
    add("--output_dir", type=Path, default=Path("runs/order"), help="gets the clips and the common CLIP")
    add("--force", action="store_true", help="make the clips anew, over those of other options")
    return parser


def options_of(args: argparse.Namespace, data: Path, world: World, more: Sequence[str]) -> Options:
    """The options that the command line of a run would give."""
    return resolve(
        parse_options(
            [
                "--do_train",
                "--datatype",
                "msrvtt",
                "--output_dir",
                str(args.output_dir),
                "--device",
                "cpu",
                "--data_path",
                f"{data}/msrvtt/MSRVTT_data.json",
                "--train_csv",
                f"{data}/msrvtt/MSRVTT_train.9k.csv",
                "--val_csv",
                f"{data}/msrvtt/MSRVTT_JSFUSION_test.csv",
                "--features_path",
                f"{data}/msrvtt/videos/all",
                "--frame_rule",
                "stride",
                "--max_frames",
                str(FRAMES),
                "--feature_framerate",
                str(FRAMERATE),
                "--max_words",
                str(WORDS),
                "--pretrained_clip_name",
                f"{data}/clip/tiny_clip.pt",
                "--freeze_layer_num",
                "-1",
                "--lr",
                str(args.lr),
                "--coef_lr",
                "1",
                "--seed",
                str(args.seed),
                *more,
            ]
        ),
        world,
    )


def read_clips(options: Options, world: World, data: Path, name: str) -> Clips:
    """Decode a split once, by the same code as every run."""
    split = load_data(options, name)
    source = Evaluator(options, world, Tokenizer(), CLIP["resolution"]).source(frame_order=0)
    dataset = VideoDataset(split, source)
    items = [dataset[i] for i in progress(range(len(dataset)), f"reading {name}")]
    ids = [video.video_id for video in split.videos]
    place = {video_id: index for index, video_id in enumerate(ids)}
    told = json.loads((data / "msrvtt" / "order_pairs.json").read_text())[name]
    row = np.argsort(split.caption_to_video, kind="stable")  # one caption a clip, in the order of the clips
    tokens, mask = Tokenizer()([split.captions[i] for i in row], max_words=WORDS)
    return Clips(
        ids,
        torch.stack([item.frames for item in items]),
        tokens,
        mask,
        np.array([[place[one], place[other]] for one, other in told]),
    )


def batches(groups: np.ndarray, size: int, rng: np.random.Generator) -> Iterator[np.ndarray]:
    """Shuffled clips of `groups` [G, n], `size` groups at a time; what is left over is dropped, as in every run."""
    order = rng.permutation(len(groups))
    for start in range(0, len(order) - size + 1, size):
        yield groups[order[start : start + size]].flatten()


def fit(
    model: VideoTextModel, options: Options, world: World, clips: Clips, groups: np.ndarray, size: int, title: str
) -> None:
    """Train in place for --epochs over `groups`, by the optimiser and the step of every run."""
    steps = len(groups) // size * options.train.epochs
    trainer = Trainer(
        model,
        build_optimizer(model, options.train, options.model.compat, steps),
        world,
        options.run.precision,
        options.train.max_grad_norm,
        seed=options.run.seed,
    )
    rng = np.random.default_rng(options.run.seed)
    model.train()
    for _ in progress(range(options.train.epochs), title):
        for index in batches(groups, size, rng):
            trainer.step(clips.batch(index))


def start_model(options: Options) -> VideoTextModel:
    """A model to train, without the lines that a run logs about its weights."""
    seed_everything(options.run.seed)
    log.disabled = True
    try:
        return build_model(options.model, WORDS, FRAMES, to_train=True)[0]
    finally:
        log.disabled = False


def train_clip(args: argparse.Namespace, world: World, data: Path, clips: Clips, path: Path) -> None:
    """The CLIP from which all heads start, saved at `path`: it knows what clips show, but with meanP no order."""
    options = options_of(args, data, world, [*HEADS["meanP"], "--epochs", str(args.clip_epochs)])
    model = start_model(options)
    everything = np.arange(len(clips.video_ids))[:, None]
    fit(model, options, world, clips, everything, min(CLIP_BATCH, len(everything)), "common CLIP")
    torch.save(checkpoint_tensors(model), path)


def train_head(args: argparse.Namespace, world: World, data: Path, head: str, clips: Clips) -> VideoTextModel:
    """A head on the common CLIP, trained on the pairs of `clips`."""
    start = ["--pretrained_clip_name", f"{args.output_dir}/clip.pt", "--activation", "quick_gelu"]
    options = options_of(args, data, world, [*start, "--epochs", str(args.epochs), *HEADS[head]])
    model = start_model(options)
    with torch.no_grad():
        for name, parameter in model.head.named_parameters():
            if name in POSITIONS and parameter.requires_grad:
                parameter.normal_(std=POSITIONS_STD)
    fit(model, options, world, clips, clips.pairs, min(args.batch_pairs, len(clips.pairs)), head)
    return model


@torch.no_grad()
def score(model: VideoTextModel, clips: Clips, began: float) -> Score:
    """Of the test clips; `began`: when the head's training did (time.perf_counter)."""
    model.eval()
    batch = clips.batch(np.arange(len(clips.video_ids)))
    text = model.encode_text(batch.token_ids, batch.token_mask)
    similarity = model.similarity(text, model.encode_video(batch.frames, batch.frame_mask)).numpy()
    own = np.arange(len(similarity))
    wins = pair_wins(similarity, own, clips.pairs)
    return Score(*wins, retrieval_metrics(similarity, own)["raw"]["t2v"]["R@1"], time.perf_counter() - began)


def main(argv: Sequence[str] | None = None) -> int:
    parser = build_parser()
    args = parser.parse_args(argv)
    for name in ("clip_epochs", "epochs", "batch_pairs", "n_train", "n_test", "order_pairs"):
        if getattr(args, name) < 1:
            parser.error(f"--{name} must be >= 1, got {getattr(args, name)}")
    args.output_dir = args.output_dir.resolve()
    data = args.output_dir / "data"
    status = make_sample_data(
        [
            "--output_dir",
            str(data),
            "--datatype",
            "msrvtt",
            "--seed",
            str(args.seed),
            "--captions",
            "plain",
            "--n_train",
            str(args.n_train),
            "--n_test",
            str(args.n_test),
            "--order_pairs",
            str(args.order_pairs),
            "--resolution",
            str(CLIP["resolution"]),
            "--min_seconds",
            SECONDS,
            "--max_seconds",
            SECONDS,
            *(part for name, value in CLIP.items() for part in (f"--clip_{name}", str(value))),
            *(["--force"] if args.force else []),
        ]
    )
    if status:
        return status
    world = setup("cpu")
    setup_logging(None, is_main=True)
    options = options_of(args, data, world, [])
    train, test = (read_clips(options, world, data, name) for name in ("train", "test"))
    train_clip(args, world, data, train, args.output_dir / "clip.pt")
    kinds = kind_of(data, [test.video_ids[one] for one, _ in test.pairs])
    scores = {}
    for head in args.heads:
        began = time.perf_counter()
        model = train_head(args, world, data, head, train)
        scores[head] = score(model, test, began)
        print(f"\n{table(scores, kinds)}\n", flush=True)
    print(
        f"Own clip above its reverse, percent of the two sides of {len(test.pairs)} pairs; a coin has 50, "
        f"and R@1 {100 / len(test.video_ids):.1f}"
    )
    return 0


if __name__ == "__main__":
    sys.exit(main())
