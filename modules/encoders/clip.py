"""CLIP (Radford et al., arXiv 2103.00020): a ViT for images and a causal transformer for text.

Parameters carry the names of OpenAI's release, so a released state dict loads as it stands.
"""

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from modules.encoders.base import RIGHT, Conventions, Encoder, ImageInput, ShapeOptions, Sizes, register
from modules.tokenizer import Tokenizer
from modules.transformer import ACTIVATIONS, Transformer
from plugins import flag

HEAD_WIDTH = 64  # of every attention head of OpenAI's models
WIDEST_IMAGE_TOWER = 1024  # of ViT-L: wider towers have heads of other widths
STEM = re.compile(r"(?:visual\.)?(?:(?:token|class|positional)_embedding|conv1|ln_pre)(?:\.|$)")
LETTERS = {768: "B", 1024: "L", 1280: "H", 1408: "g", 1664: "bigG"}  # width of a ViT -> how it is called
KEPT_POSITIONS = 20  # of a text, which LongCLIP does not stretch: most captions that CLIP saw were shorter
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
    vision_mlp: int | None = field(default=None, kw_only=True)  # channels within the MLPs; None: 4 x width
    text_mlp: int | None = field(default=None, kw_only=True)


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
        layers, heads = sizes.vision_layers, sizes.vision_heads
        self.transformer = Transformer(width, layers, heads, activation, hidden=sizes.vision_mlp)
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
class ViTOptions(ShapeOptions):
    image_heads: int | None = flag(
        None, "attention heads of the image tower, where neither weights nor a file beside them tell", type=int
    )


@dataclass(frozen=True)
class ClipOptions(ViTOptions):
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
        width, layers, heads = sizes.text_width, sizes.text_layers, sizes.text_heads
        self.transformer = Transformer(width, layers, heads, activation, hidden=sizes.text_mlp)
        self.token_embedding = nn.Embedding(sizes.vocab_size, sizes.text_width)
        self.positional_embedding = nn.Parameter(0.01 * torch.randn(sizes.context_length, sizes.text_width))
        self.ln_final = nn.LayerNorm(sizes.text_width)
        self.text_projection = nn.Parameter(sizes.text_width**-0.5 * torch.randn(sizes.text_width, sizes.embed_dim))
        self.logit_scale = nn.Parameter(torch.tensor(1 / 0.07).log())
        nn.init.normal_(self.token_embedding.weight, std=0.02)

    def build_image_tower(self) -> None:
        self.visual = ImageTower(self.sizes, self.activation, self.options.linear_patch == "3d")

    @classmethod
    def sizes_of(
        cls, tensors: Mapping[str, Tensor], options: Any = None, told: Mapping[str, Any] | None = None
    ) -> ClipSizes:
        """Raises ValueError for shapes that are not a ViT CLIP's.

        Image heads are not visible in the weights: `options` or `told` say them, else OpenAI's models have one per 64
        channels. ``--image_size`` and ``--context_length`` win over the weights' own sizes; see :meth:`fitted`.
        """
        if getattr(options, "linear_patch", None) == "2d" and "visual.conv2.weight" in tensors:
            raise ValueError("clip.visual.conv2.weight has no place with --linear_patch 2d; give --linear_patch 3d")
        options, conv = options or cls.Options(), tensors["visual.conv1.weight"]
        if conv.ndim != 4 or conv.shape[2] != conv.shape[3]:
            raise ValueError(f"clip.visual.conv1.weight has shape {list(conv.shape)}: not square image patches")
        width, patch = conv.shape[0], conv.shape[-1]
        rows = len(tensors["visual.positional_embedding"]) - 1
        side = math.isqrt(rows)
        if side * side != rows:
            raise ValueError(f"clip.visual.positional_embedding has {rows} patch positions, not a square number")
        text_width = len(tensors["ln_final.weight"])
        if text_width % HEAD_WIDTH:
            raise ValueError(f"the text tower is {text_width} wide, not a multiple of {HEAD_WIDTH} (one head)")
        blocks = {match[0] for match in map(BLOCK.match, tensors) if match}
        vision_layers = sum(block.startswith("visual.") for block in blocks)
        return ClipSizes(
            embed_dim=tensors["text_projection"].shape[1],
            image_resolution=image_side(patch * side, patch, options.image_size),
            vision_layers=vision_layers,
            vision_width=width,
            patch_size=patch,
            context_length=text_length(len(tensors["positional_embedding"]), options.context_length),
            vocab_size=len(tensors["token_embedding.weight"]),
            text_width=text_width,
            text_heads=text_width // HEAD_WIDTH,
            text_layers=len(blocks) - vision_layers,
            vision_heads=image_heads(width, options.image_heads or (told or {}).get("vision_heads")),
            vision_mlp=mlp_width(tensors, "visual.transformer.", width),
            text_mlp=mlp_width(tensors, "transformer.", text_width),
        )

    def fitted(self, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Positions for ``--image_size`` interpolated, for ``--context_length`` stretched."""
        images, texts = tensors["visual.positional_embedding"], tensors["positional_embedding"]
        grid = self.sizes.image_resolution // self.sizes.patch_size
        positions = {"visual.positional_embedding": interpolated(images, grid)}
        return {**tensors, **positions, "positional_embedding": stretched(texts, self.sizes.context_length)}

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


def image_side(own: int, patch: int, wanted: int | None) -> int:
    """Raises ValueError for a side that is no whole number of patches."""
    if wanted is not None and (wanted < patch or wanted % patch):
        raise ValueError(f"--image_size must be a multiple of the patches' {patch} pixels, got {wanted}")
    return wanted or own


def text_length(own: int, wanted: int | None) -> int:
    """Raises ValueError for fewer tokens than the weights have."""
    if wanted is not None and (wanted < own or own < KEPT_POSITIONS + 2):
        raise ValueError(f"--context_length must be at least the {own} tokens of these weights, got {wanted}")
    return wanted or own


def image_heads(width: int, told: int | None) -> int:
    """How many heads an image tower has. Raises ValueError where nobody says, or for a number that cannot be."""
    if told is None and width > WIDEST_IMAGE_TOWER:
        raise ValueError(
            f"the image tower is {width} wide, and weights do not show its attention heads: give --image_heads (16 in "
            "ViT-H/14, ViT-g/14 and ViT-bigG/14), or put the model's open_clip_config.json or config.json beside them"
        )
    heads = told or width // HEAD_WIDTH
    if not heads or width % heads or (told is None and width % HEAD_WIDTH):
        what = f"{told} heads do not divide it" if told else f"not a multiple of {HEAD_WIDTH} (one head)"
        raise ValueError(f"the image tower is {width} wide, {what}; give --image_heads")
    return heads


def mlp_width(tensors: Mapping[str, Tensor], tower: str, width: int) -> int | None:
    """None where it is the usual 4 x width."""
    weight = tensors.get(f"{tower}resblocks.0.mlp.c_fc.weight")
    return None if weight is None or len(weight) == 4 * width else len(weight)


def interpolated(positions: Tensor, grid: int) -> Tensor:
    """Positions [1 + g * g, W], CLS first, for a grid of `grid` x `grid` patches; bicubic, as in open_clip."""
    cls, patches = positions[:1], positions[1:]
    side = math.isqrt(len(patches))
    if side == grid:
        return positions
    image = patches.T.reshape(1, -1, side, side)
    image = F.interpolate(image, (grid, grid), mode="bicubic", antialias=True, align_corners=False)
    return torch.cat([cls, image[0].flatten(1).T])


def stretched(positions: Tensor, length: int) -> Tensor:
    """Text positions [L, W] -> [length, W] as in LongCLIP (arXiv 2403.15378): the first 20 stay, the rest is stretched
    linearly, and its last step goes on beyond the end. 77 become 248 in steps of a quarter.
    """
    if len(positions) == length:
        return positions
    rest, wanted = positions[KEPT_POSITIONS:], length - KEPT_POSITIONS
    at = torch.arange(wanted) * (len(rest) / wanted)
    low = at.long().clamp(max=len(rest) - 2)
    return torch.cat([positions[:KEPT_POSITIONS], torch.lerp(rest[low], rest[low + 1], (at - low)[:, None])])
