"""Small untrained models with every head, and a batch for them."""

import torch

from checkpoints.read import ClipSizes
from modules.encoders.clip import CLIP
from modules.encoders.internvideo import VideoCLIP, VideoClipSizes
from modules.heads import HEADS, build_head
from modules.heads.base import HeadOptions
from modules.model import VideoTextModel

SIZES = ClipSizes(
    embed_dim=64,
    image_resolution=16,
    vision_layers=2,
    vision_width=64,
    patch_size=8,
    context_length=16,
    vocab_size=64,
    text_width=64,
    text_heads=1,
    text_layers=2,
    vision_heads=1,
)
TEMPORAL = ("meanP", "seqLSTM", "seqTransf")
# sim_header, interaction, tower
CASES = (
    [(name, "no", "2d") for name in sorted(HEADS)]
    + [(name, kind, "2d") for kind in ("ti", "wti") for name in TEMPORAL]
    + [("meanP", "no", "3d"), ("seqTransf", "wti", "3d")]
    + [(name, "no", "evl") for name in sorted(HEADS)]
    + [("meanP", kind, "evl") for kind in ("ti", "wti")]
)
LENGTHS, FRAMES = (5, 9, 3, 7), (3, 1, 4, 2)


def tiny_model(
    sim_header: str, interaction: str = "no", tower: str = "2d", noise: float = 0.02, **options
) -> VideoTextModel:
    """In evaluation mode. Every parameter is random, those that start at zero too: else much would have no effect."""
    torch.manual_seed(0)
    evl = tower == "evl"
    clip = (
        VideoCLIP(VideoClipSizes(**vars(SIZES), read_after=(0, 1)), "quick_gelu")
        if evl
        else CLIP(SIZES, "quick_gelu", temporal_patch=tower == "3d")
    )
    settings = HeadOptions(num_layers=2, interaction=interaction, projected_tokens=not evl, **options)
    model = VideoTextModel(clip, build_head(sim_header, SIZES, settings)).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += noise * torch.randn_like(parameter)
    return model


def batch(seed: int = 0) -> tuple[torch.Tensor, ...]:
    """token_ids [4, 9], token_mask, frames float [4, 4, 3, 16, 16], frame_mask; the clips differ in length."""
    generator = torch.Generator().manual_seed(seed)
    token_mask = torch.arange(max(LENGTHS)) < torch.tensor(LENGTHS)[:, None]
    ids = torch.randint(1, 62, token_mask.shape, generator=generator).masked_fill(~token_mask, 0)
    ids[torch.arange(4), torch.tensor(LENGTHS) - 1] = 63
    frame_mask = torch.arange(max(FRAMES)) < torch.tensor(FRAMES)[:, None]
    return ids, token_mask, torch.randn(4, 4, 3, 16, 16, generator=generator), frame_mask
