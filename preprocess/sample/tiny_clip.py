"""A small CLIP with random weights under OpenAI's key names, for runs that need some checkpoint and no download."""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path

import torch

HEAD_WIDTH = 64
VOCAB_SIZE = 49408
CONTEXT_LENGTH = 77


@dataclass(frozen=True)
class TinyClipSizes:
    """Sizes of the two towers. Raises ValueError naming the flag where they do not fit together."""

    resolution: int = 64
    patch: int = 16
    vision_width: int = 128
    vision_layers: int = 4
    text_width: int = 128
    text_layers: int = 3
    embed_dim: int = 128

    def __post_init__(self) -> None:
        for name, value in vars(self).items():
            if value < 1:
                raise ValueError(f"--clip_{name} must be >= 1, got {value}")
        for name in ("vision_width", "text_width"):
            if getattr(self, name) % HEAD_WIDTH:
                raise ValueError(
                    f"--clip_{name} must be a multiple of the head width {HEAD_WIDTH}, got {getattr(self, name)}"
                )
        if self.resolution % self.patch:
            raise ValueError(
                f"--clip_resolution must be a multiple of --clip_patch {self.patch}, got {self.resolution}"
            )


def tiny_clip_state(sizes: TinyClipSizes, generator: torch.Generator) -> dict[str, torch.Tensor]:
    """A state dict of float32 tensors, initialised as the CLIP paper's code initialises (Radford et al. 2021).

    Three integer tensors (input_resolution, context_length, vocab_size) mark it as OpenAI's layout, as in their files.
    """

    def normal(*shape: int, std: float) -> torch.Tensor:
        return torch.randn(shape, generator=generator) * std

    vision, text, patch = sizes.vision_width, sizes.text_width, sizes.patch
    positions = (sizes.resolution // patch) ** 2 + 1
    state = {
        "positional_embedding": normal(CONTEXT_LENGTH, text, std=0.01),
        "text_projection": normal(text, sizes.embed_dim, std=text**-0.5),
        "logit_scale": torch.tensor(math.log(1 / 0.07)),
        "visual.class_embedding": normal(vision, std=vision**-0.5),
        "visual.positional_embedding": normal(positions, vision, std=vision**-0.5),
        "visual.proj": normal(vision, sizes.embed_dim, std=vision**-0.5),
        # The paper's code leaves the patch embedding to PyTorch's default, whose standard deviation this is.
        "visual.conv1.weight": normal(vision, 3, patch, patch, std=(3 * 3 * patch * patch) ** -0.5),
        "token_embedding.weight": normal(VOCAB_SIZE, text, std=0.02),
        "input_resolution": torch.tensor(sizes.resolution),
        "context_length": torch.tensor(CONTEXT_LENGTH),
        "vocab_size": torch.tensor(VOCAB_SIZE),
    }
    for name, width in (("visual.ln_pre", vision), ("visual.ln_post", vision), ("ln_final", text)):
        state |= {f"{name}.weight": torch.ones(width), f"{name}.bias": torch.zeros(width)}
    for tower, width, layers in (("visual.", vision, sizes.vision_layers), ("", text, sizes.text_layers)):
        for layer in range(layers):
            state |= _block(f"{tower}transformer.resblocks.{layer}", width, layers, normal)
    return state


def write_tiny_clip(path: Path, sizes: TinyClipSizes, seed: int) -> None:
    """Save the checkpoint for `seed`; the same seed and sizes give the same bytes. Raises OSError."""
    path.parent.mkdir(parents=True, exist_ok=True)
    torch.save(tiny_clip_state(sizes, torch.Generator().manual_seed(seed)), path)


def _block(name: str, width: int, layers: int, normal) -> dict[str, torch.Tensor]:
    projection = width**-0.5 * (2 * layers) ** -0.5
    block = {
        "attn.in_proj_weight": normal(3 * width, width, std=width**-0.5),
        "attn.out_proj.weight": normal(width, width, std=projection),
        "mlp.c_fc.weight": normal(4 * width, width, std=(2 * width) ** -0.5),
        "mlp.c_proj.weight": normal(width, 4 * width, std=projection),
        "attn.in_proj_bias": torch.zeros(3 * width),
        "attn.out_proj.bias": torch.zeros(width),
        "mlp.c_fc.bias": torch.zeros(4 * width),
        "mlp.c_proj.bias": torch.zeros(width),
    }
    for norm in ("ln_1", "ln_2"):
        block |= {f"{norm}.weight": torch.ones(width), f"{norm}.bias": torch.zeros(width)}
    return {f"{name}.{key}": value for key, value in block.items()}
