"""Build our models from the weights of a golden vector, as ``main_task_retrieval.py`` would from a checkpoint."""

import torch

from checkpoints.read import clip_sizes, load_strict
from modules.encoders.clip import CLIP
from modules.heads import build_head
from modules.heads.base import HeadOptions
from modules.model import VideoTextModel
from modules.optim import parameter_name


def build(
    tensors: dict[str, torch.Tensor],
    sim_header: str,
    num_layers: int = 2,
    compat: str = "none",
    head_options: HeadOptions | None = None,
):
    """Tensors under CLIP4Clip's names -> VideoTextModel in evaluation mode."""
    clip = {k: v for k, v in tensors.items() if k.startswith("clip.")}
    sizes = clip_sizes(clip)
    head_options = head_options or HeadOptions(num_layers, normalize_frames=compat != "internvideo")
    head = build_head(sim_header, sizes, head_options)
    tower = CLIP(sizes, "quick_gelu", temporal_patch="clip.visual.conv2.weight" in clip)
    unscaled = compat == "drl" or (compat == "internvideo" and head_options.interaction != "no")
    model = VideoTextModel(tower, head, scale_evaluation=not unscaled).eval()
    names = {parameter_name(name): name for name in model.state_dict()}
    kept = {k: v for k, v in tensors.items() if not k.startswith(head.ignored_prefixes or ("\0",))}
    load_strict(model, {names.get(k, k): v for k, v in kept.items()}, "golden vector")
    return model


def video_inputs(inputs: dict[str, torch.Tensor], suffix: str = "") -> tuple[torch.Tensor, ...]:
    """The reference's (B, 1, F, 1, 3, H, W) video as our frames [B, F, 3, H, W], and all arguments of the model."""
    frames = inputs[f"video{suffix}"].squeeze(3).squeeze(1)
    return (
        inputs[f"input_ids{suffix}"],
        inputs[f"attention_mask{suffix}"].bool(),
        frames,
        inputs[f"video_mask{suffix}"].bool(),
    )
