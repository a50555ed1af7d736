"""Start values of InternVideo's video tower out of checkpoints: from a plain CLIP, or merged with one. Dict -> dict.

All names are canonical: `clip.` in front, InternVideo's names behind it (see checkpoint_names.py). Nothing is
interpolated over time when --max_frames changes: no tensor of this tower has a time axis but the 3x3x3 convolutions.
"""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor

from checkpoints.files import CheckpointError
from checkpoints.names import CLIP_PREFIX, VIDEO_TOWER_PARTS, video_tower_names
from engine.progress import log

# InternVideo's --mergeclip goes by name, and CLIP calls these visual.proj and visual.ln_post.*: it leaves them out, so
# its published models have the upstream file's. Merging them as well would give other numbers.
MISSED_BY_MERGECLIP = ("clip.visual_proj", "clip.visual_ln_post.weight", "clip.visual_ln_post.bias")
PARTS = tuple(CLIP_PREFIX + part for part in VIDEO_TOWER_PARTS)
UNUSED = "clip.text_mask_embedding"


def plain_clip_to_video(clip: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """A plain CLIP's towers under the video tower's names, patch weights [width, 3, p, p] -> [width, 3, 1, p, p].

    The temporal parts are not in it: see :func:`with_initial_parts`. Tensors without `clip.` (heads) are left out.
    """
    towers = {key[len(CLIP_PREFIX) :]: value for key, value in clip.items() if key.startswith(CLIP_PREFIX)}
    return {CLIP_PREFIX + key: value for key, value in video_tower_names(towers).items()}


def merge_clip(upstream: Mapping[str, Tensor], clip: Mapping[str, Tensor], weight: float) -> dict[str, Tensor]:
    """`--mergeclip`, `--mergeweight`: ``weight * clip + (1 - weight) * upstream`` for every tensor that both have.

    `upstream` is a video tower, `clip` a plain CLIP. The logit scale is averaged as it is stored, in log space. As in
    InternVideo, MISSED_BY_MERGECLIP and what CLIP lacks stay `upstream`'s. CheckpointError if the two differ in size.
    """
    if not 0 <= weight <= 1:
        raise ValueError(f"--mergeweight must be in [0, 1], got {weight}")
    other = plain_clip_to_video(clip)
    shared = [key for key in upstream if key in other and key not in MISSED_BY_MERGECLIP]
    lacking = [
        key for key in upstream if key.startswith(CLIP_PREFIX) and key not in other and not key.startswith(PARTS)
    ]
    different = [
        f"{key} {list(upstream[key].shape)} and {list(other[key].shape)}"
        for key in shared
        if upstream[key].shape != other[key].shape
    ]
    different += [f"{key} only in the file of --pretrained_path" for key in lacking]
    different += [f"{key} only in the CLIP" for key in other if key not in upstream]
    if different:
        raise CheckpointError(
            f"--mergeclip needs a CLIP of the same size as the file of --pretrained_path; "
            f"{len(different)} tensors differ: {', '.join(different[:4])}"
        )
    merged = {key: weight * other[key] + (1 - weight) * upstream[key] for key in shared}
    log.info(
        "--mergeclip: %d tensors are %g x CLIP + %g x upstream; %d are upstream's, among them %s",
        len(merged),
        weight,
        1 - weight,
        len(upstream) - len(merged),
        ", ".join(key for key in MISSED_BY_MERGECLIP if key in upstream),
    )
    return {**upstream, **merged}


def with_initial_parts(tensors: Mapping[str, Tensor], initial: Mapping[str, Tensor], source: str) -> dict[str, Tensor]:
    """`tensors` and, from a new model's `initial` ones, the temporal parts that no plain CLIP has; they are logged.

    All temporal parts or none: a file that lacks only some of them is damaged, which strict loading then reports. The
    unused text_mask_embedding is filled in on its own. `source` names the file in the log.
    """
    has_temporal = any(key.startswith(PARTS) and not key.startswith(UNUSED) for key in tensors)
    absent = [key for key in initial if key not in tensors and key.startswith(UNUSED if has_temporal else PARTS)]
    temporal = [key for key in absent if not key.startswith(UNUSED)]
    if temporal:
        log.warning(
            "%s is not trained with the video tower: its %d temporal tensors start at initial values, with "
            "which the tower is CLIP on the mean of the frames: %s",
            source,
            len(temporal),
            ", ".join(temporal),
        )
    return {**tensors, **{key: initial[key] for key in absent}}
