"""Gather finished runs into one table: a row for each kind of run and post-processing.

    python -m tools.results runs/* --format latex

Runs that differ in nothing but --seed and --output_dir share a row: mean ± standard deviation (of the sample) over
them. Rows whose post-processing looks at other queries say "transductive"; compare them with each other only.
"""

from __future__ import annotations

import argparse
import csv
import io
import json
import statistics
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

if not __package__:  # run as a file: the repository's root is not on the path
    sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from modules.metrics import LOOKS_AT
from tools.runs import head_of, read_run, tower_of

COLUMNS = ("R@1", "R@5", "R@10", "MedR", "MeanR")
HEAD = ("run", "dataset", "split", "videos", "captions", "tower", "head", "post-processing", "runs")
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


def table(runs: Sequence[dict[str, Any]]) -> list[list[str]]:
    """Header and rows of text."""
    groups: dict[str, list[dict[str, Any]]] = {}
    for found in runs:
        groups.setdefault(kind_of_run(found), []).append(found)
    rows = [[*HEAD, *(f"{direction} {name}" for direction in ("t2v", "v2t") for name in COLUMNS)]]
    for group in groups.values():
        first = group[0]
        counts = first["n_videos"], first["n_captions"]
        setup = first["name"], first["dataset"], first["split"], *counts, tower_of(first), head_of(first["options"])
        for kind, both in first["metrics"].items():
            label = f"{kind} (transductive)" if "(transductive)" in LOOKS_AT.get(kind, "") else kind
            numbers = [
                cell([run["metrics"][kind][direction][name] for run in group]) if direction in both else ""
                for direction in ("t2v", "v2t")
                for name in COLUMNS
            ]
            rows.append([*map(str, setup), label, str(len(group)), *numbers])
    return rows


def as_markdown(rows: list[list[str]]) -> str:
    lines = [" | ".join(text.replace("|", "\\|") for text in row) for row in rows]
    lines.insert(1, " | ".join(["---"] * len(rows[0])))
    return "\n".join(f"| {line} |" for line in lines)


def as_csv(rows: list[list[str]]) -> str:
    text = io.StringIO()
    csv.writer(text, lineterminator="\n").writerows(rows)
    return text.getvalue().rstrip("\n")


def as_latex(rows: list[list[str]]) -> str:
    """A tabular for the booktabs package."""
    special: dict[str, Any] = {sign: f"\\{sign}" for sign in "&%_#${}"} | {
        "\\": r"\textbackslash{}",
        "±": r"$\pm$",
    }
    special |= {"~": r"\textasciitilde{}", "^": r"\textasciicircum{}"}
    head, *body = (" & ".join(text.translate(str.maketrans(special)) for text in row) + r" \\" for row in rows)
    begin = rf"\begin{{tabular}}{{{'l' * len(HEAD)}{'r' * (len(rows[0]) - len(HEAD))}}}"
    return "\n".join([begin, r"\toprule", head, r"\midrule", *body, r"\bottomrule", r"\end{tabular}"])


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
