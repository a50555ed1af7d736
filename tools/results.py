"""Gather finished runs into one table: a row for each kind of run and post-processing.

    python -m tools.results runs/* --format latex

Runs that differ in nothing but --seed and --output_dir share a row: mean ± standard deviation (of the sample) over
them. Rows whose post-processing looks at other queries say "transductive"; compare them with each other only.
"""

import argparse
import json
import statistics
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pandas as pd

if not __package__:  # run as a file: the repository's root is not on the path
    sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from modules.metrics import LOOKS_AT
from tools.published import head_of, read_run, tower_of

COLUMNS = ("R@1", "R@5", "R@10", "MedR", "MeanR")
APART = ("seed", "output_dir")


def kind_of_run(found: dict[str, Any]) -> str:
    """The same text for runs that differ in nothing but APART."""
    options = {k: v for k, v in found["options"].items() if k not in APART}
    what = {k: found.get(k) for k in ("dataset", "split", "n_videos", "n_captions", "missing_videos")}
    return json.dumps([what, options], sort_keys=True)


def cell(values: list[float]) -> str:
    """One number, or mean ± standard deviation of several."""
    spread = f" ± {statistics.stdev(values):.1f}" if len(values) > 1 else ""
    return f"{statistics.mean(values):.1f}{spread}"


def table(runs: Sequence[dict[str, Any]]) -> pd.DataFrame:
    """A row of text for each kind of run and post-processing."""
    groups: dict[str, list[dict[str, Any]]] = {}
    for found in runs:
        groups.setdefault(kind_of_run(found), []).append(found)
    rows = []
    for group in groups.values():
        first = group[0]
        setup: dict[str, Any] = {"run": first["name"], "dataset": first["dataset"], "split": first["split"]}
        setup |= {"videos": first["n_videos"], "captions": first["n_captions"]}
        setup |= {"tower": tower_of(first), "head": head_of(first["options"])}
        for kind, both in first["metrics"].items():
            label = f"{kind} (transductive)" if "(transductive)" in LOOKS_AT.get(kind, "") else kind
            numbers = {
                f"{direction} {name}": cell([run["metrics"][kind][direction][name] for run in group])
                for direction in both
                for name in COLUMNS
            }
            rows.append(setup | {"post-processing": label, "runs": len(group)} | numbers)
    return pd.DataFrame(rows).fillna("").astype(str)


def as_markdown(rows: pd.DataFrame) -> str:
    lines = [rows.columns, ["---"] * len(rows.columns), *rows.replace(r"\|", r"\\|", regex=True).to_numpy()]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def as_csv(rows: pd.DataFrame) -> str:
    return rows.to_csv(index=False).rstrip("\n")


def as_latex(rows: pd.DataFrame) -> str:
    """A tabular for the booktabs package."""
    align = "".join("r" if name.startswith(("t2v", "v2t")) else "l" for name in rows.columns)
    return rows.to_latex(index=False, escape=True, column_format=align).rstrip("\n").replace("±", r"$\pm$")


FORMATS = {"markdown": as_markdown, "csv": as_csv, "latex": as_latex}


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser("tools.results", allow_abbrev=False, description=__doc__.splitlines()[0])
    parser.add_argument("runs", nargs="+", type=Path, help="folders of runs, or their results.json")
    parser.add_argument("--format", choices=FORMATS, default="markdown")
    asked = parser.parse_args(argv)
    try:
        print(FORMATS[asked.format](table([read_run(path) for path in asked.runs])))
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
