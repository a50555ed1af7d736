"""Build our models from the weights of a golden vector, as ``main_task_retrieval.py`` would from a checkpoint."""

import torch
from tiny_models import make_model

from checkpoints.names import parameter_name, split_towers
from checkpoints.read import load_strict
from engine.compat import COMPAT
from modules.encoders.clip import CLIP


def build(
    tensors: dict[str, torch.Tensor],
    sim_header: str,
    num_layers: int = 2,
    compat: str = "none",
    interaction: str = "no",
    **settings,
):
    """Tensors under CLIP4Clip's names -> VideoTextModel in evaluation mode."""
    towers, rest = split_towers(tensors)
    patch = "3d" if "visual.conv2.weight" in towers else "2d"
    encoder = CLIP(CLIP.sizes_of(towers), "quick_gelu", CLIP.Options(linear_patch=patch))
    source = COMPAT[compat]
    settings = vars(source.conventions) | {"cross_num_hidden_layers": num_layers} | settings
    scaled = source.scales_cosines if interaction == "no" else source.scales_tokens
    model = make_model(encoder, sim_header, interaction, scaled, **settings).eval()
    names = {parameter_name(name): name for name in model.state_dict()}
    ignored = model.head.ignored_prefixes
    kept = {k: v for k, v in tensors.items() if not (ignored and k.startswith(ignored))}
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
