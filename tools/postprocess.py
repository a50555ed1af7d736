"""The metrics table of a finished run, made again from its similarity.npz.

Raw, DSL and, if the run was made with ``--qb_norm``, QB-Norm; transductive rows are labelled. Needs no model or videos.
"""

import argparse
import sys
from pathlib import Path
from typing import Any

if not __package__:  # run as a file: the repository's root is not on the path
    sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from engine.scores import read_npz
from modules.metrics import format_metrics, retrieval_metrics


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser("tools.postprocess", description=__doc__.splitlines()[0])
    parser.add_argument("file", type=Path, help="similarity.npz that a run with --save_similarity left")
    path = parser.parse_args(argv).file
    try:
        arrays: dict[str, Any] = read_npz(path)
        metrics = retrieval_metrics(
            arrays["similarity"],
            arrays["caption_to_video"],
            bool(arrays.get("same_dsl_axis", False)),
            arrays.get("bank_similarity"),
            float(arrays.get("logit_scale", 1.0)),
            arrays["captions"].tolist(),
        )
    except (KeyError, TypeError, ValueError, OSError) as error:
        print(f"error: {path} is not a similarity.npz of --save_similarity: {error}", file=sys.stderr)
        return 1
    print(format_metrics(metrics))
    return 0


if __name__ == "__main__":
    sys.exit(main())
