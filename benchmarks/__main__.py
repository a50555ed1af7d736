"""Every benchmark with small settings, one after the other: `make bench`, or `python -m benchmarks`.

What each prints goes to the screen and to OUTPUT_DIR/NAME.txt, figures to OUTPUT_DIR/NAME.json where the script writes
such. Small settings show that all runs and roughly what to expect; figures to quote come from a script's own defaults,
on a machine that does nothing else.
"""

import argparse
import subprocess
import sys
from pathlib import Path

JSON = "{json}"  # in place of the path
SCRIPTS: dict[str, list[str]] = {
    "bench_video": ["--quick", "--json", JSON],
    "bench_cache": ["--quick", "--json", JSON],
    "bench_loader": ["--rounds", "1", "--json", JSON],
    "bench_evaluation": ["--videos", "4", "--rounds", "1", "--json", JSON],
    "bench_text": ["--captions", "16", "--rounds", "3", "--json", JSON],
    "bench_ranks": ["--captions", "2000", "--videos", "2000", "--rounds", "1"],
    "bench_features": ["--clips", "200", "--sim_header", "meanP"],
    "bench_train": ["--models", "ViT-B/32", "--rounds", "1", "--steps", "1", "--no-compile", "--json", JSON],
    "bench_memory": ["--batch", "8", "--pieces", "2"],
}
LEFT_OUT = {"bench_order"}  # half an hour, and not about speed


def main() -> int:
    """Returns 1 if a script failed, 0 otherwise."""
    parser = argparse.ArgumentParser("benchmarks", allow_abbrev=False, description=__doc__.splitlines()[0])
    parser.add_argument("--output_dir", type=Path, default=Path("runs/bench"), help="folder for tables and figures")
    parser.add_argument("--only", nargs="+", choices=list(SCRIPTS), default=list(SCRIPTS), help="default: all")
    args = parser.parse_args()
    args.output_dir.mkdir(parents=True, exist_ok=True)
    failed = []
    for name in args.only:
        figures = args.output_dir / f"{name}.json"
        flags = [str(figures) if flag == JSON else flag for flag in SCRIPTS[name]]
        print(f"== {name} {' '.join(flags)}", flush=True)
        command = [sys.executable, "-m", f"benchmarks.{name}", *flags]
        with (
            open(args.output_dir / f"{name}.txt", "w") as table,
            subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as running,
        ):
            for line in running.stdout or ():
                print(line, end="", flush=True)
                table.write(line)
        failed += [name] if running.returncode else []
    if failed:
        print(f"failed: {', '.join(failed)}")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
