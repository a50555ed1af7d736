"""From options to a model with weights: the one place that joins options, checkpoints and modules."""

from __future__ import annotations

from pathlib import Path

from torch import Tensor

from modules.checkpoints import Checkpoint, CheckpointError, clip_sizes, load_strict, read_checkpoint
from modules.clip import ACTIVATIONS, CLIP
from modules.download import OPENAI_CLIP, fetch_clip
from modules.heads import HEADS, Head
from modules.heads.base import HeadOptions
from modules.model import VideoTextModel
from modules.optim import parameter_name
from modules.options import ModelOptions
from modules.progress import log


def weights_path(options: ModelOptions) -> Path:
    """The file to load: --finetuned_path, --init_model, or --pretrained_clip_name as a path or a name to fetch."""
    chosen = options.finetuned_path or options.init_model
    if chosen is None and options.pretrained_clip_name in OPENAI_CLIP:
        return fetch_clip(options.pretrained_clip_name, options.cache_dir.expanduser())
    path = Path(chosen or options.pretrained_clip_name).expanduser()
    if not path.exists():
        flag = "finetuned_path" if options.finetuned_path else "init_model" if options.init_model else None
        if flag:
            raise CheckpointError(f"--{flag} {path}: no such file")
        raise CheckpointError(
            f"--pretrained_clip_name {path}: no such file, and not one of the names {', '.join(OPENAI_CLIP)}"
        )
    return path


def choose_activation(options: ModelOptions, checkpoint: Checkpoint, path: Path) -> str:
    """The activation the file tells, or the one asked for. Raises CheckpointError when neither says."""
    if options.activation != "auto":
        if checkpoint.activation not in (None, options.activation):
            log.warning("%s looks like %s (%s); using --activation %s as asked",
                        path, checkpoint.activation, checkpoint.activation_reason, options.activation)  # fmt: skip
        return options.activation
    if checkpoint.activation is None:
        raise CheckpointError(
            f"{path} does not tell which activation it was trained with ({checkpoint.activation_reason}); "
            f"give --activation {' or '.join(ACTIVATIONS)}: OpenAI's weights use quick_gelu, most others gelu"
        )
    return checkpoint.activation


def head_tensors(head: type[Head], options: HeadOptions, checkpoint: Checkpoint, path: Path, trained: bool,
                 sim_header: str) -> dict[str, Tensor]:  # fmt: skip
    """Tensors for the head: the checkpoint's own, or start values from CLIP.

    Raises CheckpointError when the checkpoint holds another head, or (`trained`) lacks the one to be evaluated.
    """
    own = checkpoint.head_tensors
    foreign = [key for key in own if not key.startswith(head.checkpoint_prefixes or ("\0",))]
    if foreign:
        owners = [name for name, h in HEADS.items() if h.checkpoint_prefixes and
                  any(key.startswith(h.checkpoint_prefixes) for key in foreign)]  # fmt: skip
        hint = f"; give --sim_header {owners[0]}" if owners else ""
        raise CheckpointError(f"{path} holds {len(foreign)} tensors that --sim_header {sim_header} does not have, "
                              f"such as {foreign[0]}{hint}")  # fmt: skip
    if own:
        return own
    clip = {k.removeprefix("clip."): v for k, v in checkpoint.clip_tensors.items()}
    start = head.init_from_clip(clip, options)
    if trained and start:
        raise CheckpointError(f"{path} holds no weights for --sim_header {sim_header}; it was trained with meanP")
    return {k: v.clone() for k, v in start.items()}


def build_model(options: ModelOptions) -> tuple[VideoTextModel, Path]:
    """Model on the CPU in float32 with its weights, and the file they came from.

    Raises CheckpointError for a wrong file, naming what it looks like; prints what was recognised.
    """
    path = weights_path(options)
    checkpoint = read_checkpoint(path)
    sizes = clip_sizes(checkpoint.tensors)
    activation = choose_activation(options, checkpoint, path)
    head_options = HeadOptions(options.cross_num_hidden_layers, normalize_frames=options.compat != "internvideo")
    head_class = HEADS[options.sim_header]
    tensors = checkpoint.clip_tensors | head_tensors(
        head_class, head_options, checkpoint, path, options.finetuned_path is not None, options.sim_header
    )
    model = VideoTextModel(CLIP(sizes, activation), head_class(sizes, head_options))
    load_weights(model, tensors, str(path))
    log.info("weights: %s: %s; %s (%s)", path, checkpoint.kind, activation, checkpoint.activation_reason)
    log.info("model: ViT %d wide x %d layers, patch %d at %d px; text %d wide x %d layers; head %s; %.1f M parameters",
             sizes.vision_width, sizes.vision_layers, sizes.patch_size, sizes.image_resolution, sizes.text_width,
             sizes.text_layers, options.sim_header, sum(p.numel() for p in model.parameters()) / 1e6)  # fmt: skip
    return model, path


def checkpoint_tensors(model: VideoTextModel) -> dict[str, Tensor]:
    """The model's tensors under CLIP4Clip's names, on the CPU."""
    return {parameter_name(k): v.detach().cpu() for k, v in model.state_dict().items()}


def load_weights(model: VideoTextModel, tensors: dict[str, Tensor], source: str) -> None:
    """Put tensors under CLIP4Clip's names into `model`. Raises CheckpointError naming `source` when they do not fit."""
    names = {parameter_name(name): name for name in model.state_dict()}
    load_strict(model, {names.get(k, k): v for k, v in tensors.items()}, source)
