"""Gather finished runs into one table: a row for each kind of run and post-processing.

Runs that differ in nothing but --seed and --output_dir share a row: mean ± standard deviation (of the sample) over
them. Rows whose post-processing looks at other queries say "transductive"; compare them with each other only.
"""

import argparse
import json
import sys
from pathlib import Path
from typing import Any

import pandas as pd

if not __package__:  # run as a file: the repository's root is not on the path
    sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from modules.metrics import LOOKS_AT
from tools.published import head_of, read_run, tower_of


def table(runs: list[dict[str, Any]]) -> pd.DataFrame:
    """A row of text for each kind of run and post-processing."""
    groups: dict[str, list[dict[str, Any]]] = {}
    for found in runs:
        what = [found.get(name) for name in ("dataset", "split", "n_videos", "n_captions", "missing_videos")]
        options = {name: value for name, value in found["options"].items() if name not in ("seed", "output_dir")}
        groups.setdefault(json.dumps([what, options], sort_keys=True), []).append(found)
    rows = []
    for group in groups.values():
        first = group[0]
        setup: dict[str, Any] = {"run": first["name"], "dataset": first["dataset"], "split": first["split"]}
        setup |= {"videos": first["n_videos"], "captions": first["n_captions"]}
        setup |= {"tower": tower_of(first), "head": head_of(first["options"])}
        for kind in first["metrics"]:
            label = f"{kind} (transductive)" if "(transductive)" in LOOKS_AT.get(kind, "") else kind
            values = pd.json_normalize([run["metrics"][kind] for run in group], sep=" ")  # columns such as "t2v R@1"
            numbers = values.mean().map("{:.1f}".format)
            if len(group) > 1:
                numbers += values.std().map(" ± {:.1f}".format)
            rows.append(setup | {"post-processing": label, "runs": len(group)} | numbers.to_dict())
    return pd.DataFrame(rows).fillna("").astype(str)


def as_markdown(rows: pd.DataFrame) -> str:
    lines = [rows.columns, ["---"] * len(rows.columns), *rows.replace(r"\|", r"\\|", regex=True).to_numpy()]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser("tools.results", allow_abbrev=False, description=__doc__.splitlines()[0])
    parser.add_argument("runs", nargs="+", type=Path, help="folders of runs, or their results.json")
    parser.add_argument("--format", choices=("markdown", "csv", "latex"), default="markdown")
    asked = parser.parse_args(argv)
    try:
        rows = table([read_run(path) for path in asked.runs])
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    if asked.format == "markdown":
        print(as_markdown(rows))
    elif asked.format == "csv":
        print(rows.to_csv(index=False), end="")
    else:  # for the booktabs package
        align = "".join("r" if name.startswith(("t2v", "v2t")) else "l" for name in rows.columns)
        print(rows.to_latex(index=False, escape=True, column_format=align).replace("±", r"$\pm$"), end="")
    return 0


if __name__ == "__main__":
    sys.exit(main())
