"""Which heads see the order of frames: each is trained on pairs of clips that are each other played backwards.

Both clips of a pair have the same frames, so a model that looks at frames without their order cannot tell which of the
two a caption means: 50 %, a coin. Clips last SECONDS at 25, 29.97 or 30 frames per second and give the four frames
at 0, 1/3, 2/3 and the end, which is its own mirror image: otherwise an order-blind head could tell the clips apart.

First a small CLIP learns, with meanP, what clips show. From it every head starts, as heads do in practice, and gets the
same steps on the pairs of the training split; a batch holds whole pairs, so that order is what is left to learn.
"""

import argparse
import json
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import torch

from dataloaders.datasets import Batch, Collate, PairDataset
from engine.build import build_model, checkpoint_tensors, find_weights
from engine.compat import COMPAT
from engine.data import Loaders, load_data
from engine.distributed import World, setup
from engine.options import Options, parse_options
from engine.progress import log, progress, setup_logging
from engine.step import Trainer, build_optimizer
from main_task_retrieval import seed_everything
from modules.encoders.base import ImageInput
from modules.metrics import retrieval_metrics
from modules.model import VideoTextModel
from modules.tokenizer import Tokenizer

HEADS = {
    "meanP": "--sim_header meanP",
    "seqLSTM": "--sim_header seqLSTM",
    "seqTransf": "--sim_header seqTransf --cross_num_hidden_layers 2",
    "tightTransf": "--sim_header tightTransf --cross_num_hidden_layers 2",
    "xpool": "--sim_header xpool",
    "wti": "--interaction wti",
    # What is new in this tower starts at zero and gets ten times the rate of the rest, which keeps that of the others.
    "clip_evl": "--clip_evl --lr 1e-2 --coef_lr 0.1",
}
SECONDS, FRAMES, FRAMERATE, WORDS, RESOLUTION = "1.018", 4, 3, 32, 64
SAMPLE = f"""-m tools.sample_data --datatype msrvtt --output_dir {{output_dir}}/data --seed {{seed}} --captions plain
    --n_train {{n_train}} --n_test {{n_test}} --order_pairs {{order_pairs}} --resolution {RESOLUTION}
    --min_seconds {SECONDS} --max_seconds {SECONDS} --clip_resolution {RESOLUTION} --clip_patch 16
    --clip_vision_layers 3 --clip_text_layers 3"""
RUN = f"""--do_train --datatype msrvtt --output_dir {{output_dir}} --device cpu --seed {{seed}} --freeze_layer_num -1
    --data_path {{output_dir}}/data/msrvtt/MSRVTT_data.json --train_csv {{output_dir}}/data/msrvtt/MSRVTT_train.9k.csv
    --val_csv {{output_dir}}/data/msrvtt/MSRVTT_JSFUSION_test.csv --features_path {{output_dir}}/data/msrvtt/videos/all
    --frame_rule stride --max_frames {FRAMES} --feature_framerate {FRAMERATE} --max_words {WORDS}
    --lr {{lr}} --coef_lr 1 --precision fp32 --pretrained_clip_name {{output_dir}}/data/clip/tiny_clip.pt"""
FROM_CLIP = "--pretrained_clip_name {output_dir}/clip.pt --activation quick_gelu --epochs {epochs}"
CLIP_BATCH = 64  # of the common CLIP's training
# CLIP4Clip's heads start with the text tower's positions: in a small CLIP 100 times too small to tell frames apart.
POSITIONS_STD = 0.5
POSITIONS = ("frame_position_embeddings.weight", "cross.embeddings.position_embeddings.weight")
KINDS = ("moves", "changes", "take turns")


def pair_wins(similarity: np.ndarray, pairs: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """bool [P, 2]: which captions score their clip above its twin, and which clips their caption above its twin's.

    A tie is lost. similarity [V, V], row i the caption of video i; pairs int [P, 2] of video indices.
    """
    own, twin = pairs, pairs[:, ::-1]
    correct = similarity[own, own]
    return correct > similarity[own, twin], correct > similarity[twin, own]


def interval(wins: np.ndarray) -> tuple[float, float]:
    """Wilson's 95 % interval of the share of wins [P, 2], percent, of P trials: the sides depend on each other."""
    z, trials, share = 1.96, len(wins), wins.mean()
    center = (share + z * z / (2 * trials)) / (1 + z * z / trials)
    half = z / (1 + z * z / trials) * np.sqrt(share * (1 - share) / trials + z * z / (4 * trials**2))
    return 100 * (center - half), 100 * (center + half)


def options_of(args: argparse.Namespace, flags: str) -> Options:
    # Values are put in last: a path may have spaces.
    return parse_options([word.format(**vars(args)) for word in f"{RUN} {flags}".split()])


def read_clips(options: Options, world: World, name: str) -> tuple[Batch, np.ndarray]:
    """A split decoded once, by the same code as every run, its clips in order; and its pairs of clips, int [P, 2]."""
    split = load_data(options, name)
    items = PairDataset(
        split, Loaders(options, world, Tokenizer(), ImageInput(RESOLUTION)).source(frame_order=0), expand=True
    )
    order = np.argsort(split.caption_to_video)  # one caption a clip
    clips = Collate(partial(Tokenizer(), max_words=WORDS))([items[0, i] for i in progress(order, f"reading {name}")])
    told = json.loads(options.data.data_path.with_name("order_pairs.json").read_text())[name]
    return clips, np.array([[clips.video_ids.index(video_id) for video_id in pair] for pair in told])


def batches(groups: np.ndarray, size: int, rng: np.random.Generator) -> Iterator[np.ndarray]:
    """Shuffled clips of `groups` [G, n], `size` groups at a time; what is left over is dropped, as in every run."""
    order = rng.permutation(len(groups))
    for start in range(0, len(order) - size + 1, size):
        yield groups[order[start : start + size]].flatten()


def trained(options: Options, world: World, clips: Batch, groups: np.ndarray, size: int, title: str) -> VideoTextModel:
    """A model after --epochs over `groups`, `size` of them a step, by the optimiser and the step of every run."""
    size, seed = min(size, len(groups)), options.run.seed
    seed_everything(seed)
    log.disabled = True  # what a run says about its weights would stand between the tables
    model = build_model(options, find_weights(options))
    log.disabled = False
    with torch.no_grad():
        for name, parameter in model.head.named_parameters():
            if name in POSITIONS and parameter.requires_grad:
                parameter.normal_(std=POSITIONS_STD)
    steps = len(groups) // size * options.train.epochs
    optimizer = build_optimizer(model, options.train, COMPAT[options.model.compat], steps)
    trainer = Trainer(model, optimizer, world, options.run.precision, options.train.max_grad_norm, seed=seed)
    rng, fields = np.random.default_rng(seed), ("frames", "frame_mask", "token_ids", "token_mask")
    model.train()
    for _ in progress(range(options.train.epochs), title):
        for index in batches(groups, size, rng):
            tensors = {name: getattr(clips, name)[index] for name in fields}
            trainer.step(SimpleNamespace(**tensors, video_ids=[clips.video_ids[i] for i in index]))
    return model


@torch.no_grad()
def score(model: VideoTextModel, clips: Batch, pairs: np.ndarray, kinds: np.ndarray) -> dict[str, str]:
    """The table's titles and cells for a model, of the test clips; `kinds`: what the clips of a pair differ in [P]."""
    text = model.eval().encode_text(clips.token_ids, clips.token_mask)
    similarity = model.similarity(text, model.encode_video(clips.frames, clips.frame_mask)).numpy()
    t2v, v2t = pair_wins(similarity, pairs)
    row = {}
    for title, wins in (("text-to-video", t2v), ("video-to-text", v2t)):
        row[f"{title} (95 %)"] = "{:.1f} ({:.0f} to {:.0f})".format(100 * wins.mean(), *interval(wins))
    for kind in (kind for kind in KINDS if kind in kinds):
        row[f"t2v, {kind} (n = {(kinds == kind).sum()})"] = f"{100 * t2v[kinds == kind].mean():.1f}"
    recall = retrieval_metrics(similarity, np.arange(len(similarity)))["raw"]["t2v"]["R@1"]
    return row | {"t2v R@1, all clips": f"{recall:.1f}"}


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser("benchmarks.bench_order", allow_abbrev=False, description=__doc__.splitlines()[0])
    add = parser.add_argument
    add("--heads", nargs="+", choices=HEADS, default=list(HEADS), metavar="HEAD", help=", ".join(HEADS))
    add("--clip_epochs", type=int, default=14, help="of the common CLIP over all training clips")
    add("--epochs", type=int, default=20, help="of each head over the training pairs")
    add("--batch_pairs", type=int, default=16, help="pairs of clips per step")
    add("--lr", type=float, default=1e-3)
    add("--n_train", type=int, default=800, help="training clips beside --order_pairs x --n_train / --n_test pairs")
    add("--n_test", type=int, default=100, help="test clips beside the pairs")
    add("--order_pairs", type=int, default=100, help="pairs of test clips")
    add("--seed", type=int, default=0, help="of the clips, of the untrained CLIP and of training")
    add("--output_dir", type=Path, default=Path("runs/order"), help="gets the clips and the common CLIP")
    add("--force", action="store_true", help="make the clips anew, over those of other options")
    args = parser.parse_args(argv)
    for name in ("clip_epochs", "epochs", "batch_pairs", "n_train", "n_test", "order_pairs"):
        if getattr(args, name) < 1:
            parser.error(f"--{name} must be >= 1, got {getattr(args, name)}")
    args.output_dir = args.output_dir.resolve()
    sample = [word.format(**vars(args)) for word in f"{SAMPLE} {'--force' if args.force else ''}".split()]
    if status := subprocess.run([sys.executable, *sample]).returncode:
        return status
    world = setup("cpu")
    setup_logging(None, is_main=True)
    options = options_of(args, HEADS["meanP"] + " --epochs {clip_epochs}")
    (train, train_pairs), (test, test_pairs) = (read_clips(options, world, name) for name in ("train", "test"))
    # The CLIP from which all heads start: it knows what clips show, but with meanP no order.
    clip = trained(options, world, train, np.arange(len(train.frames))[:, None], CLIP_BATCH, "common CLIP")
    torch.save(checkpoint_tensors(clip), args.output_dir / "clip.pt")
    scenes = json.loads(options.data.data_path.with_name("scenes.json").read_text())
    shown = [scenes[test.video_ids[one]][0]["things"] for one, _ in test_pairs]
    # What takes turns are two things; a place is stated of all that stays.
    kinds = np.array(["take turns" if len(t) > 1 else "changes" if t[0]["place"] else "moves" for t in shown])
    rows = []
    for head in args.heads:
        began = time.perf_counter()
        options = options_of(args, f"{FROM_CLIP} {HEADS[head]}")
        row = score(trained(options, world, train, train_pairs, args.batch_pairs, head), test, test_pairs, kinds)
        rows.append({"head": head, **row, "s": f"{time.perf_counter() - began:.0f}"})
        lines = [rows[0], ["---"] * len(rows[0]), *(row.values() for row in rows)]
        print("", *(f"| {' | '.join(line)} |" for line in lines), "", sep="\n", flush=True)
    chance = f"a coin has 50, and R@1 {100 / len(test.video_ids):.1f}"
    print(f"Own clip above its reverse, percent of the two sides of {len(test_pairs)} pairs; {chance}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
