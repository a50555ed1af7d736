"""Every flag, declared once: a field of a frozen dataclass is a flag of the same name.

:func:`parse_options` reads the command line, checks every value and every combination before anything is loaded, and
returns :class:`Options`. Functions elsewhere take the group they need.
"""

from __future__ import annotations

import argparse
import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from engine.options_check import check, refuse_dead_flags

DATATYPES = ("msrvtt", "msvd", "lsmdc", "activity", "didemo", "vatex")
FALSE_WORDS, TRUE_WORDS = ("false", "no", "off", "0"), ("true", "yes", "on", "1")


def parse_bool(text: str) -> bool:
    """``--flag``, ``--flag=true`` and ``--flag=False`` mean what they say."""
    if text.lower() in TRUE_WORDS + FALSE_WORDS:
        return text.lower() in TRUE_WORDS
    raise argparse.ArgumentTypeError(f"expected true or false, got {text!r}")


def flag(default: Any, help: str, *, type: type | None = None, **more: Any) -> Any:
    """A dataclass field that is a command-line flag; a bool default makes a truthful switch."""
    if isinstance(default, bool):
        more |= {"type": parse_bool, "nargs": "?", "const": True, "metavar": "BOOL"}
    else:
        more["type"] = type or default.__class__
    return dataclasses.field(default=default, metadata={"help": help, **more})


@dataclass(frozen=True)
class DataOptions:
    """What is read and how clips become frames."""

    datatype: str = flag("msrvtt", "dataset", choices=DATATYPES)
    data_path: Path | None = flag(None, "annotations: MSRVTT_data.json for msrvtt, a folder for the others", type=Path)
    features_path: Path | None = flag(None, "folder that holds the video files", type=Path)
    train_csv: Path | None = flag(None, "msrvtt: list of training ids (MSRVTT_train.9k.csv)", type=Path)
    val_csv: Path | None = flag(None, "msrvtt: list of test clips (MSRVTT_JSFUSION_test.csv)", type=Path)
    expand_msrvtt_sentences: bool = flag(False, "msrvtt: train on every caption, not on one drawn per clip and epoch")
    max_words: int = flag(32, "caption length in tokens, start and end included")
    max_frames: int = flag(12, "frames per clip at most")
    feature_framerate: int = flag(1, "frames taken per second before thinning to --max_frames")
    frame_rule: str = flag(
        "auto",
        "frame choice; auto: what the dataset's published numbers used (second for msvd, "
        "activity and --compat clip4clip, else stride)",
        choices=("auto", "stride", "second"),
    )
    slice_framepos: int = flag(2, "frames kept of too many: 0 first, 1 last, 2 spread", choices=(0, 1, 2))
    train_frame_order: int = flag(0, "0 as filmed, 1 reversed, 2 shuffled", choices=(0, 1, 2))
    eval_frame_order: int = flag(0, "0 as filmed, 1 reversed, 2 shuffled", choices=(0, 1, 2))
    decoder: str = flag("pyav", "video reader", choices=("pyav", "opencv"))
    num_thread_reader: int = flag(2, "loader worker processes, 0 = read in the main process")
    allow_missing: bool = flag(False, "accept wrong counts, evaluate without missing or unreadable videos; recorded")
    allow_overlap: bool = flag(False, "score a checkpoint on videos that it was trained on; recorded in results")
    lsmdc_source_gap: bool = flag(False, "lsmdc: leave out training ids 58200-58299, as InternVideo's loader does")


@dataclass(frozen=True)
class ModelOptions:
    """Which weights and which head."""

    pretrained_clip_name: str = flag("ViT-B/32", "ViT-B/32, ViT-B/16, ViT-L/14, or the path of CLIP weights")
    cache_dir: Path = flag(Path("~/.cache/clip"), "where downloaded CLIP weights are kept")
    init_model: Path | None = flag(None, "retrieval checkpoint to start training from", type=Path)
    finetuned_path: Path | None = flag(None, "retrieval checkpoint to evaluate", type=Path)
    activation: str = flag(
        "auto", "MLP activation of the weights; auto: told by the file", choices=("auto", "quick_gelu", "gelu")
    )
    sim_header: str = flag("meanP", "similarity head: meanP, seqLSTM, seqTransf, tightTransf or xpool")
    cross_num_hidden_layers: int = flag(4, "layers of the seqTransf and tightTransf heads")
    linear_patch: str = flag("2d", "patches of one frame, or of three in a row", choices=("2d", "3d"))
    loose_type: bool = flag(True, "texts and videos meet only in the similarity: all heads but tightTransf")
    interaction: str = flag(
        "no",
        "token-wise similarity over the frames of meanP, seqLSTM or seqTransf; ti: every "
        "word and frame counts alike, wti: learned weights",
        choices=("no", "ti", "wti"),
    )
    wti_arch: int = flag(2, "layers of the token weights of --interaction wti", choices=(1, 2, 3))
    cdcr: int = flag(
        0,
        "channel decorrelation in the loss: 0 none; with --interaction: 1 a random word and frame, 2 "
        "all with their best matches, 3 the same, weighted",
        choices=(0, 1, 2, 3),
    )
    cdcr_alpha1: float = flag(0.16, "--cdcr: pull of the diagonal of the correlation matrix towards 1")
    cdcr_alpha2: float = flag(0.0, "--cdcr: pull of the rest towards 0; the DRL paper's 0.06")
    cdcr_lambda: float = flag(0.001, "--cdcr: its weight in the loss")
    clip_evl: bool = flag(False, "InternVideo's video tower instead of CLIP's image tower")
    pretrained_path: Path | None = flag(None, "--clip_evl: InternVideo weights to start from", type=Path)
    mergeclip: bool = flag(False, "--clip_evl: average --pretrained_path with the CLIP of --pretrained_clip_name")
    mergeweight: float = flag(0.5, "--mergeclip: weight of the CLIP")
    zeroshot: bool = flag(False, "make sure that no fine-tuned weights are evaluated: refuse --finetuned_path")
    compat: str = flag(
        "none",
        "reproduce a source project's numbers where they differ from what is right",
        choices=("none", "clip4clip", "internvideo", "drl"),
    )


@dataclass(frozen=True)
class TrainOptions:
    """Optimisation. `batch_size` is that of all processes together."""

    epochs: int = flag(5, "passes over the training pairs")
    batch_size: int = flag(128, "training pairs per step, over all processes")
    lr: float = flag(1e-4, "learning rate of what is new")
    coef_lr: float = flag(
        1e-3,
        "CLIP learns at lr * coef_lr, but temporal parts of --clip_evl that "
        "no file of weights holds at lr (with --compat at lr * coef_lr too)",
    )
    warmup_proportion: float = flag(0.1, "share of the steps spent warming up")
    weight_decay: float = flag(0.2, "decoupled weight decay")
    freeze_layer_num: int = flag(0, "-1 trains all of CLIP; n freezes embeddings and the first n blocks of each tower")
    max_grad_norm: float = flag(1.0, "clip the global gradient norm")
    gradient_accumulation_steps: int = flag(
        1,
        "pieces in which a batch goes through the towers, for less memory; the "
        "loss and its gradient stay those of the whole batch",
    )
    grad_checkpointing: bool = flag(False, "recompute activations in the backward pass: less memory, slower")
    compile: bool = flag(False, "torch.compile the towers: a slow start, then faster steps")
    n_display: int = flag(50, "steps between log lines")
    save_steps: int = flag(500, "steps between checkpoint_last.pt; 0: at the ends of epochs only")
    resume_model: Path | None = flag(
        None, "checkpoint_last.pt to continue from; auto: the one in --output_dir, if any", type=Path
    )
    select_on: str = flag(
        "auto",
        "split whose text-to-video R@1 chooses the epoch to keep; last: the last epoch; "
        "auto: val where the dataset has one, else test",
        choices=("auto", "val", "test", "last"),
    )
    tensorboard: bool = flag(False, "also write TensorBoard scalars to --output_dir/tensorboard")


@dataclass(frozen=True)
class RunOptions:
    """What this run does, where, and in which precision."""

    do_train: bool = flag(False, "fine-tune, evaluating after every epoch")
    do_eval: bool = flag(False, "evaluate")
    dry_run: bool = flag(False, "check options and data, print the plan and stop; weights are not loaded")
    eval_split: str = flag("test", "split that --do_eval scores", choices=("test", "val"))
    output_dir: Path | None = flag(None, "folder for everything the run writes", type=Path)
    batch_size_val: int = flag(16, "clips per evaluation batch and process")
    save_similarity: bool = flag(False, "also write similarity.npz")
    similarity_memory_mb: int = flag(1024, "memory for a block of pairs in evaluation with heads that see pairs")
    qb_norm: bool = flag(False, "also report QB-Norm, its query bank the captions of the training split")
    qb_size: int = flag(10000, "--qb_norm: captions in the query bank, drawn with --seed; 0 takes all")
    device: str = flag("auto", "auto takes CUDA where there is one", choices=("auto", "cpu", "cuda"))
    precision: str = flag(
        "auto", "auto: bf16 on CUDA cards that have it, else fp32", choices=("auto", "fp32", "bf16", "fp16")
    )
    fp16: bool = flag(False, "same as --precision fp16")
    seed: int = flag(42, "seed of everything random")


@dataclass(frozen=True)
class Options:
    """All flags, grouped."""

    data: DataOptions
    model: ModelOptions
    train: TrainOptions
    run: RunOptions

    def as_dict(self) -> dict[str, Any]:
        """Flat and JSON-ready: flag -> value."""
        flat = {k: v for group in vars(self).values() for k, v in vars(group).items()}
        return {k: str(v) if isinstance(v, Path) else v for k, v in flat.items()}


GROUPS = {"data": DataOptions, "model": ModelOptions, "train": TrainOptions, "run": RunOptions}


def build_parser() -> argparse.ArgumentParser:
    """The parser of ``main_task_retrieval.py``."""
    parser = argparse.ArgumentParser(
        "main_task_retrieval.py",
        allow_abbrev=False,
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
        description="Video-text retrieval with CLIP: zero-shot evaluation, fine-tuning, evaluation of checkpoints.",
    )
    for title, group in GROUPS.items():
        section = parser.add_argument_group(title, group.__doc__)
        for field in dataclasses.fields(group):
            section.add_argument(f"--{field.name}", default=field.default, **field.metadata)
    # torch.distributed.launch passes this; the environment says the same, and modules/distributed.py reads that.
    parser.add_argument("--local_rank", "--local-rank", type=int, default=0, help=argparse.SUPPRESS)
    return parser


def parse_options(argv: Sequence[str] | None = None) -> Options:
    """argv -> checked :class:`Options`. A bad flag, value or combination prints one line and exits with status 2."""
    import sys

    argv = list(sys.argv[1:] if argv is None else argv)
    parser = build_parser()
    refuse_dead_flags(parser, argv)
    args = vars(parser.parse_args(argv))
    options = Options(
        **{
            name: group(**{field.name: args[field.name] for field in dataclasses.fields(group)})
            for name, group in GROUPS.items()
        }
    )
    given = {token.split("=")[0].lstrip("-") for token in argv if token.startswith("--")}
    problem = check(options, given)
    if problem:
        parser.error(problem)
    if options.run.fp16:
        options = dataclasses.replace(options, run=dataclasses.replace(options.run, precision="fp16"))
    return options
