"""A small CLIP with random weights under OpenAI's key names, for runs that need some checkpoint and no download."""

import io
import math
from collections.abc import Mapping

import torch

VOCAB_SIZE = 49408
CONTEXT_LENGTH = 77


def tiny_clip(sizes: Mapping[str, int], seed: int) -> bytes:
    """The checkpoint file: float32 tensors, initialised as the CLIP paper's code initialises (Radford et al. 2021).

    `sizes`: resolution, patch, embed_dim; width and layers of vision and text. The same seed and sizes give the same
    bytes. Three integer tensors (input_resolution, context_length, vocab_size) mark OpenAI's layout, as in their files.
    """
    vision, text, patch, embed = (sizes[name] for name in ("vision_width", "text_width", "patch", "embed_dim"))
    positions = (sizes["resolution"] // patch) ** 2 + 1
    weights = {  # shape and standard deviation
        "positional_embedding": ((CONTEXT_LENGTH, text), 0.01),
        "text_projection": ((text, embed), text**-0.5),
        "visual.class_embedding": ((vision,), vision**-0.5),
        "visual.positional_embedding": ((positions, vision), vision**-0.5),
        "visual.proj": ((vision, embed), vision**-0.5),
        # The paper's code leaves the patch embedding to PyTorch's default, whose standard deviation this is.
        "visual.conv1.weight": ((vision, 3, patch, patch), (3 * 3 * patch * patch) ** -0.5),
        "token_embedding.weight": ((VOCAB_SIZE, text), 0.02),
    }
    norms = {"visual.ln_pre": vision, "visual.ln_post": vision, "ln_final": text}
    for tower, width, layers in (("visual.", vision, sizes["vision_layers"]), ("", text, sizes["text_layers"])):
        for layer in range(layers):
            block, residual = f"{tower}transformer.resblocks.{layer}", width**-0.5 * (2 * layers) ** -0.5
            weights[f"{block}.attn.in_proj_weight"] = ((3 * width, width), width**-0.5)
            weights[f"{block}.attn.out_proj.weight"] = ((width, width), residual)
            weights[f"{block}.mlp.c_fc.weight"] = ((4 * width, width), (2 * width) ** -0.5)
            weights[f"{block}.mlp.c_proj.weight"] = ((width, 4 * width), residual)
            norms |= {f"{block}.ln_1": width, f"{block}.ln_2": width}
    generator = torch.Generator().manual_seed(seed)
    state = {name: torch.randn(shape, generator=generator) * std for name, (shape, std) in weights.items()}
    for name, (shape, _) in weights.items():
        if ".resblocks." in name:
            state[name.removesuffix("weight") + "bias"] = torch.zeros(shape[0])
    for name, width in norms.items():
        state |= {f"{name}.weight": torch.ones(width), f"{name}.bias": torch.zeros(width)}
    state["logit_scale"] = torch.tensor(math.log(1 / 0.07))
    integers = {"input_resolution": sizes["resolution"], "context_length": CONTEXT_LENGTH, "vocab_size": VOCAB_SIZE}
    file = io.BytesIO()
    torch.save(state | {name: torch.tensor(value) for name, value in integers.items()}, file)
    return file.getvalue()
