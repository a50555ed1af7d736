"""From options to a model with weights: the one place that joins options, checkpoints and modules."""

from __future__ import annotations

from pathlib import Path

from torch import Tensor

from checkpoints.download import OPENAI_CLIP, fetch_clip
from checkpoints.merge import merge_clip, plain_clip_to_video, with_initial_parts
from checkpoints.read import Checkpoint, CheckpointError, clip_sizes, load_strict, read_checkpoint
from engine.options import ModelOptions
from engine.progress import log
from modules.encoders.clip import ACTIVATIONS, CLIP, centred_in_time
from modules.encoders.internvideo import VideoCLIP, video_clip_sizes
from modules.heads import HEADS, Head, build_head
from modules.heads.base import HeadOptions
from modules.model import VideoTextModel
from modules.optim import parameter_name

CONV2D, CONV3D = "clip.visual.conv1.weight", "clip.visual.conv2.weight"  # patches of one frame, of three
DRL_CROSS_HEADS = 8  # of DRL's cross encoder, whatever its width


def clip_path(options: ModelOptions) -> Path:
    """The file of --pretrained_clip_name: a name to fetch, or a path."""
    if options.pretrained_clip_name in OPENAI_CLIP:
        return fetch_clip(options.pretrained_clip_name, options.cache_dir.expanduser())
    path = Path(options.pretrained_clip_name).expanduser()
    if not path.exists():
        raise CheckpointError(
            f"--pretrained_clip_name {path}: no such file, and not one of the names {', '.join(OPENAI_CLIP)}"
        )
    return path


def weights_path(options: ModelOptions) -> Path:
    """The file that decides: --finetuned_path, --init_model, --pretrained_path, else --pretrained_clip_name."""
    for flag in ("finetuned_path", "init_model", "pretrained_path"):
        path = getattr(options, flag)
        if path is not None:
            if not path.expanduser().exists():
                raise CheckpointError(f"--{flag} {path}: no such file")
            return path.expanduser()
    return clip_path(options)


def choose_activation(options: ModelOptions, checkpoint: Checkpoint, path: Path) -> str:
    """The activation the file tells, or the one asked for. Raises CheckpointError when neither says."""
    if options.activation != "auto":
        if checkpoint.activation not in (None, options.activation):
            log.warning(
                "%s looks like %s (%s); using --activation %s as asked",
                path,
                checkpoint.activation,
                checkpoint.activation_reason,
                options.activation,
            )
        return options.activation
    if checkpoint.activation is None:
        raise CheckpointError(
            f"{path} does not tell which activation it was trained with ({checkpoint.activation_reason}); "
            f"give --activation {' or '.join(ACTIVATIONS)}: OpenAI's weights use quick_gelu, most others gelu"
        )
    return checkpoint.activation


def head_options(options: ModelOptions, max_words: int = 0, max_frames: int = 0) -> HeadOptions:
    """What the flags mean for a head; where the sources differ from what is right, ``--compat`` decides.

    max_words, max_frames: what the sources' loaders fill captions and clips to.
    """
    return HeadOptions(
        num_layers=options.cross_num_hidden_layers,
        normalize_frames=options.compat != "internvideo",
        cross_heads=DRL_CROSS_HEADS if options.compat == "drl" else None,
        interaction=options.interaction,
        wti_arch=options.wti_arch,
        mask_padding=options.compat not in ("internvideo", "drl"),
        projected_tokens=not options.clip_evl,
        source_words=max_words,
        source_frames=max_frames,
        cdcr=options.cdcr,
        cdcr_alpha1=options.cdcr_alpha1,
        cdcr_alpha2=options.cdcr_alpha2,
    )


def scales_evaluation(options: ModelOptions) -> bool:
    """Whether evaluation includes the logit scale: DRL leaves it out, InternVideo with ti and wti (DSL shows it)."""
    return options.compat != "drl" and not (options.compat == "internvideo" and options.interaction != "no")


def refuse_foreign_tensors(head: Head, tensors: dict[str, Tensor], path: Path, options: ModelOptions) -> None:
    """Raises CheckpointError, with the option to give, when the file holds parts that the chosen model has not."""
    known = ("clip.", *head.checkpoint_prefixes)
    foreign = tuple(key for key in tensors if not key.startswith(known))
    chosen, hint = f"--sim_header {options.sim_header}", ""
    if not foreign and CONV3D in tensors and options.linear_patch != "3d":
        foreign, chosen, hint = (CONV3D,), "--linear_patch 2d", "--linear_patch 3d"
    if not foreign:
        return
    owners = [
        name
        for name, h in HEADS.items()
        if h.checkpoint_prefixes and all(key.startswith(h.checkpoint_prefixes) for key in foreign)
    ]
    if owners:
        hint = f"--sim_header {owners[0]}"
    elif any(key.startswith("text_weight_fc.") for key in foreign):
        chosen, hint = f"--interaction {options.interaction}", "--interaction wti"
    raise CheckpointError(
        f"{path} holds {len(foreign)} tensors that {chosen} does not have, "
        f"such as {foreign[0]}{hint and f'; give {hint}'}"
    )


def missing_head_parts(head: Head, tensors: dict[str, Tensor]) -> list[str]:
    """The parts of a head, by prefix, of which the file has nothing at all."""
    return [prefix for prefix in head.checkpoint_prefixes if not any(key.startswith(prefix) for key in tensors)]


def starting_tensors(head: Head, tensors: dict[str, Tensor], temporal_patch: bool) -> dict[str, Tensor]:
    """`tensors` and start values for the parts of the model that the file lacks: from CLIP, else at random.

    A part of which the file has something stays as it is there: strict loading then names what is missing.
    """
    missing = tuple(missing_head_parts(head, tensors)) or ("\0",)
    clip = {k.removeprefix("clip."): v for k, v in tensors.items() if k.startswith("clip.")}
    random = {parameter_name(k): v for k, v in head.state_dict().items()}
    start = random | head.init_from_clip(clip, head.options)
    whole = tensors | {k: v.clone() for k, v in start.items() if k.startswith(missing)}
    if temporal_patch and CONV3D not in whole:
        whole[CONV3D] = centred_in_time(whole[CONV2D])
    return whole


def read_tower(options: ModelOptions) -> tuple[Checkpoint, dict[str, Tensor]]:
    """The file that decides and its tensors, made ready for the chosen kind of tower and merged if asked."""
    path = weights_path(options)
    checkpoint = read_checkpoint(path)
    tensors, video = checkpoint.tensors, is_video(checkpoint.tensors)
    if not options.clip_evl:
        if video:
            raise CheckpointError(f"{path} holds InternVideo's video tower; give --clip_evl")
        return checkpoint, tensors
    if not video:
        if options.finetuned_path:
            raise CheckpointError(f"{path} holds a plain CLIP, without InternVideo's video tower; leave --clip_evl out")
        tensors = plain_clip_to_video(tensors) | checkpoint.head_tensors
    if options.mergeclip and path == expanded(options.pretrained_path):
        clip = read_checkpoint(clip_path(options))
        tensors = merge_clip(tensors, clip.tensors, options.mergeweight)
    elif options.mergeclip or (options.pretrained_path and path != expanded(options.pretrained_path)):
        log.info("%s holds the whole model: --pretrained_path and --mergeclip play no part", path)
    return checkpoint, tensors


def expanded(path: Path | None) -> Path | None:
    return path and path.expanduser()


def is_video(tensors: dict[str, Tensor]) -> bool:
    return tensors[CONV2D].ndim == 5


def build_clip(options: ModelOptions, tensors: dict[str, Tensor], activation: str, path: Path) -> tuple[CLIP, dict]:
    """The two towers for `tensors`, and `tensors` with what the video tower adds to a plain CLIP."""
    if not options.clip_evl:
        return CLIP(clip_sizes(tensors), activation, temporal_patch=options.linear_patch == "3d"), tensors
    clip = VideoCLIP(video_clip_sizes(tensors), activation)
    initial = {f"clip.{k}": v for k, v in clip.state_dict().items()}
    return clip, tensors if options.finetuned_path else with_initial_parts(tensors, initial, str(path))


def build_model(
    options: ModelOptions, max_words: int = 0, max_frames: int = 0, to_train: bool = False
) -> tuple[VideoTextModel, Path]:
    """Model on the CPU in float32 with its weights, and the file they came from.

    max_words, max_frames: what the sources' loaders fill captions and clips to, which counts under ``--compat``.
    to_train: a retrieval checkpoint may lack a head, which then starts anew; what is only evaluated must be whole.
    Raises CheckpointError for a wrong file, naming what it looks like; prints what was recognised.
    """
    checkpoint, tensors = read_tower(options)
    path = checkpoint.path
    activation = choose_activation(options, checkpoint, path)
    in_file = tensors.keys()
    clip, tensors = build_clip(options, tensors, activation, path)
    new_parts = frozenset(tensors.keys() - in_file)
    sizes = clip.sizes
    head = build_head(options.sim_header, sizes, head_options(options, max_words, max_frames))
    tensors = without_ignored(tensors, head)
    refuse_foreign_tensors(head, tensors, path, options)
    if options.finetuned_path or (options.init_model and not to_train):
        absent = missing_head_parts(head, tensors)
        if absent:
            wanted = "--interaction wti" if "text_weight_fc." in absent else f"--sim_header {options.sim_header}"
            raise CheckpointError(
                f"{path} holds no weights for {wanted} ({', '.join(absent)}*); give the options it was trained with"
            )
        if options.linear_patch == "3d" and CONV3D not in tensors:
            raise CheckpointError(f"{path} holds no {CONV3D}: it was trained with --linear_patch 2d")
    source_frames = max_frames if options.clip_evl and options.compat == "internvideo" else None
    model = VideoTextModel(clip, head, scales_evaluation(options), source_frames, options.cdcr_lambda)
    model.new_parts = new_parts
    new = missing_head_parts(head, tensors)
    if new:
        log.info("%s has no %s*: these start from CLIP's tensors if it has such, else at random", path, "*, ".join(new))
    tensors = starting_tensors(head, tensors, options.linear_patch == "3d")
    load_weights(model, tensors, str(path))
    log.info("weights: %s: %s; %s (%s)", path, checkpoint.kind, activation, checkpoint.activation_reason)
    log.info(
        "model: %s %d wide x %d layers, patch %d at %d px; text %d wide x %d layers; head %s, interaction %s; "
        "%.1f M parameters",
        "InternVideo's video tower" if options.clip_evl else "ViT",
        sizes.vision_width,
        sizes.vision_layers,
        sizes.patch_size,
        sizes.image_resolution,
        sizes.text_width,
        sizes.text_layers,
        options.sim_header,
        options.interaction,
        sum(p.numel() for p in model.parameters()) / 1e6,
    )
    return model, path


def without_ignored(tensors: dict[str, Tensor], head: Head) -> dict[str, Tensor]:
    """`tensors` less those that a source stores beside this head without ever using them; their number is logged."""
    kept = {k: v for k, v in tensors.items() if not (head.ignored_prefixes and k.startswith(head.ignored_prefixes))}
    if len(kept) < len(tensors):
        log.warning(
            "%d tensors of %s* play no part in this model and are left out",
            len(tensors) - len(kept),
            "*, ".join(head.ignored_prefixes),
        )
    return kept


def checkpoint_tensors(model: VideoTextModel) -> dict[str, Tensor]:
    """The model's tensors under CLIP4Clip's names, on the CPU."""
    return {parameter_name(k): v.detach().cpu() for k, v in model.state_dict().items()}


def load_weights(model: VideoTextModel, tensors: dict[str, Tensor], source: str) -> None:
    """Put tensors under CLIP4Clip's names into `model`. Raises CheckpointError naming `source` when they do not fit."""
    names = {parameter_name(name): name for name in model.state_dict()}
    load_strict(model, {names.get(k, k): v for k, v in tensors.items()}, source)
