"""Small untrained models with every head, and a batch for them."""

import dataclasses

import torch

from modules.encoders import ENCODERS, Sizes
from modules.encoders.base import Conventions
from modules.encoders.clip import CLIP, ClipSizes
from modules.encoders.internvideo import VideoCLIP, VideoClipSizes
from modules.heads import HEADS, INTERACTIONS, Head
from modules.losses import LOSSES
from modules.model import VideoTextModel
from plugins import from_flags

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


def make_head(sim_header: str, sizes: Sizes, interaction: str = "no", **settings) -> Head:
    """A head by name; settings: its own options, those of the interaction, and fields of Conventions."""
    conventions = Conventions(
        **{f.name: settings[f.name] for f in dataclasses.fields(Conventions) if f.name in settings}
    )
    plugin = HEADS[sim_header]
    head = plugin(sizes, from_flags(plugin.Options, settings), conventions)
    if interaction == "no":
        return head
    token_wise = INTERACTIONS[interaction]
    return token_wise(head, from_flags(token_wise.Options, settings))


def make_encoder(name: str, sizes: ClipSizes, **options) -> torch.nn.Module:
    return ENCODERS[name](sizes, "quick_gelu", from_flags(ENCODERS[name].Options, options))


def loss_of(settings: dict) -> str:
    return settings.get("loss", "cdcr" if settings.get("cdcr") else "contrastive")


def make_model(encoder, sim_header: str, interaction: str = "no", scaled: bool = True, **settings) -> VideoTextModel:
    """A model around an encoder; with settings of --cdcr its loss."""
    head = make_head(sim_header, encoder.head_sizes, interaction, **settings)
    loss = LOSSES[loss_of(settings)]
    return VideoTextModel(encoder, head, loss(from_flags(loss.Options, settings)), scaled)


def tiny_model(
    sim_header: str, interaction: str = "no", tower: str = "2d", noise: float = 0.02, **settings
) -> VideoTextModel:
    """In evaluation mode. Every parameter is random, those that start at zero too: else much would have no effect."""
    torch.manual_seed(0)
    if tower == "evl":
        encoder = VideoCLIP(VideoClipSizes(**vars(SIZES), read_after=(0, 1)), "quick_gelu")
    else:
        encoder = CLIP(SIZES, "quick_gelu", CLIP.Options(linear_patch=tower))
    model = make_model(encoder, sim_header, interaction, cross_num_hidden_layers=2, **settings).eval()
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
