"""Published numbers beside a run's own, where both measure the same; else what differs. The rows: published.json.

Also what the tools read from a finished run. Imports no torch: the tools that need none start at once.
"""

import argparse
import json
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

ROWS: list[dict[str, Any]] = json.loads(Path(__file__).with_name("published.json").read_text(encoding="utf-8"))
HALF = ("CLIP4Clip", "half")  # whose rows were trained in which --precision
TITLES = {"t2v": "text-to-video", "v2t": "video-to-text"}


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


def tower_of(found: Mapping[str, Any]) -> str:
    """Such as ``CLIP ViT-B/32``; without the size where an older results.json does not tell it."""
    options = found["options"]
    kind = "InternVideo" if options.get("clip_evl") else "CLIP"
    other_weights = any(options.get(name) for name in ("finetuned_path", "init_model", "pretrained_path"))
    size = options.get("pretrained_clip_name", "")
    tells = size.startswith("ViT-") and (options.get("mergeclip") or not other_weights)
    return found.get("tower") or (f"{kind} {size}" if tells else kind)


def head_of(options: Mapping[str, Any]) -> str:
    """Such as ``meanP`` or ``meanP wti``."""
    token_wise = options.get("interaction", "no")
    return options.get("sim_header", "") + (f" {token_wise}" if token_wise != "no" else "")


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
    theirs = {name: row[name] if name == "compat" else [row[name]] for name in ours}
    apart = [name for name in ours if ours[name] not in theirs[name]]
    return [f"{name} {ours[name]} here, {' or '.join(map(str, theirs[name]))} there" for name in apart]


def beside(row: Mapping[str, Any], found: Mapping[str, Any]) -> list[str]:
    """Published, measured and difference. How clips were read is said, not compared: papers do not give all of it."""
    kind, metrics, options = row["postprocessing"], found["metrics"], found["options"]
    lines, trained_in = [], found.get("trained_in")
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
    ours = protocol_of(found, tower)
    rows = [(differences(row, ours), row) for row in ROWS if row["dataset"] == found["dataset"]]
    if not rows:
        return [f"no published row for {found['dataset']}"]
    same = [line for apart, row in rows if not apart for line in beside(row, found)]
    apart, nearest = min(rows, key=lambda pair: len(pair[0]))
    return same or [f"not compared with {nearest['source']}, {nearest['weights']}: {'; '.join(apart)}"]


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
