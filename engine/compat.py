"""``--compat``: a row for each source project, a field for each way in which it differs from what is right.

Published numbers depend on these differences, so that a run that is to repeat them must have them. Nothing else in the
code looks at the name of a project. Plain bugs of the projects are not here: nobody should repeat them.
"""

from dataclasses import dataclass, field, replace
from typing import Any

from modules.encoders.base import Conventions


@dataclass(frozen=True)
class Compat:
    """Defaults are what is right.

    defaults: values of flags that were not given.
    conventions: of encoders and heads, see modules/encoders/base.py.
    scales_cosines, scales_tokens: evaluation multiplies cosines (of --interaction ti and wti: token-wise ones) by the
    logit scale, as the loss does; ranks are the same without, but DSL shows it.
    same_dsl_axis: on sets with several captions a video, DSL normalises over the captions in both directions.
    decays_all: LayerNorms, embeddings and the logit scale decay, too: the sources' test for LayerNorms matches no name.
    precision: encoder -> what --precision auto means. "half" is float16 weights, gradients and moments of CLIP, without
    a master copy or a loss scale: v underflows to 0 nearly everywhere, so that steps are larger than in float32.
    tf32: training in fp32 on CUDA may round what it multiplies to TF32, which is several times faster.
    new_parts_at_lr: temporal parts of an encoder that no file of weights holds learn at --lr. The sources train all
    that is named ``clip.`` at the small rate of pre-trained weights, at which what starts from nothing stays there.
    """

    defaults: dict[str, Any] = field(default_factory=dict)
    conventions: Conventions = Conventions()
    scales_cosines: bool = True
    scales_tokens: bool = True
    same_dsl_axis: bool = False
    decays_all: bool = False
    precision: dict[str, str] = field(default_factory=dict)
    tf32: bool = True
    new_parts_at_lr: bool = True


# Of CLIP4Clip's parser, which the other projects took over; without those that change no number (batch_size_val,
# n_display, num_thread_reader), and --loose_type: without it they take --sim_header tightTransf by name only.
PARSER: dict[str, Any] = {"max_words": 20, "max_frames": 100, "slice_framepos": 0}
PARSER |= {"coef_lr": 1.0, "batch_size": 256, "epochs": 20, "select_on": "test"}
# What the sources have in common. DiDeMo's annotators saw 30 s; the sources pass 31 to their frame readers.
SOURCE = Compat(defaults=PARSER | {"didemo_clip_seconds": 31.0}, decays_all=True, tf32=False, new_parts_at_lr=False)

COMPAT = {
    "none": Compat(),
    # Its OpenCV reader takes frames by whole seconds on every dataset.
    "clip4clip": replace(SOURCE, defaults=SOURCE.defaults | {"frame_rule": "second"}, precision={"clip": "half"}),
    # It averages raw frames; masks multiply cosines, so padding scores 0 and may win; its video tower has no mask.
    "internvideo": replace(
        SOURCE,
        conventions=Conventions(normalize_frames=False, mask_padding=False, read_padding=True),
        scales_tokens=False,
        same_dsl_axis=True,
        precision={"clip": "half", "internvideo": "fp32"},
    ),
    # Padding as in InternVideo, whose token-wise code is DRL's; its cross encoder (xti) always has 8 attention heads.
    "drl": replace(
        SOURCE, conventions=Conventions(mask_padding=False, cross_heads=8), scales_cosines=False, scales_tokens=False
    ),
}

# Flags of CLIP4Clip's and InternVideo's parsers that had no effect there; each with why it is refused.
DEAD_FLAGS = dict.fromkeys(
    "do_pretrain lr_decay video_dim margin hard_negative_rate negative_weighting n_pair text_num_hidden_layers "
    "visual_num_hidden_layers use_mil sampled_use_mil do_lower_case fp16_opt_level task_type world_size "
    "rank".split(),
    "had no effect in the source projects and does not exist here; leave it out",
) | {
    "cross_model": "named a folder with the sizes of the cross encoder; sizes are inferred from the weights here",
    "use_dsl": "is not needed: DSL is always reported beside the raw metrics; leave it out",
}
