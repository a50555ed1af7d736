"""InternVideo's video tower (`--clip_evl`): CLIP's ViT on every frame and a global temporal decoder over all of them.

After each of the last blocks a depth-wise 3x3x3 position convolution is added to the patch tokens, and by
cross-attention one temporal class token reads every token of the clip (EVL, arXiv 2208.03550; UniFormerV2,
arXiv 2211.09552; InternVideo, arXiv 2212.03191). Parameters carry InternVideo's names, so its state dicts load as they
stand.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from modules.encoders.base import Sizes, register
from modules.encoders.clip import CLIP, ClipSizes, clip_sizes
from modules.transformer import Mlp, SelfAttention, Transformer
from plugins import flag, within

USUAL_DECODERS = 4  # in every InternVideo model, for every size of ViT
PATCHES = "visual.conv1.weight"
UNUSED = "text_mask_embedding"


@dataclass(frozen=True)
class Slots:
    """Where R packed frames stand among the V * T slots of a batch of clips.

    `keep`: bool [V, T], True where a slot holds a frame. `places`: int64 [R], their numbers, or None if all do.
    """

    keep: Tensor
    places: Tensor | None

    @classmethod
    def of(cls, keep: Tensor) -> Slots:
        places = keep.flatten().nonzero().squeeze(1)
        return cls(keep, None if len(places) == keep.numel() else places)

    def fill(self, rows: Tensor) -> Tensor:
        """rows [R, ...] -> [V, T, ...], zeros in empty slots."""
        if self.places is not None:
            rows = rows.new_zeros(self.keep.numel(), *rows.shape[1:]).index_copy(0, self.places, rows)
        return rows.unflatten(0, self.keep.shape)

    def key_mask(self, tokens: int) -> Tensor | None:
        """bool [V, 1, 1, T * tokens] for attention to all tokens of a clip; None if all slots are filled."""
        return None if self.places is None else self.keep.repeat_interleave(tokens, dim=1)[:, None, None]


class CrossAttention(SelfAttention):
    """Attention with the parameters of :class:`SelfAttention` whose keys and values are other tokens."""

    def forward(self, x: Tensor, y: Tensor, mask: Tensor | None = None) -> Tensor:
        """x [V, Q, W] asks, y [V, K, W] is read; mask bool, broadcastable to [V, heads, Q, K] -> [V, Q, W]."""
        width = x.shape[-1]
        q = F.linear(x, self.in_proj_weight[:width], self.in_proj_bias[:width])
        k, v = F.linear(y, self.in_proj_weight[width:], self.in_proj_bias[width:]).chunk(2, dim=-1)
        q, k, v = (part.unflatten(-1, (self.heads, -1)).transpose(1, 2) for part in (q, k, v))
        out = F.scaled_dot_product_attention(q, k, v, attn_mask=mask)
        return self.out_proj(out.transpose(1, 2).flatten(2))


class Extractor(nn.Module):
    """``x += attn(ln_1(x), ln_3(y)); x += mlp(ln_2(x))`` (EVL). It starts as the identity, as UniFormerV2's does."""

    def __init__(self, width: int, heads: int, activation: str) -> None:
        super().__init__()
        self.attn = CrossAttention(width, heads)
        self.ln_1 = nn.LayerNorm(width)
        self.mlp = Mlp(width, activation)
        self.ln_2 = nn.LayerNorm(width)
        self.ln_3 = nn.LayerNorm(width)
        nn.init.xavier_uniform_(self.attn.in_proj_weight)
        nn.init.xavier_uniform_(self.mlp.c_fc.weight)
        for last in (self.attn.out_proj, self.mlp.c_proj):
            nn.init.zeros_(last.weight)
            nn.init.zeros_(last.bias)

    def forward(self, x: Tensor, y: Tensor, mask: Tensor | None = None) -> Tensor:
        """x [V, 1, W], y [V, K, W], mask bool [V, 1, 1, K] -> [V, 1, W]."""
        x = x + self.attn(self.ln_1(x), self.ln_3(y), mask)
        return x + self.mlp(self.ln_2(x))


class VideoTransformer(Transformer):
    """CLIP's blocks on single frames; a temporal class token reads whole clips after the blocks in `read_after`."""

    def __init__(self, width: int, layers: int, heads: int, activation: str, read_after: Sequence[int]) -> None:
        super().__init__(width, layers, heads, activation)
        self.read_after = tuple(read_after)
        self.temporal_cls_token = nn.Parameter(torch.zeros(1, 1, width))
        self.balance = nn.Parameter(torch.zeros(width))
        self.dpe = nn.ModuleList(nn.Conv3d(width, width, 3, padding=1, groups=width) for _ in self.read_after)
        self.dec = nn.ModuleList(Extractor(width, heads, activation) for _ in self.read_after)
        for convolution in self.dpe:  # the tower starts as CLIP on the mean of the frames
            nn.init.zeros_(convolution.weight)
            nn.init.zeros_(convolution.bias)

    def forward(self, x: Tensor, slots: Slots) -> tuple[Tensor, Tensor]:
        """x [R, L, W], tokens of frames with CLS first -> the clips' tokens [V, W] and the frames' CLS [R, W]."""
        temporal = self.temporal_cls_token.expand(len(slots.keep), -1, -1)
        mask = slots.key_mask(x.shape[1])
        readers = dict(zip(self.read_after, zip(self.dpe, self.dec)))
        for number, block in enumerate(self.resblocks):
            x = block(x)
            if number in readers:
                convolution, extractor = readers[number]
                seen = add_positions(slots.fill(x), convolution)  # for the extractor only: x goes on as it was
                temporal = extractor(temporal, seen.flatten(1, 2), mask)
        frames = x[:, 0]
        mean = slots.fill(frames).sum(dim=1) / slots.keep.sum(dim=1, keepdim=True)
        weight = self.balance.sigmoid()
        return (1 - weight) * temporal[:, 0] + weight * mean, frames


def add_positions(tokens: Tensor, convolution: nn.Conv3d) -> Tensor:
    """tokens [V, T, 1 + grid * grid, W] + the convolution, over time, rows and columns, of its patches; not of CLS.

    An empty slot of zeros is to the convolution what lies beyond the end of a clip.
    """
    patches = tokens[:, :, 1:]
    grid = round(patches.shape[2] ** 0.5)
    moved = convolution(patches.unflatten(2, (grid, grid)).permute(0, 4, 1, 2, 3))
    return torch.cat([tokens[:, :, :1], patches + moved.permute(0, 2, 3, 4, 1).flatten(2, 3)], dim=2)


class VideoTower(nn.Module):
    """The frames' embedding and :class:`VideoTransformer`; :class:`VideoCLIP` has the last LayerNorm and projection."""

    def __init__(self, sizes: VideoClipSizes, activation: str) -> None:
        super().__init__()
        width, patch = sizes.vision_width, sizes.patch_size
        tokens = (sizes.image_resolution // patch) ** 2 + 1
        self.conv1 = nn.Conv3d(3, width, kernel_size=(1, patch, patch), stride=(1, patch, patch), bias=False)
        self.class_embedding = nn.Parameter(width**-0.5 * torch.randn(width))
        self.positional_embedding = nn.Parameter(width**-0.5 * torch.randn(tokens, width))
        self.ln_pre = nn.LayerNorm(width)
        self.transformer = VideoTransformer(
            width, sizes.vision_layers, sizes.vision_heads, activation, sizes.read_after
        )

    def forward(self, frames: Tensor, slots: Slots) -> tuple[Tensor, Tensor]:
        """frames float [R, 3, S, S], normalised -> the clips' tokens [V, W] and the frames' CLS [R, W], both raw."""
        # One frame deep: a 2-D convolution with the same numbers, faster than the 3-D one.
        x = F.conv2d(frames, self.conv1.weight.squeeze(2), stride=self.conv1.stride[1:]).flatten(2).transpose(1, 2)
        cls = self.class_embedding.to(x.dtype).expand(len(x), 1, -1)
        x = torch.cat([cls, x], dim=1) + self.positional_embedding.to(x.dtype)
        return self.transformer(self.ln_pre(x), slots)


@dataclass(frozen=True)
class VideoClipSizes(ClipSizes):
    """Shape of a CLIP with the video tower. `read_after`: after which blocks (from 0) the clip is read."""

    read_after: tuple[int, ...]


@dataclass(frozen=True)
class InternVideoOptions:
    clip_evl: bool = flag(
        False, "InternVideo's video tower instead of CLIP's image tower; chooses this encoder", chooses=True
    )
    pretrained_path: Path | None = flag(None, "InternVideo weights to start from", type=Path)
    mergeclip: bool = flag(False, "average --pretrained_path with the CLIP of --pretrained_clip_name")
    mergeweight: float = flag(
        0.5, "weight of the CLIP in that average, the rest is the file's", must_be=within(0, 1), tolerated=True
    )


@register("internvideo")
class VideoCLIP(CLIP):
    """CLIP whose image tower is InternVideo's video tower; the text tower is CLIP's."""

    Options = InternVideoOptions
    title, family = "InternVideo's video tower", "InternVideo"
    chosen_by = "--clip_evl"
    has_half, trained_with = False, "quick_gelu"
    spec_options: tuple[str, ...] = ()
    own_parts = (*(f"visual.transformer.{part}" for part in ("temporal_cls_token", "balance", "dpe.", "dec.")), UNUSED)
    # InternVideo merges by name, and CLIP has these under others: it leaves them out, so its published models have
    # those of its own file. Merging them as well would give other numbers.
    renamed = {
        "visual.proj": "visual_proj",
        "visual.ln_post.weight": "visual_ln_post.weight",
        "visual.ln_post.bias": "visual_ln_post.bias",
    }

    def build_image_tower(self) -> None:
        sizes = self.sizes
        self.visual = VideoTower(sizes, self.activation)
        self.visual_ln_post = nn.LayerNorm(sizes.vision_width)
        self.visual_proj = nn.Parameter(sizes.vision_width**-0.5 * torch.randn(sizes.vision_width, sizes.embed_dim))
        # Most of InternVideo's files hold it for a pre-training task; nothing reads it, so nothing trains it either.
        self.text_mask_embedding = nn.Parameter(torch.zeros(1, 1, sizes.text_width), requires_grad=False)

    @classmethod
    def sizes_of(cls, tensors: Mapping[str, Tensor], options: Any) -> VideoClipSizes:
        return video_clip_sizes(tensors)

    @classmethod
    def adapted(cls, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Patch weights of a plain CLIP [width, 3, p, p] become [width, 3, 1, p, p]; UNUSED is filled in."""
        found = super().adapted(tensors)
        if found[PATCHES].ndim == 4:
            found[PATCHES] = found[PATCHES].unsqueeze(2)
        found.setdefault(UNUSED, found["ln_final.weight"].new_zeros(1, 1, len(found["ln_final.weight"])))
        return found

    @classmethod
    def own_weights(cls, options: InternVideoOptions) -> tuple[str, Path] | None:
        return ("pretrained_path", options.pretrained_path) if options.pretrained_path else None

    @classmethod
    def merge_weight(cls, options: InternVideoOptions) -> float | None:
        return options.mergeweight if options.mergeclip else None

    @property
    def head_sizes(self) -> Sizes:
        sizes = self.sizes
        return Sizes(sizes.embed_dim, sizes.context_length, sizes.text_heads, token_width=sizes.text_width)

    def encode_text(self, token_ids: Tensor, token_mask: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """token_ids int64 [N, L] -> the projected feature [N, D], tokens [N, L, text width] that are not projected.

        InternVideo's token-wise interaction compares these with the frames, which works where both are equally wide.
        """
        tokens = self.text_tokens(token_ids)
        ends = tokens[torch.arange(len(tokens), device=tokens.device), token_ids.argmax(dim=-1)]
        return ends @ self.text_projection, tokens

    def encode_frames(self, frames: Tensor, frame_mask: Tensor) -> tuple[Tensor, Tensor]:
        """frames uint8 or float [V, T, 3, S, S], frame_mask bool [V, T] -> frames [V, T, D], videos [V, D], not unit.

        Frames that the mask leaves out do not matter, whatever they hold; their own features are zeros. Under
        ``conventions.read_padding`` they are read as frames of normalised zeros (the mean colour) and count in
        everything, as in InternVideo; clips are first filled to ``source_frames`` (its loaders fill to --max_frames),
        so that the result does not depend on the batch. The frame features then cover the padding as well. Raises
        ValueError for a wrong image side or an empty clip.
        """
        self.check_frames(frames, frame_mask)
        if self.conventions.read_padding:
            missing = max(self.conventions.source_frames - frames.shape[1], 0)
            read = self.normalize(frames).masked_fill(~frame_mask[..., None, None, None], 0)
            read = torch.cat([read, read.new_zeros(len(read), missing, *read.shape[2:])], dim=1)
            slots = packed = Slots(torch.ones(read.shape[:2], dtype=torch.bool, device=read.device), None)
            read = read.flatten(0, 1)
        else:
            lengths = frame_mask.sum(dim=1, keepdim=True)
            # Packed to the front: to the convolution over time a frame's neighbours are its clip's other real frames.
            packed = Slots.of(torch.arange(frames.shape[1], device=lengths.device) < lengths)
            slots, read = Slots.of(frame_mask), self.normalize(frames[frame_mask])
        videos, features = (self.visual_ln_post(x) @ self.visual_proj for x in self.visual(read, packed))
        return slots.fill(features), videos

    def without_gradient(self, reads_tokens: bool, reads_whole: bool) -> tuple[str, ...]:
        return (("text_projection",) if reads_tokens else ()) + (() if reads_whole else self.own_parts)


def video_clip_sizes(tensors: Mapping[str, Tensor]) -> VideoClipSizes:
    """Sizes of the tower in `tensors`, under this file's names. Raises ValueError for other shapes.

    The decoders stand after the last blocks, one each: as many as the weights have, else (plain CLIP) four.
    """
    patches = tensors[PATCHES]
    if patches.ndim != 5 or patches.shape[2] != 1:
        raise ValueError(
            f"clip.{PATCHES} has shape {list(patches.shape)}, not that of a video tower: [width, 3, 1, p, p]"
        )
    plain = clip_sizes({**tensors, PATCHES: patches.squeeze(2)})
    layers = plain.vision_layers
    start = "visual.transformer.dec."
    decoders = len({name.removeprefix(start).split(".")[0] for name in tensors if name.startswith(start)})
    decoders = decoders or min(USUAL_DECODERS, layers)
    if decoders > layers:
        raise ValueError(f"the video tower has {decoders} temporal decoders for {layers} blocks; at most one each")
    return VideoClipSizes(**vars(plain), read_after=tuple(range(layers - decoders, layers)))
