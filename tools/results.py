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

from modules.metrics import LOOKS_AT

COLUMNS = ("R@1", "R@5", "R@10", "MedR", "MeanR")
HEAD = ("run", "dataset", "split", "videos", "captions", "tower", "head", "post-processing", "runs")
APART = ("seed", "output_dir")


def read_run(path: Path) -> dict[str, Any]:
    """The results.json of a folder, or the file itself. Raises ValueError naming what is wrong with it."""
    file = path / "results.json" if path.is_dir() else path
    try:
        found = json.loads(file.read_text(encoding="utf-8"))
        if not {"metrics", "options", "dataset"} <= set(found):
            raise ValueError("it lacks metrics, options or dataset")
    except (OSError, ValueError, TypeError) as error:
        raise ValueError(f"{file} is not the results.json of a finished run: {error}") from error
    return found | {"name": file.resolve().parent.name}


def kind_of_run(found: dict[str, Any]) -> str:
    """The same text for runs that differ in nothing but APART."""
    options = {k: v for k, v in found["options"].items() if k not in APART}
    what = {k: found.get(k) for k in ("dataset", "split", "n_videos", "n_captions", "missing_videos")}
    return json.dumps([what, options], sort_keys=True)


def cell(values: list[float]) -> str:
    """One number, or mean ± standard deviation of several."""
    if len(values) == 1:
        return f"{values[0]:.1f}"
    return f"{statistics.mean(values):.1f} ± {statistics.stdev(values):.1f}"


def table(runs: Sequence[dict[str, Any]]) -> list[list[str]]:
    """Header and rows of text."""
    groups: dict[str, list[dict[str, Any]]] = {}
    for found in runs:
        groups.setdefault(kind_of_run(found), []).append(found)
    rows = [[*HEAD, *(f"{direction} {name}" for direction in ("t2v", "v2t") for name in COLUMNS)]]
    for group in groups.values():
        first, options = group[0], group[0]["options"]
        tower = "InternVideo" if options.get("clip_evl") else "CLIP"
        token_wise = options.get("interaction", "no")
        head = options.get("sim_header", "") + (f" {token_wise}" if token_wise != "no" else "")
        for kind in first["metrics"]:
            label = f"{kind} (transductive)" if "(transductive)" in LOOKS_AT.get(kind, "") else kind
            counts = first["n_videos"], first["n_captions"]
            what = [first["name"], first["dataset"], first["split"], *counts, tower, head, label, len(group)]
            numbers = [
                cell([run["metrics"][kind][direction][name] for run in group])
                if direction in first["metrics"][kind]
                else ""
                for direction in ("t2v", "v2t")
                for name in COLUMNS
            ]
            rows.append([*map(str, what), *numbers])
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
    special = str.maketrans(
        {
            "&": r"\&",
            "%": r"\%",
            "_": r"\_",
            "#": r"\#",
            "$": r"\$",
            "{": r"\{",
            "}": r"\}",
            "\\": r"\textbackslash{}",
            "±": r"$\pm$",
            "~": r"\textasciitilde{}",
            "^": r"\textasciicircum{}",
        }
    )
    lines = [" & ".join(text.translate(special) for text in row) + r" \\" for row in rows]
    columns = "l" * len(HEAD) + "r" * (len(rows[0]) - len(HEAD))
    return "\n".join(
        [
            rf"\begin{{tabular}}{{{columns}}}",
            r"\toprule",
            lines[0],
            r"\midrule",
            *lines[1:],
            r"\bottomrule",
            r"\end{tabular}",
        ]
    )


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
