"""Repeat a finished run from its results.json, and say whether the metrics came out the same.

It runs in the same folder with the same number of processes and writes to --output_dir. Annotation files and weights
must have the SHA-256 that they had. Exit status 0: the same metrics; 1: others, or the run cannot be repeated.
"""

import argparse
import json
import shlex
import subprocess
import sys
from pathlib import Path
from typing import Any

import pandas as pd

if not __package__:  # run as a file: the repository's root is not on the path
    sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from checkpoints.whole import file_sha256
from engine.records import ROOT, git_revision
from plugins import user_path


def changed_files(found: dict[str, Any]) -> list[str]:
    """What the run read and is gone or differs now. What the run itself wrote is not among it."""
    folder, own = Path(found["folder"]), Path(found["options"]["output_dir"])
    problems = []
    for name, digest in [item for hashes in found["sha256"].values() for item in hashes.items()]:
        path = folder / Path(name).expanduser()
        if not (Path(name).parent == own and found["options"]["do_train"]):
            if not path.is_file():
                problems.append(f"{path} is gone")
            elif file_sha256(path) != digest:
                problems.append(f"{path} has changed")
    return problems


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser("tools.rerun", allow_abbrev=False, description=__doc__.splitlines()[0])
    parser.add_argument("file", type=user_path, help="results.json of the run")
    parser.add_argument("--output_dir", type=user_path, help="where to write; default: the run's own with _rerun added")
    parser.add_argument("--allow_changed", action="store_true", help="go on with files that have changed")
    parser.add_argument("--show", action="store_true", help="print the command and stop")
    asked = parser.parse_args(argv)
    try:
        found = json.loads(asked.file.read_text(encoding="utf-8"))
        own = asked.file.resolve().parent
        output_dir = (asked.output_dir or own.with_name(f"{own.name}_rerun")).absolute()
        launcher = ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={found['processes']}"]
        script, *flags = found["command"]  # of a repeated flag the last one counts
        command = [sys.executable, *(launcher if found["processes"] > 1 else []), str(ROOT / script), *flags]
        command += ["--output_dir", str(output_dir)]
        problems = changed_files(found)
    except (OSError, ValueError, KeyError, TypeError) as error:
        print(f"error: {asked.file} is not a results.json that tells how to repeat its run: {error!r}", file=sys.stderr)
        return 1
    print(f"cd {shlex.quote(found['folder'])} && {shlex.join(command)}", flush=True)
    if asked.show:
        return 0
    if git_revision() != found["git"]:
        print(f"note: the code was {found['git']} and is {git_revision()}", file=sys.stderr)
    if problems and not asked.allow_changed:
        print(f"error: {'; '.join(problems)}. --allow_changed runs all the same", file=sys.stderr)
        return 1
    if subprocess.run(command, cwd=found["folder"]).returncode:
        return 1
    again = json.loads((output_dir / "results.json").read_text(encoding="utf-8"))
    before, now = (pd.json_normalize(run["metrics"], sep=" ").iloc[0].to_dict() for run in (found, again))
    different = [f"{name}: {was} before, {now.get(name)} now" for name, was in before.items() if now.get(name) != was]
    print("\n".join(different) or "the same metrics")
    return 1 if different else 0


if __name__ == "__main__":
    sys.exit(main())
