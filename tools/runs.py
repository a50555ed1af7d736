"""What the tools read from a finished run. Imports no torch: the tools that need none start at once."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any


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


def tower_of(found: dict[str, Any]) -> str:
    """Such as ``CLIP ViT-B/32``; without the size where an older results.json does not tell it."""
    options = found["options"]
    kind = "InternVideo" if options.get("clip_evl") else "CLIP"
    other_weights = any(options.get(name) for name in ("finetuned_path", "init_model", "pretrained_path"))
    size = options.get("pretrained_clip_name", "")
    tells = size.startswith("ViT-") and (options.get("mergeclip") or not other_weights)
    return found.get("tower") or (f"{kind} {size}" if tells else kind)


def head_of(options: dict[str, Any]) -> str:
    """Such as ``meanP`` or ``meanP wti``."""
    token_wise = options.get("interaction", "no")
    return options.get("sim_header", "") + (f" {token_wise}" if token_wise != "no" else "")
