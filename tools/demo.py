"""The whole path on sample data: zero-shot with an untrained CLIP, fine-tuning, evaluation of the saved checkpoint.

``make demo`` runs this. Everything it writes lies under runs/demo, one folder per run with its results.json.
"""

from __future__ import annotations

import argparse
import json
import shutil
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser("tools.demo", allow_abbrev=False, description=__doc__.splitlines()[0])
    parser.add_argument("--output_dir", type=Path, default=Path("runs/demo"), help="where everything goes")
    parser.add_argument("--seed", type=int, default=0, help="of the sample data and of training")
    parser.add_argument("--epochs", type=int, default=25)
    parser.add_argument("--n_train", type=int, default=800, help="training clips")
    parser.add_argument("--n_test", type=int, default=100, help="held-out clips, the gallery")
    return parser


def run(title: str, command: Sequence[str]) -> None:
    """Show a command and run it from the repository's root; a failure ends the demo with the command's status."""
    print(f"\n== {title}\n$ python {' '.join(command)}", flush=True)
    began = time.perf_counter()
    status = subprocess.run([sys.executable, *command], cwd=ROOT).returncode
    if status:
        sys.exit(f"tools.demo: the step '{title}' failed with status {status}; its output is above")
    print(f"-- {time.perf_counter() - began:.0f} s", flush=True)


def retrieval_flags(data: Path, seed: int) -> list[str]:
    """The flags that all three runs share: where the data are, and how clips become frames."""
    return [
        "--datatype",
        "msrvtt",
        "--data_path",
        f"{data}/msrvtt/MSRVTT_data.json",
        "--train_csv",
        f"{data}/msrvtt/MSRVTT_train.9k.csv",
        "--val_csv",
        f"{data}/msrvtt/MSRVTT_JSFUSION_test.csv",
        "--features_path",
        f"{data}/msrvtt/videos/all",
        "--max_frames",
        "4",
        "--max_words",
        "32",
        "--seed",
        str(seed),
        "--batch_size_val",
        "32",
        "--device",
        "cpu",
    ]


def show_table(folder: Path, chance: float) -> dict[str, dict]:
    """Print one table over the runs' results.json; returns their raw metrics."""
    columns = ("R@1", "R@5", "R@10", "MedR", "MeanR")
    heads = "".join(f"{c:>7}" for c in columns)
    print(f"\n{'':<34}{'text-to-video':^35}   {'video-to-text':^35}\n{'':<34}{heads}   {heads}")
    found = {}
    for name, title in (
        ("zero_shot", "zero-shot, untrained CLIP"),
        ("fine_tune", "fine-tuned, meanP"),
        ("evaluate", "its checkpoint, evaluated again"),
    ):
        metrics = json.loads((folder / name / "results.json").read_text())["metrics"]
        found[name] = metrics
        both = [[metrics["raw"][d][c] for c in columns] for d in ("t2v", "v2t")]
        print(f"{title:<34}{''.join(f'{x:7.1f}' for x in both[0])}   {''.join(f'{x:7.1f}' for x in both[1])}")
    print(f"\nchance: R@1 {chance:.1f}; results in {folder}/*/results.json")
    return found


def main(argv: Sequence[str] | None = None) -> int:
    args = build_parser().parse_args(argv)
    began, out = time.perf_counter(), args.output_dir.resolve()
    data, train = out / "data", out / "fine_tune"
    for name in ("zero_shot", "fine_tune", "evaluate"):
        shutil.rmtree(out / name, ignore_errors=True)
    run(
        "sample data: clips of moving shapes, captions, a small untrained CLIP",
        [
            "-m",
            "preprocess.make_sample_data",
            "--output_dir",
            str(data),
            "--datatype",
            "msrvtt",
            "--seed",
            str(args.seed),
            "--n_train",
            str(args.n_train),
            "--n_test",
            str(args.n_test),
        ],
    )
    shared = retrieval_flags(data, args.seed)
    weights = ["--pretrained_clip_name", f"{data}/clip/tiny_clip.pt"]
    run("zero-shot", ["main_task_retrieval.py", "--do_eval", *weights, "--output_dir", str(out / "zero_shot"), *shared])
    run(
        "fine-tuning",
        [
            "main_task_retrieval.py",
            "--do_train",
            *weights,
            "--output_dir",
            str(train),
            "--epochs",
            str(args.epochs),
            "--batch_size",
            "64",
            "--lr",
            "1e-3",
            "--coef_lr",
            "1",
            "--freeze_layer_num",
            "-1",
            *shared,
        ],
    )
    run(
        "the saved checkpoint, evaluated again",
        [
            "main_task_retrieval.py",
            "--do_eval",
            "--finetuned_path",
            str(train / "pytorch_model.bin"),
            "--output_dir",
            str(out / "evaluate"),
            *shared,
        ],
    )
    found = show_table(args.output_dir, 100 / args.n_test)
    if found["fine_tune"] != found["evaluate"]:
        print("tools.demo: the saved checkpoint does not evaluate to the same numbers", file=sys.stderr)
        return 1
    print(f"{time.perf_counter() - began:.0f} s in all")
    return 0


if __name__ == "__main__":
    sys.exit(main())
