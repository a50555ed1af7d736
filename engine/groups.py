"""The flags that no plug-in brings. A field is a flag of the same name and carries the range of its values."""

from dataclasses import dataclass
from pathlib import Path

from dataloaders.registry import DATASETS
from dataloaders.video.cache import FORMATS
from dataloaders.video.rules import RULES
from engine.compat import COMPAT
from modules.encoders import ENCODERS
from modules.heads import HEADS
from modules.losses import LOSSES
from plugins import above, at_least, flag, within

PYAV = "pyav (opencv gave memory rubbish for interlaced video with OpenCV 5; PyAV gives the same frames)"
SHARE = ("in [0, 1), or -1 for none", lambda value: value == -1 or 0 <= value < 1)


@dataclass(frozen=True)
class DataOptions:
    """What is read and how clips become frames."""

    datatype: str = flag("msrvtt", f"dataset: {', '.join(DATASETS)}")
    data_path: Path | None = flag(None, "annotations: a folder, for msrvtt the file MSRVTT_data.json", type=Path)
    features_path: Path | None = flag(None, "folder that holds the video files", type=Path)
    frames_path: Path | None = flag(
        None, "in place of --features_path: folder of extracted frames, <id>/000001.jpg and so on", type=Path
    )
    frames_fps: float = flag(0.0, "pictures per second of video in --frames_path", must_be=at_least(0))
    frame_cache: Path | None = flag(
        None, "folder where decoded clips are kept: each is decoded once, then read", type=Path
    )
    frame_cache_format: str = flag(
        "raw", "raw: frames as they are; jpeg: about a tenth of the space, slower, lossy (quality 90)", choices=FORMATS
    )
    frame_cache_gb: float = flag(
        0.0, "GB that --frame_cache may hold; 0: as much as the disk takes", must_be=at_least(0), on_resume="free"
    )
    max_words: int = flag(32, "caption length in tokens, start and end included", must_be=at_least(2))
    max_frames: int = flag(12, "frames per clip at most", must_be=at_least(1))
    feature_framerate: int = flag(1, "frames taken per second before thinning to --max_frames", must_be=at_least(1))
    frame_rule: str = flag(
        "auto", f"which frames: {', '.join(RULES)}; auto: second for msvd, activity and --compat clip4clip, else stride"
    )
    train_frame_order: int = flag(0, "order in training: 0 as filmed, 1 reversed, 2 shuffled", choices=(0, 1, 2))
    eval_frame_order: int = flag(0, "order in evaluation: 0 as filmed, 1 reversed, 2 shuffled", choices=(0, 1, 2))
    decoder: str = flag("pyav", "video reader: pyav, the only one", must_be=(PYAV, lambda value: value == "pyav"))
    num_thread_reader: int | str = flag(
        "auto",
        "loader worker processes; 0: read in the main process; auto: one for each core that this process may use",
        type=lambda text: text if text == "auto" else int(text),
        must_be=("auto or >= 0", lambda value: value == "auto" or value >= 0),
        on_resume="free",
    )
    data_timeout: float = flag(
        60.0,
        "seconds without progress after which a loader worker counts as stalled: the run saves and ends",
        must_be=above(0),
        on_resume="free",
    )
    outage_minutes: float = flag(
        10.0,
        "how long a video folder or disk that cannot be read is waited for; then the run saves and ends",
        must_be=within(0, 25),
        on_resume="free",
    )
    max_dropped: float = flag(
        0.01,
        "share of the training videos that may turn out unreadable (5 always may); more end the run",
        must_be=within(0, 1),
        on_resume="free",
    )
    feature_cache: Path | None = flag(
        None,
        "folder that keeps what the encoder made of videos and captions, for later runs",
        type=Path,
        on_resume="free",
    )
    allow_missing: bool = flag(
        False, "accept other counts and missing or unreadable videos; results.json says so", on_resume="free"
    )
    allow_overlap: bool = flag(
        False, "score a checkpoint on videos that it was trained on; recorded in results.json", on_resume="free"
    )


@dataclass(frozen=True)
class ModelOptions:
    """Which weights, encoder, head and loss."""

    pretrained_clip_name: str = flag(
        "ViT-B/32", "ViT-B/32, ViT-B/16, ViT-L/14, a path of CLIP weights, or hf-hub:org/name", on_resume="free"
    )
    cache_dir: Path = flag(Path("~/.cache/clip"), "where downloaded CLIP weights are kept", type=Path)
    init_model: Path | None = flag(None, "retrieval checkpoint to start training from", type=Path)
    finetuned_path: Path | None = flag(None, "retrieval checkpoint to evaluate", type=Path)
    activation: str = flag("auto", "MLP activation; auto: as the file says", choices=("auto", "quick_gelu", "gelu"))
    encoder: str = flag("clip", f"image and text towers: {', '.join(ENCODERS)}")
    sim_header: str = flag("meanP", f"similarity head: {', '.join(sorted(HEADS))}")
    loose_type: bool = flag(True, "text and video meet only in the similarity; false only for tightTransf")
    interaction: str = flag(
        "no",
        "compare words with frames, which meanP, seqLSTM or seqTransf prepare; ti: all count alike, wti: with learned "
        "weights; no: the head's own similarity",
    )
    loss: str = flag("contrastive", f"loss of a batch of pairs: {', '.join(LOSSES)}")
    zeroshot: bool = flag(False, "refuse --finetuned_path, so that only pre-trained weights can be evaluated")
    compat: str = flag("none", "compute as a source project does, to repeat its numbers", choices=tuple(COMPAT))


@dataclass(frozen=True)
class TrainOptions:
    """Optimisation. `batch_size` is that of all processes together."""

    epochs: int = flag(5, "passes over the training pairs", must_be=at_least(1), on_resume="rise")
    batch_size: int = flag(128, "training pairs per step, over all processes", must_be=at_least(1))
    lr: float = flag(1e-4, "learning rate of heads, losses and new parts of an encoder", must_be=above(0))
    coef_lr: float = flag(
        1e-3, "the encoder learns at lr * coef_lr; its new parts at lr (not with --compat)", must_be=at_least(0)
    )
    warmup_proportion: float = flag(0.1, "share of the steps in which the rate rises to full; -1: none", must_be=SHARE)
    weight_decay: float = flag(0.2, "decoupled weight decay", must_be=at_least(0))
    freeze_layer_num: int = flag(
        0,
        "-1 trains all of CLIP; n freezes embeddings and the first n blocks of each tower; one more than it has blocks "
        "freezes both towers, and heads train on features that are computed once",
        must_be=at_least(-1),
    )
    max_grad_norm: float = flag(1.0, "clip the global gradient norm", must_be=above(0))
    gradient_accumulation_steps: int = flag(
        1,
        "pieces in which a batch is encoded, to save memory; the gradient is the whole batch's",
        must_be=at_least(1),
        on_resume="rounding",
    )
    grad_checkpointing: bool = flag(
        False, "recompute activations in the backward pass: less memory, slower", on_resume="rounding"
    )
    compile: bool = flag(False, "torch.compile the transformers: a slow start, then faster steps", on_resume="rounding")
    n_display: int = flag(50, "steps between log lines", must_be=at_least(1), on_resume="free")
    save_steps: int = flag(
        500, "steps between checkpoints; 0: at the ends of epochs only", must_be=at_least(0), on_resume="free"
    )
    resume_model: Path | None = flag(None, "checkpoint_last.pt to go on from; auto: that of --output_dir", type=Path)
    select_on: str = flag(
        "auto",
        "the epoch with the best text-to-video R@1 on this split is kept; last: the last epoch; auto: test with "
        "--compat of a source project, else val where the dataset has one, else test",
        choices=("auto", "val", "test", "last"),
    )
    overwrite: bool = flag(
        False, "start anew where a training run already lies in --output_dir, in its place", on_resume="free"
    )
    keep_epochs: bool = flag(
        False, "also keep the weights of every epoch, as pytorch_model.bin.0, .1 and so on", on_resume="free"
    )
    tensorboard: bool = flag(False, "also write TensorBoard scalars to --output_dir/tensorboard", on_resume="free")


@dataclass(frozen=True)
class RunOptions:
    """What this run does, where, and in which precision."""

    do_train: bool = flag(False, "fine-tune, evaluating after every epoch", on_resume="free")
    do_eval: bool = flag(False, "evaluate the weights on --eval_split", on_resume="free")
    dry_run: bool = flag(False, "do everything up to the first step, print the plan and stop", on_resume="free")
    eval_split: str = flag("test", "split that --do_eval scores", choices=("test", "val"), on_resume="free")
    output_dir: Path | None = flag(None, "folder for everything the run writes", type=Path)
    batch_size_val: int = flag(16, "clips per evaluation batch and process", must_be=at_least(1), on_resume="free")
    save_similarity: bool = flag(False, "also write similarity.npz", on_resume="free")
    similarity_memory_mb: int = flag(
        1024,
        "MiB for similarities: held up to this size, beyond in blocks that need about as much",
        must_be=at_least(1),
        on_resume="free",
    )
    qb_norm: bool = flag(
        False, "also report QB-Norm, with captions of the training split as its query bank", on_resume="free"
    )
    qb_size: int = flag(
        10000, "captions in --qb_norm's bank, drawn with --seed; 0 takes all", must_be=at_least(0), on_resume="free"
    )
    device: str = flag(
        "auto", "auto: CUDA where there is one, else the CPU", choices=("auto", "cpu", "cuda"), on_resume="rounding"
    )
    precision: str = flag(
        "auto",
        "fp32; bf16 or fp16: autocast with float32 weights; half: CLIP's weights, gradients and moments in float16, as "
        "CLIP4Clip has them; auto: half with --compat clip4clip, and internvideo but for its video tower (fp32), else "
        "bf16 for training on CUDA cards that have it, and fp32 for evaluation",
        choices=("auto", "fp32", "bf16", "fp16", "half"),
    )
    fp16: bool = flag(False, "same as --precision fp16", on_resume="free")
    seed: int = flag(42, "seed of everything random", must_be=("in 0..2147483647", lambda v: 0 <= v < 2**31))


GROUPS: dict[str, type] = {"data": DataOptions, "model": ModelOptions, "train": TrainOptions, "run": RunOptions}
