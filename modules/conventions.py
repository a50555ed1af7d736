"""Where source projects compute something other than what is right, as far as it concerns encoders and heads."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Conventions:
    """Defaults are what is right; engine/compat.py says which project differs where, and why."""

    normalize_frames: bool = True  # frames to unit length before their mean
    mask_padding: bool = True  # padded tokens and frames stay out of a maximum; False: they score 0 in it
    read_padding: bool = False  # a video tower reads padding as frames of the mean colour
    cross_heads: int | None = None  # attention heads of the cross encoder; None: one per 64 channels
    # What the sources' loaders fill captions and clips to; it counts where padding takes part.
    source_words: int = 0
    source_frames: int = 0


RIGHT = Conventions()
