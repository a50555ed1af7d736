"""The whole path on sample data: zero-shot with an untrained CLIP, fine-tuning, evaluation of the saved checkpoint.

``make demo`` runs this. Everything it writes lies under runs/demo, one folder per run with its results.json.
"""

import argparse
import json
import shutil
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
SAMPLE = """-m tools.sample_data --datatype msrvtt --output_dir {data} --seed {seed} --n_train {n_train}
    --n_test {n_test}"""
DATA = """--datatype msrvtt --data_path {data}/msrvtt/MSRVTT_data.json --features_path {data}/msrvtt/videos/all
    --train_csv {data}/msrvtt/MSRVTT_train.9k.csv --val_csv {data}/msrvtt/MSRVTT_JSFUSION_test.csv
    --max_frames 4 --max_words 32 --batch_size_val 32 --seed {seed} --device cpu"""
CLIP = "--pretrained_clip_name {data}/clip/tiny_clip.pt"
TRAINING = "--epochs {epochs} --batch_size 64 --lr 1e-3 --coef_lr 1 --freeze_layer_num -1"
RUNS = {  # folder -> title and flags beside DATA, with which frames, words and device are the same in all runs
    "zero_shot": ("zero-shot, untrained CLIP", f"--do_eval {CLIP}"),
    "fine_tune": ("fine-tuned, meanP", f"--do_train {CLIP} {TRAINING}"),
    "evaluate": ("its checkpoint, evaluated again", "--do_eval --finetuned_path {out}/fine_tune/pytorch_model.bin"),
}
COLUMNS = ("R@1", "R@5", "R@10", "MedR", "MeanR")


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser("tools.demo", allow_abbrev=False, description=__doc__.splitlines()[0])
    parser.add_argument("--output_dir", type=Path, default=Path("runs/demo"), help="where everything goes")
    parser.add_argument("--seed", type=int, default=0, help="of the sample data and of training")
    parser.add_argument("--epochs", type=int, default=25)
    parser.add_argument("--n_train", type=int, default=800, help="training clips")
    parser.add_argument("--n_test", type=int, default=100, help="held-out clips, the gallery")
    args = parser.parse_args(argv)
    began, out = time.perf_counter(), args.output_dir.resolve()
    values = vars(args) | {"out": out, "data": out / "data"}
    steps = {"sample data: clips of moving shapes, captions, a small untrained CLIP": SAMPLE}
    for name, (title, flags) in RUNS.items():
        shutil.rmtree(out / name, ignore_errors=True)
        steps[title] = f"main_task_retrieval.py {flags} {DATA} --output_dir {{out}}/{name}"
    for title, text in steps.items():
        command = [word.format(**values) for word in text.split()]  # filled in last: a path may have spaces
        print(f"\n== {title}\n$ python {' '.join(command)}", flush=True)
        started = time.perf_counter()
        if status := subprocess.run([sys.executable, *command], cwd=ROOT).returncode:
            sys.exit(f"tools.demo: the step '{title}' failed with status {status}; its output is above")
        print(f"-- {time.perf_counter() - started:.0f} s", flush=True)

    heads = "".join(f"{c:>7}" for c in COLUMNS)
    print(f"\n{'':<34}{'text-to-video':^35}   {'video-to-text':^35}\n{'':<34}{heads}   {heads}")
    found = {name: json.loads((out / name / "results.json").read_text())["metrics"] for name in RUNS}
    for name, (title, _) in RUNS.items():
        both = ("".join(f"{found[name]['raw'][d][c]:7.1f}" for c in COLUMNS) for d in ("t2v", "v2t"))
        print(f"{title:<34}{'   '.join(both)}")
    print(f"\nchance: R@1 {100 / args.n_test:.1f}; results in {args.output_dir}/*/results.json")
    if found["fine_tune"] != found["evaluate"]:
        print("tools.demo: the saved checkpoint does not evaluate to the same numbers", file=sys.stderr)
        return 1
    print(f"{time.perf_counter() - began:.0f} s in all")
    return 0


if __name__ == "__main__":
    sys.exit(main())
