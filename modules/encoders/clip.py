"""CLIP (Radford et al., arXiv 2103.00020): a ViT for images and a causal transformer for text.

Parameters carry the names of OpenAI's release, so a released state dict loads as it stands.
"""

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from modules.encoders.base import RIGHT, Conventions, Encoder, ImageInput, Sizes, register
from modules.tokenizer import Tokenizer
from modules.transformer import ACTIVATIONS, Transformer
from plugins import flag

HEAD_WIDTH = 64  # of every attention head of OpenAI's models
MLP_RATIO = 4  # width of their MLPs by that of the tower
WIDEST_IMAGE_TOWER = 1024  # of ViT-L: wider towers of open_clip have heads of other widths
STEM = re.compile(r"(?:visual\.)?(?:(?:token|class|positional)_embedding|conv1|ln_pre)(?:\.|$)")
LETTERS = {768: "B", 1024: "L"}  # width of a ViT -> how it is called
BLOCK = re.compile(r"(?:visual\.)?transformer\.resblocks\.(\d+)\.")


@dataclass(frozen=True)
class ClipSizes:
    """Shape of a ViT CLIP. `image_resolution` is the image side in pixels."""

    embed_dim: int
    image_resolution: int
    vision_layers: int
    vision_width: int
    patch_size: int
    context_length: int
    vocab_size: int
    text_width: int
    text_heads: int
    text_layers: int
    vision_heads: int


class ImageTower(nn.Module):
    """CLIP's vision transformer. With `temporal_patch` its patches span three frames (CLIP4Clip's ``linear_patch 3d``):
    `conv2` takes the place of `conv1`, which stays for the checkpoint's sake and does not train.
    """

    def __init__(self, sizes: ClipSizes, activation: str, temporal_patch: bool = False) -> None:
        super().__init__()
        width, patch = sizes.vision_width, sizes.patch_size
        tokens = (sizes.image_resolution // patch) ** 2 + 1
        self.conv1 = nn.Conv2d(3, width, kernel_size=patch, stride=patch, bias=False)
        self.temporal_patch = temporal_patch
        if temporal_patch:
            self.conv2 = nn.Conv3d(3, width, (3, patch, patch), stride=(1, patch, patch), padding=(1, 0, 0), bias=False)
            self.conv1.requires_grad_(False)
        self.class_embedding = nn.Parameter(width**-0.5 * torch.randn(width))
        self.positional_embedding = nn.Parameter(width**-0.5 * torch.randn(tokens, width))
        self.ln_pre = nn.LayerNorm(width)
        self.transformer = Transformer(width, sizes.vision_layers, sizes.vision_heads, activation)
        self.ln_post = nn.LayerNorm(width)
        self.proj = nn.Parameter(width**-0.5 * torch.randn(width, sizes.embed_dim))

    def patches(self, frames: Tensor) -> Tensor:
        """frames float [R, 3, S, S] -> embedded patches [R, P, width].

        With `temporal_patch` clips [V, T, 3, S, S], zeros at padding as beyond the ends -> [V, T, P, width].
        """
        if self.temporal_patch:
            return self.conv2(frames.transpose(1, 2).to(self.conv2.weight.dtype)).flatten(3).permute(0, 2, 3, 1)
        return self.conv1(frames.to(self.conv1.weight.dtype)).flatten(2).transpose(1, 2)

    def attend(self, patches: Tensor) -> Tensor:
        """Embedded patches [R, P, width] -> tokens [R, 1 + P, width] before ``ln_post`` and projection; CLS first."""
        cls = self.class_embedding.to(patches.dtype).expand(len(patches), 1, -1)
        x = torch.cat([cls, patches], dim=1) + self.positional_embedding.to(patches.dtype)
        return self.transformer(self.ln_pre(x))

    def forward(self, patches: Tensor) -> Tensor:
        """Embedded patches [R, P, width] -> image features [R, D], not unit length."""
        return self.ln_post(self.attend(patches)[:, 0]) @ self.proj


@dataclass(frozen=True)
class ClipOptions:
    linear_patch: str = flag("2d", "patches span one frame (2d) or three in a row (3d)", choices=("2d", "3d"))


@register("clip")
class CLIP(Encoder):
    """Both towers and the logit scale; `sizes` says how big, `activation` which MLP non-linearity."""

    Options = ClipOptions
    title = family = "CLIP"
    has_half = True
    projects_tokens = True  # of a text to width D, not only the feature of its end
    own_parts: tuple[str, ...] = ("visual.conv2.",)
    spec_options: tuple[str, ...] = ("linear_patch",)

    def __init__(
        self, sizes: ClipSizes, activation: str, options: Any = None, conventions: Conventions = RIGHT
    ) -> None:
        if activation not in ACTIVATIONS:
            raise ValueError(f"--activation must be one of {', '.join(ACTIVATIONS)}, got {activation!r}")
        self.image = ImageInput(sizes.image_resolution)
        super().__init__(sizes, activation, options or self.Options(), conventions)
        self.build_image_tower()
        self.transformer = Transformer(sizes.text_width, sizes.text_layers, sizes.text_heads, activation)
        self.token_embedding = nn.Embedding(sizes.vocab_size, sizes.text_width)
        self.positional_embedding = nn.Parameter(0.01 * torch.randn(sizes.context_length, sizes.text_width))
        self.ln_final = nn.LayerNorm(sizes.text_width)
        self.text_projection = nn.Parameter(sizes.text_width**-0.5 * torch.randn(sizes.text_width, sizes.embed_dim))
        self.logit_scale = nn.Parameter(torch.tensor(1 / 0.07).log())
        nn.init.normal_(self.token_embedding.weight, std=0.02)

    def build_image_tower(self) -> None:
        self.visual = ImageTower(self.sizes, self.activation, self.options.linear_patch == "3d")

    @classmethod
    def sizes_of(cls, tensors: Mapping[str, Tensor], options: Any = None) -> ClipSizes:
        """Raises ValueError for shapes that are not a ViT CLIP's.

        Heads are not visible in the weights: OpenAI's models have one per 64 channels.
        """
        if options is not None and options.linear_patch == "2d" and "visual.conv2.weight" in tensors:
            raise ValueError("clip.visual.conv2.weight has no place with --linear_patch 2d; give --linear_patch 3d")
        conv = tensors["visual.conv1.weight"]
        if conv.ndim != 4 or conv.shape[2] != conv.shape[3]:
            raise ValueError(f"clip.visual.conv1.weight has shape {list(conv.shape)}: not square image patches")
        width, patch = conv.shape[0], conv.shape[-1]
        rows = len(tensors["visual.positional_embedding"]) - 1
        side = math.isqrt(rows)
        if side * side != rows:
            raise ValueError(f"clip.visual.positional_embedding has {rows} patch positions, not a square number")
        text_width = len(tensors["ln_final.weight"])
        for tower, size in (("image", width), ("text", text_width)):
            if size % HEAD_WIDTH:
                raise ValueError(f"the {tower} tower is {size} wide, not a multiple of {HEAD_WIDTH} (one head)")
        if width > WIDEST_IMAGE_TOWER:
            raise ValueError(
                f"the image tower is {width} wide. Models wider than ViT-L ({WIDEST_IMAGE_TOWER}) have heads of other "
                f"widths than {HEAD_WIDTH}, which weights do not show, and are not built here."
            )
        for tower, prefix, size in (("image", "visual.", width), ("text", "", text_width)):
            mlp = tensors.get(f"{prefix}transformer.resblocks.0.mlp.c_fc.weight")
            if mlp is not None and len(mlp) != MLP_RATIO * size:
                ratio = f"the {tower} tower's MLPs are {len(mlp) / size:g} times as wide as the tower (its MLP ratio)"
                raise ValueError(f"{ratio}; in OpenAI's models it is {MLP_RATIO}, as built here")
        blocks = {match[0] for match in map(BLOCK.match, tensors) if match}
        vision_layers = sum(block.startswith("visual.") for block in blocks)
        return ClipSizes(
            embed_dim=tensors["text_projection"].shape[1],
            image_resolution=patch * side,
            vision_layers=vision_layers,
            vision_width=width,
            patch_size=patch,
            context_length=len(tensors["positional_embedding"]),
            vocab_size=len(tensors["token_embedding.weight"]),
            text_width=text_width,
            text_heads=text_width // HEAD_WIDTH,
            text_layers=len(blocks) - vision_layers,
            vision_heads=width // HEAD_WIDTH,
        )

    @property
    def tower(self) -> str:
        """Such as ``CLIP ViT-B/32``; a width that is no standard one stands as its number."""
        width = self.sizes.vision_width
        return f"{self.family} ViT-{LETTERS.get(width, width)}/{self.sizes.patch_size}"

    @property
    def tokenizer(self) -> Tokenizer:
        return Tokenizer()

    @property
    def head_sizes(self) -> Sizes:
        sizes = self.sizes
        token_width = sizes.embed_dim if self.projects_tokens else sizes.text_width
        return Sizes(sizes.embed_dim, sizes.context_length, sizes.text_heads, token_width)

    def start_values(self, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Patches of three frames start with those of one in the middle, as in CLIP4Clip."""
        if not hasattr(self.visual, "conv2"):
            return {}
        return {"visual.conv2.weight": F.pad(tensors["visual.conv1.weight"].unsqueeze(2), (0, 0, 0, 0, 1, 1))}

    def encode_frames(
        self, frames: Tensor, frame_mask: Tensor, places: Tensor | None = None
    ) -> tuple[Tensor, Tensor | None]:
        """frames uint8 or float [V, T, 3, S, S], mask bool [V, T] -> [V, T, D] float32, zeros at padding, and None.

        Only real frames go through the tower. Raises ValueError for a wrong image side or a clip without any frame.
        """
        slots = self.check_frames(frames, frame_mask, places)
        if self.visual.temporal_patch:
            clips = self.normalize(frames).masked_fill(~frame_mask[..., None, None, None], 0)
            patches = slots.take(self.visual.patches(clips))
        else:
            patches = self.visual.patches(self.normalize(slots.take(frames)))
        return slots.fill(self.visual(patches).float()), None

    def text_tokens(self, token_ids: Tensor) -> Tensor:
        """token_ids int64 [N, L], L up to the context length -> tokens [N, L, text width] after ``ln_final``.

        The mask is causal, so cutting L to the longest caption changes nothing for the tokens that remain.
        """
        length = token_ids.shape[1]
        if length > self.sizes.context_length:
            raise ValueError(f"--max_words {length} exceeds the model's context of {self.sizes.context_length} tokens")
        dtype = self.text_projection.dtype
        x = self.token_embedding(token_ids).to(dtype) + self.positional_embedding[:length].to(dtype)
        return self.ln_final(self.transformer(x, causal=True))

    def encode_text(self, token_ids: Tensor, token_mask: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """token_ids int64 [N, L] -> the feature at the end-of-text token (the highest id) [N, D], tokens [N, L, D].

        Without `projects_tokens` only the feature is projected: tokens [N, L, text width].
        """
        tokens = self.text_tokens(token_ids)
        if self.projects_tokens:
            tokens = tokens @ self.text_projection
        ends = tokens[torch.arange(len(tokens), device=tokens.device), token_ids.argmax(dim=-1)]
        return ends if self.projects_tokens else ends @ self.text_projection, tokens

    def to_half(self) -> None:
        """As CLIP4Clip's ``convert_weights``: float16 but for LayerNorms, embeddings, positions and the logit scale.

        LayerNorms compute in float32 and give float16.
        """
        for name, parameter in self.named_parameters():
            if not any(part in name for part in ("ln_", "embedding", "logit_scale")):
                parameter.data = parameter.data.half()
        for module in self.modules():
            if isinstance(module, nn.LayerNorm):
                module.register_forward_pre_hook(lambda _, inputs: (inputs[0].float(),))
                module.register_forward_hook(lambda _, inputs, output: output.half())

    def depth(self, name: str) -> int | None:
        if block := BLOCK.match(name):
            return int(block[1]) + 1
        return 0 if STEM.match(name) else None

    @property
    def blocks(self) -> int:
        return max(self.sizes.vision_layers, self.sizes.text_layers)
