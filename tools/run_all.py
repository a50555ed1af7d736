"""Zero-shot with InternVideo's tower on every dataset that is there, then one table.

A dataset is there when --data_root holds a folder of its --datatype name. Further flags go to every evaluation. A
dataset that fails stops no other; a second call takes up results from the same weights and flags, and runs the rest.
"""

import argparse
import json
import os
import subprocess
import sys
from pathlib import Path

if not __package__:  # run as a file: the repository's root is not on the path
    sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from engine.records import ROOT
from plugins import user_path
from tools.published import read_run
from tools.results import as_markdown, table

DATATYPES = ("msrvtt", "msvd", "lsmdc", "activity", "didemo", "vatex")  # with a script in zeroshot_scripts


def is_done(folder: Path, weights: Path, flags: list[str]) -> bool:
    """Whether `folder` holds results from these weights and ending with these flags."""
    try:
        found = json.loads((folder / "results.json").read_text(encoding="utf-8"))
        same_flags = found["command"][len(found["command"]) - len(flags) :] == list(flags)
        return same_flags and found["options"]["pretrained_path"] == str(weights)
    except (OSError, ValueError, KeyError, TypeError):
        return False


def main(argv: list[str] | None = None) -> int:
    """Returns 0 when every dataset that is there has results, else 1."""
    parser = argparse.ArgumentParser("tools.run_all", allow_abbrev=False, description=__doc__.splitlines()[0])
    parser.add_argument("--weights", type=user_path, required=True, help="InternVideo's pre-trained checkpoint")
    parser.add_argument("--data_root", type=user_path, required=True, help="folder of the datasets' folders")
    parser.add_argument("--output_root", type=user_path, default=Path("runs/run_all"), help="a folder for each dataset")
    asked, flags = parser.parse_known_args(argv)
    weights, root, out = (p.absolute() for p in (asked.weights, asked.data_root, asked.output_root))
    if not (present := [datatype for datatype in DATATYPES if (root / datatype).is_dir()]):
        parser.error(f"--data_root {root} holds none of the folders {', '.join(DATATYPES)}")
    failed = []
    for datatype in present:
        done = is_done(out / datatype, weights, flags)
        print(f"== {datatype}{': its results are there' if done else ''}", flush=True)
        if done:
            continue
        script = ROOT / "zeroshot_scripts" / f"eval_{datatype.replace('activity', 'activitynet')}.sh"
        places = {"DATA_PATH": str(root / datatype), "OUTPUT": str(out / datatype), "WEIGHTS": str(weights)}
        environment = {"PYTHON": sys.executable} | os.environ | places
        environment.pop("VIDEO_PATH", None)  # each dataset has videos of its own
        if subprocess.run(["bash", str(script), *flags], env=environment).returncode:
            failed.append(datatype)
    if measured := [read_run(out / datatype) for datatype in present if datatype not in failed]:
        print(as_markdown(table(measured)))
    for datatype in failed:
        print(f"error: {datatype} failed; what it said is above and in {out / datatype}/log.txt", file=sys.stderr)
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
