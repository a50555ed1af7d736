"""Published numbers beside a run's own, where both measure the same; else what differs. The rows: published.json.

python -m tools.published runs/x
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

if not __package__:  # run as a file: the repository's root is not on the path
    sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from tools.runs import head_of, read_run, tower_of

TABLE = Path(__file__).with_name("published.json")
HALF = ("CLIP4Clip", "half")  # whose rows were trained in which --precision
TITLES = {"t2v": "text-to-video", "v2t": "video-to-text"}


def published_rows() -> list[dict[str, Any]]:
    return json.loads(TABLE.read_text(encoding="utf-8"))


def protocol_of(found: Mapping[str, Any], tower: str) -> dict[str, Any]:
    """What must be equal before two results may stand side by side, under the names of published.json."""
    options = found["options"]
    trained = options["do_train"] or options["finetuned_path"] or options["init_model"]
    return {
        "split": found["split"],
        "videos": found["n_videos"],
        "captions": found["n_captions"],
        "tower": tower,
        "weights": "fine-tuned" if trained else "zero-shot",
        "compat": options["compat"],
        "head": head_of(options),
    }


def differences(row: Mapping[str, Any], ours: Mapping[str, Any]) -> list[str]:
    """Where the protocols of a published row and of a run part, in words."""
    return [
        f"{name} {value} here, {' or '.join(row[name]) if name == 'compat' else row[name]} there"
        for name, value in ours.items()
        if (value not in row[name] if name == "compat" else value != row[name])
    ]


def beside(row: Mapping[str, Any], found: Mapping[str, Any]) -> list[str]:
    """A table of published, measured and their difference, for what the row holds.

    How clips were read is said and not compared: the papers do not give all of it.
    """
    kind, metrics, options, trained_in = (
        row["postprocessing"],
        found["metrics"],
        found["options"],
        found.get("trained_in"),
    )
    lines = []
    if row["source"].startswith(HALF[0]) and row["weights"] == "fine-tuned" and trained_in != HALF[1]:
        lines.append(f"not trained alike: {HALF[1]} there, {trained_in or 'unknown'} here, see docs/training.md;")
    lines += [
        f"beside {row['source']}, {row['weights']}, {row['tower']}, {row['head']}, {kind};",
        f"here at most {options['max_frames']} frames by the {options['frame_rule']} rule, "
        f"{options['feature_framerate']} a second, {options['max_words']} words:",
    ]
    if any(metrics[kind][direction]["MedR"] % 1 for direction in row["metrics"]):
        lines.append("MedR between two ranks: here the mean of the two in the middle, there the lower one;")
    for direction, values in row["metrics"].items():
        own = metrics[kind][direction]
        lines.append(f"{TITLES[direction]:<16}" + "".join(f"{name:>8}" for name in values))
        lines.append(f"{'  published':<16}" + "".join(f"{value:8.1f}" for value in values.values()))
        lines.append(f"{'  here':<16}" + "".join(f"{own[name]:8.1f}" for name in values))
        lines.append(f"{'  difference':<16}" + "".join(f"{own[name] - value:+8.1f}" for name, value in values.items()))
    return lines


def compare(found: Mapping[str, Any], tower: str) -> list[str]:
    """Lines to print after an evaluation. `found`: content of results.json; `tower`: such as ``CLIP ViT-B/32``.

    Rows are compared when all of :func:`protocol_of` agrees, and each with the post-processing that it was published
    with. Without such a row the nearest one of the dataset is named, and what differs.
    """
    rows = [row for row in published_rows() if row["dataset"] == found["dataset"]]
    ours = protocol_of(found, tower)
    same = [row for row in rows if not differences(row, ours)]
    if same:
        return [line for row in same for line in beside(row, found)]
    if not rows:
        return [f"no published row for {found['dataset']}"]
    nearest = min(rows, key=lambda row: len(differences(row, ours)))
    return [f"not compared with {nearest['source']}, {nearest['weights']}: {'; '.join(differences(nearest, ours))}"]


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser("tools.published", allow_abbrev=False, description=__doc__.splitlines()[0])
    parser.add_argument("run", type=Path, help="folder of a finished run, or its results.json")
    try:
        found = read_run(parser.parse_args(argv).run)
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    print("\n".join(compare(found, tower_of(found))))
    return 0


if __name__ == "__main__":
    sys.exit(main())
