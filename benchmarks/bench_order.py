"""Which heads see the order of frames: each is trained on pairs of clips that are each other played backwards.

Both clips of a pair have the same frames, so a model that looks at frames without their order cannot tell which of the
two a caption means: 50 %, a coin. Clips last SECONDS at 25, 29.97 or 30 frames per second and give the four frames
at 0, 1/3, 2/3 and the end: the choice of frames is then its own mirror image. Were it not, the frames of a clip and of
its reverse would differ a little and an order-blind head could learn that.

Every head starts from the same small untrained CLIP and gets the same budget, through main_task_retrieval.py.
"""

from __future__ import annotations

import argparse
import json
import shutil
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from preprocess.make_sample_data import main as make_sample_data

ROOT = Path(__file__).resolve().parent.parent
HEADS = {
    "meanP": ["--sim_header", "meanP"],
    "seqLSTM": ["--sim_header", "seqLSTM"],
    "seqTransf": ["--sim_header", "seqTransf", "--cross_num_hidden_layers", "2"],
    "tightTransf": ["--sim_header", "tightTransf", "--cross_num_hidden_layers", "2"],
    "xpool": ["--sim_header", "xpool"],
    "wti": ["--interaction", "wti"],
    "clip_evl": ["--clip_evl"],
}
KINDS = {"single": "moves or changes", "sequence": "take turns"}  # layout of a scene -> what its pair differs in
SECONDS, FRAMES, FRAMERATE = "1.018", "4", "3"
CLIP = {"resolution": 64, "patch": 16, "vision_layers": 2, "text_layers": 2}


@dataclass(frozen=True)
class Score:
    """`t2v`, `v2t`: bool [P, 2], won or not by each clip of each pair; `recall`: overall text-to-video R@1, percent."""

    t2v: np.ndarray
    v2t: np.ndarray
    recall: float
    seconds: float


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser("benchmarks.bench_order", allow_abbrev=False, description=__doc__.splitlines()[0])
    add = parser.add_argument
    add("--heads", nargs="+", choices=HEADS, default=list(HEADS), metavar="HEAD", help=", ".join(HEADS))
    add("--epochs", type=int, default=60)
    add("--batch_size", type=int, default=64)
    add("--lr", type=float, default=3e-4)
    add("--n_train", type=int, default=4, help="training clips beside the pairs; of these there are --order_pairs x "
        "--n_train / --n_test")  # fmt: skip
    add("--n_test", type=int, default=1, help="test clips beside the pairs")
    add("--order_pairs", type=int, default=100, help="pairs of test clips")
    add("--seed", type=int, default=0, help="of the clips, of the untrained CLIP and of training")
    add("--output_dir", type=Path, default=Path("runs/order"), help="gets the clips and one folder a head")
    return parser


def pair_wins(similarity: np.ndarray, caption_to_video: np.ndarray, pairs: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Who is told from its reverse: bool [P, 2] text-to-video and video-to-text. A tie is lost.

    similarity [V, V], one caption a video with owners `caption_to_video`; pairs int [P, 2] of video indices. Text to
    video: the caption scores its clip above the clip's twin. Video to text: the clip scores its caption above its
    twin's. Raises ValueError where a video has not exactly one caption.
    """
    row = np.argsort(caption_to_video)
    if not np.array_equal(np.asarray(caption_to_video)[row], np.arange(similarity.shape[1])):
        raise ValueError("pairs are scored with exactly one caption for every video")
    own, twin = pairs, pairs[:, ::-1]
    correct = similarity[row[own], own]
    return correct > similarity[row[own], twin], correct > similarity[row[twin], own]


def interval(wins: np.ndarray) -> tuple[float, float]:
    """Wilson's 95 % interval of the share of wins [P, 2], percent, with P and not 2 P trials.

    The two sides of a pair are not independent: where a pair's clips differ in noise alone, one side often wins just
    because the other loses. P trials are the safe count whatever the dependence.
    """
    z, trials, share = 1.96, len(wins), wins.mean()
    center = (share + z * z / (2 * trials)) / (1 + z * z / trials)
    half = z / (1 + z * z / trials) * np.sqrt(share * (1 - share) / trials + z * z / (4 * trials**2))
    return 100 * (center - half), 100 * (center + half)


def train(head: str, args: argparse.Namespace, data: Path, folder: Path) -> float:
    """Train and score one head by the command that a user would give; returns its seconds."""
    command = [
        "main_task_retrieval.py", "--do_train", "--save_similarity", *HEADS[head], "--datatype", "msrvtt",
        "--data_path", f"{data}/msrvtt/MSRVTT_data.json", "--train_csv", f"{data}/msrvtt/MSRVTT_train.9k.csv",
        "--val_csv", f"{data}/msrvtt/MSRVTT_JSFUSION_test.csv", "--features_path", f"{data}/msrvtt/videos/all",
        "--frame_rule", "stride", "--max_frames", FRAMES, "--feature_framerate", FRAMERATE, "--max_words", "32",
        "--pretrained_clip_name", f"{data}/clip/tiny_clip.pt", "--output_dir", str(folder), "--device", "cpu",
        "--epochs", str(args.epochs), "--batch_size", str(args.batch_size), "--batch_size_val", "64",
        "--lr", str(args.lr), "--coef_lr", "1", "--freeze_layer_num", "-1", "--seed", str(args.seed),
        "--select_on", "last", "--save_steps", "0",
    ]  # fmt: skip
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    print(f"{head}: {args.epochs} epochs, see {folder}/log.txt", flush=True)
    began = time.perf_counter()
    done = subprocess.run([sys.executable, *command], cwd=ROOT, capture_output=True, text=True)
    if done.returncode:
        sys.exit(f"benchmarks.bench_order: --heads {head} failed with status {done.returncode}: {' '.join(command)}\n"
                 f"{done.stderr[-2000:]}")  # fmt: skip
    return time.perf_counter() - began


def read_pairs(data: Path, video_ids: Sequence[str]) -> tuple[np.ndarray, np.ndarray]:
    """The test pairs as int [P, 2] into `video_ids`, and the layout of each pair's scenes, str [P]."""
    pairs = json.loads((data / "msrvtt" / "order_pairs.json").read_text())["test"]
    scenes = json.loads((data / "msrvtt" / "scenes.json").read_text())
    place = {video_id: index for index, video_id in enumerate(video_ids)}
    return (np.array([[place[one], place[other]] for one, other in pairs]),
            np.array([scenes[one][0]["layout"] for one, _ in pairs]))  # fmt: skip


def score(data: Path, folder: Path, seconds: float) -> tuple[Score, np.ndarray]:
    """What a run saved -> its score, and the layout of each pair's scenes."""
    with np.load(folder / "similarity.npz") as saved:
        pairs, layouts = read_pairs(data, saved["video_ids"].tolist())
        t2v, v2t = pair_wins(saved["similarity"], saved["caption_to_video"], pairs)
    metrics = json.loads((folder / "results.json").read_text())["metrics"]["raw"]
    return Score(t2v, v2t, metrics["t2v"]["R@1"], seconds), layouts


def table(scores: dict[str, Score], layouts: np.ndarray) -> str:
    """Markdown: pair accuracies in percent with their intervals, text-to-video by kind of pair, overall R@1."""
    kinds = [kind for kind in KINDS if (layouts == kind).any()]
    titles = ["head", "text-to-video (95 %)", "video-to-text (95 %)"]
    titles += [f"t2v, {KINDS[kind]} (n = {(layouts == kind).sum()})" for kind in kinds] + ["t2v R@1, all clips", "s"]
    lines = ["| " + " | ".join(titles) + " |", "|---" * len(titles) + "|"]
    for head, result in scores.items():
        cells = [head]
        for wins in (result.t2v, result.v2t):
            low, high = interval(wins)
            cells.append(f"{100 * wins.mean():.1f} ({low:.0f} to {high:.0f})")
        cells += [f"{100 * result.t2v[layouts == kind].mean():.1f}" for kind in kinds]
        lines.append("| " + " | ".join([*cells, f"{result.recall:.1f}", f"{result.seconds:.0f}"]) + " |")
    return "\n".join(lines)


def main(argv: Sequence[str] | None = None) -> int:
    parser = build_parser()
    args = parser.parse_args(argv)
    for name in ("epochs", "batch_size", "n_train", "n_test", "order_pairs"):
        if getattr(args, name) < 1:
            parser.error(f"--{name} must be >= 1, got {getattr(args, name)}")
    out = args.output_dir.resolve()
    data = out / "data"
    status = make_sample_data([
        "--output_dir", str(data), "--datatype", "msrvtt", "--seed", str(args.seed), "--resolution", "64",
        "--n_train", str(args.n_train), "--n_test", str(args.n_test), "--order_pairs", str(args.order_pairs),
        "--min_seconds", SECONDS, "--max_seconds", SECONDS,
        *(part for name, value in CLIP.items() for part in (f"--clip_{name}", str(value))),
    ])  # fmt: skip
    if status:
        return status
    scores = {}
    for head in args.heads:
        scores[head], layouts = score(data, out / head, train(head, args, data, out / head))
    print(f"\nOwn clip above its reverse, percent of the two sides of {args.order_pairs} pairs; a coin has 50, "
          f"and R@1 {100 / (args.n_test + 2 * args.order_pairs):.1f}\n\n{table(scores, layouts)}")  # fmt: skip
    return 0


if __name__ == "__main__":
    sys.exit(main())
