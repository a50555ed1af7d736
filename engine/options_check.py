"""The checks behind :func:`engine.options.parse_options`: values, combinations, flags that no longer exist."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from engine.options import Options

AUTO = Path("auto")  # --resume_model auto

# Flags of CLIP4Clip's and InternVideo's parsers that had no effect there; each with why it is refused.
_NO_EFFECT = "had no effect in the source projects and does not exist here; leave it out"
DEAD_FLAGS = dict.fromkeys(
    (
        "do_pretrain",
        "lr_decay",
        "video_dim",
        "margin",
        "hard_negative_rate",
        "negative_weighting",
        "n_pair",
        "text_num_hidden_layers",
        "visual_num_hidden_layers",
        "use_mil",
        "sampled_use_mil",
        "do_lower_case",
        "fp16_opt_level",
        "task_type",
        "world_size",
        "rank",
    ),
    _NO_EFFECT,
) | {
    "cross_model": "named a folder with the sizes of the cross encoder; sizes are inferred from the weights here",
    "use_dsl": "DSL is always reported beside the raw metrics; leave it out",
}


def refuse_dead_flags(parser: argparse.ArgumentParser, argv: list[str]) -> None:
    """Exit with status 2 on a flag of the source projects that does not exist here, saying why."""
    for token in argv:
        name = token.split("=")[0].lstrip("-")
        if token.startswith("--") and name in DEAD_FLAGS:
            parser.error(f"--{name} {DEAD_FLAGS[name]}")


def _at_least(low: float) -> tuple[Callable[[float], bool], str]:
    return lambda value: value >= low, f">= {low}"


RANGES: dict[str, tuple[str, tuple[Callable[[float], bool], str]]] = {
    "max_words": ("data", _at_least(2)),
    "max_frames": ("data", _at_least(1)),
    "feature_framerate": ("data", _at_least(1)),
    "num_thread_reader": ("data", _at_least(0)),
    "cross_num_hidden_layers": ("model", _at_least(1)),
    "cdcr_alpha1": ("model", _at_least(0)),
    "cdcr_alpha2": ("model", _at_least(0)),
    "cdcr_lambda": ("model", _at_least(0)),
    "mergeweight": ("model", (lambda v: 0 <= v <= 1, "in [0, 1]")),
    "epochs": ("train", _at_least(1)),
    "batch_size": ("train", _at_least(1)),
    "lr": ("train", (lambda v: v > 0, "> 0")),
    "coef_lr": ("train", _at_least(0)),
    "warmup_proportion": ("train", (lambda v: v == -1 or 0 <= v < 1, "in [0, 1), or -1 for none")),
    "weight_decay": ("train", _at_least(0)),
    "freeze_layer_num": ("train", _at_least(-1)),
    "max_grad_norm": ("train", (lambda v: v > 0, "> 0")),
    "n_display": ("train", _at_least(1)),
    "gradient_accumulation_steps": ("train", _at_least(1)),
    "save_steps": ("train", _at_least(0)),
    "batch_size_val": ("run", _at_least(1)),
    "similarity_memory_mb": ("run", _at_least(1)),
    "qb_size": ("run", _at_least(0)),
    "seed": ("run", (lambda v: 0 <= v < 2**31, "in 0..2147483647")),
}


def _bad_value(options: Options) -> str | None:
    for name, (group, (accepts, wanted)) in RANGES.items():
        value = getattr(getattr(options, group), name)
        if not accepts(value):  # NaN fails every comparison and lands here too
            return f"--{name} must be {wanted}, got {value}"
    return None


def _bad_model(options: Options, given: set[str]) -> str | None:
    """Parts of a model that do not go together."""
    from modules.heads import HEADS

    model = options.model
    if model.sim_header not in HEADS:
        return f"--sim_header must be one of {', '.join(sorted(HEADS))}, got {model.sim_header}"
    tight = model.sim_header == "tightTransf"
    if tight and model.loose_type and "loose_type" in given:
        return "--sim_header tightTransf is not of --loose_type; leave --loose_type out"
    if not tight and not model.loose_type:
        return f"--loose_type=false belongs to --sim_header tightTransf, got --sim_header {model.sim_header}"
    pairwise = not HEADS[model.sim_header].separable
    if pairwise and model.interaction != "no":
        return (
            f"--interaction {model.interaction} takes the place of --sim_header {model.sim_header}'s similarity; "
            "use it with meanP, seqLSTM or seqTransf"
        )
    if pairwise and model.cdcr:
        return f"--cdcr {model.cdcr} works on features or tokens that --sim_header {model.sim_header} does not compare"
    if model.interaction != "wti" and "wti_arch" in given:
        return f"--wti_arch {model.wti_arch} belongs to --interaction wti, got --interaction {model.interaction}"
    if model.clip_evl and model.linear_patch == "3d":
        return "--linear_patch 3d is not for --clip_evl, whose tower reads time in its own way"
    for name in ("pretrained_path", "mergeclip"):
        if getattr(model, name) and not model.clip_evl:
            return f"--{name} is for InternVideo's tower; add --clip_evl"
    if model.mergeclip and not (model.pretrained_path or model.finetuned_path or model.init_model):
        return "--mergeclip averages the file of --pretrained_path with a CLIP; add --pretrained_path"
    return None


def _bad_combination(options: Options, given: set[str]) -> str | None:
    data, model, train, run = options.data, options.model, options.train, options.run
    if not (run.do_train or run.do_eval):
        return "nothing to do: give --do_train, --do_eval or both"
    for name, value in (
        ("output_dir", run.output_dir),
        ("data_path", data.data_path),
        ("features_path", data.features_path),
    ):
        if value is None:
            return f"--{name} is required"
    if data.datatype == "msrvtt" and data.val_csv is None:
        return "--datatype msrvtt needs --val_csv (MSRVTT_JSFUSION_test.csv)"
    if data.datatype == "msrvtt" and run.do_train and data.train_csv is None:
        return "--datatype msrvtt with --do_train needs --train_csv (MSRVTT_train.9k.csv)"
    if model.zeroshot and (run.do_train or model.finetuned_path or model.init_model):
        wrong = "do_train" if run.do_train else "finetuned_path" if model.finetuned_path else "init_model"
        return f"--zeroshot evaluates weights as they were pre-trained; leave it or --{wrong} out"
    if model.init_model and model.finetuned_path:
        return "--init_model and --finetuned_path both name the weights to load; give one"
    if run.do_train and model.finetuned_path:
        return "--finetuned_path is for evaluation; to train on from a checkpoint give --init_model"
    if train.resume_model and not run.do_train:
        return "--resume_model continues a training run; add --do_train"
    if train.resume_model and train.resume_model != AUTO and model.init_model:
        return "--resume_model already holds the weights; leave --init_model out"
    if run.qb_norm and data.datatype == "msrvtt" and data.train_csv is None:
        return "--qb_norm takes its query bank from the training captions; add --train_csv (MSRVTT_train.9k.csv)"
    if train.gradient_accumulation_steps > train.batch_size:
        return (
            f"--gradient_accumulation_steps {train.gradient_accumulation_steps} exceeds --batch_size "
            f"{train.batch_size}: a piece holds at least one pair"
        )
    if run.fp16 and "precision" in given and run.precision != "fp16":
        return f"--fp16 means --precision fp16, but --precision {run.precision} was given"
    if data.frame_rule == "stride" and data.slice_framepos != 2:
        return f"--slice_framepos {data.slice_framepos} acts with --frame_rule second only; stride always spreads"
    return None


def check(options: Options, given: set[str]) -> str | None:
    """The first thing wrong with the options, in words for the user; None when all is well.

    `given` holds the names of the flags that stood on the command line.
    """
    return _bad_value(options) or _bad_model(options, given) or _bad_combination(options, given)
