"""InternVideo's video tower (`--clip_evl`): CLIP's ViT on every frame and a global temporal decoder over all of them.

After each of the last blocks a depth-wise 3x3x3 position convolution is added to the patch tokens, and by
cross-attention one temporal class token reads every token of the clip (EVL, arXiv 2208.03550; UniFormerV2,
arXiv 2211.09552; InternVideo, arXiv 2212.03191). Parameters carry InternVideo's names, so its files load.
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from modules.encoders.base import Slots, register
from modules.encoders.clip import CLIP, ClipSizes
from modules.transformer import Attention, Transformer, mlp
from plugins import flag, within

USUAL_DECODERS = 4  # in every InternVideo model, for every size of ViT
PATCHES = "visual.conv1.weight"
DECODER = re.compile(r"visual\.transformer\.dec\.\d+\.")
UNUSED = "text_mask_embedding"


@dataclass(frozen=True)
class VideoClipSizes(ClipSizes):
    """Shape of a CLIP with the video tower. `read_after`: after which blocks (from 0) the clip is read."""

    read_after: tuple[int, ...]


def pack(slots: Slots) -> Slots:
    """The slots with each clip's real frames at its front.

    To the convolution over time a frame's neighbours are its clip's other real frames.
    """
    if slots.places is None:
        return slots
    length, lengths = slots.keep.shape[1], slots.keep.sum(dim=1)
    clip = slots.places // length
    number = torch.arange(len(clip), device=clip.device) - (lengths.cumsum(0) - lengths)[clip]  # within its clip
    return Slots(torch.arange(length, device=clip.device) < lengths[:, None], clip * length + number)


class Extractor(nn.Module):
    """``x += attn(ln_1(x), ln_3(y)); x += mlp(ln_2(x))`` (EVL). It starts as the identity, as UniFormerV2's does."""

    is_block = True  # --compile compiles each of them

    def __init__(self, width: int, heads: int, activation: str) -> None:
        super().__init__()
        self.attn = Attention(width, heads)
        self.ln_1 = nn.LayerNorm(width)
        self.mlp = mlp(width, activation)
        self.ln_2 = nn.LayerNorm(width)
        self.ln_3 = nn.LayerNorm(width)
        nn.init.xavier_uniform_(self.attn.in_proj_weight)
        nn.init.xavier_uniform_(self.mlp.c_fc.weight)
        for last in (self.attn.out_proj, self.mlp.c_proj):
            nn.init.zeros_(last.weight)
            nn.init.zeros_(last.bias)

    def forward(self, x: Tensor, y: Tensor, mask: Tensor | None = None) -> Tensor:
        """x [V, 1, W], y [V, K, W], mask bool [V, 1, 1, K] -> [V, 1, W]."""
        x = x + self.attn(self.ln_1(x), mask, y=self.ln_3(y))
        return x + self.mlp(self.ln_2(x))


class VideoTransformer(Transformer):
    """CLIP's blocks on single frames; a temporal class token reads whole clips after the blocks in `read_after`."""

    def __init__(self, sizes: VideoClipSizes, activation: str) -> None:
        width, heads = sizes.vision_width, sizes.vision_heads
        super().__init__(width, sizes.vision_layers, heads, activation)
        self.read_after = sizes.read_after
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
        mask = None  # [V, 1, 1, T * L], for attention to all tokens of a clip
        if slots.places is not None:
            mask = slots.keep.repeat_interleave(x.shape[1], dim=1)[:, None, None]
        grid = round((x.shape[1] - 1) ** 0.5)
        readers = dict(zip(self.read_after, zip(self.dpe, self.dec)))
        for number, block in enumerate(self.resblocks):
            x = block(x)
            if number in readers:
                convolution, extractor = readers[number]
                # Positions of patches, not of CLS, over time, rows and columns; an empty slot of zeros is to the
                # convolution what lies beyond the end of a clip. For the extractor only: x goes on as it was.
                cls, patches = slots.fill(x).split([1, grid * grid], dim=2)
                moved = convolution(patches.unflatten(2, (grid, grid)).permute(0, 4, 1, 2, 3))
                seen = torch.cat([cls, patches + moved.permute(0, 2, 3, 4, 1).flatten(2, 3)], dim=2)
                temporal = extractor(temporal, seen.flatten(1, 2), mask)
        frames = x[:, 0]
        mean = slots.fill(frames).sum(dim=1) / slots.keep.sum(dim=1, keepdim=True)
        weight = self.balance.sigmoid()
        return (1 - weight) * temporal[:, 0] + weight * mean, frames


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
        self.transformer = VideoTransformer(sizes, activation)

    def forward(self, frames: Tensor, slots: Slots) -> tuple[Tensor, Tensor]:
        """frames float [R, 3, S, S], normalised -> the clips' tokens [V, W] and the frames' CLS [R, W], both raw."""
        # One frame deep: a 2-D convolution with the same numbers, faster than the 3-D one.
        x = F.conv2d(frames, self.conv1.weight.squeeze(2), stride=self.conv1.stride[1:]).flatten(2).transpose(1, 2)
        cls = self.class_embedding.to(x.dtype).expand(len(x), 1, -1)
        x = torch.cat([cls, x], dim=1) + self.positional_embedding.to(x.dtype)
        return self.transformer(self.ln_pre(x), slots)


@register("internvideo", chosen_by="--clip_evl")
class VideoCLIP(CLIP):
    """CLIP whose image tower is InternVideo's video tower; the text tower is CLIP's."""

    @dataclass(frozen=True)
    class Options:
        clip_evl: bool = flag(False, "InternVideo's video tower instead of CLIP's image tower", chooses=True)
        pretrained_path: Path | None = flag(None, "InternVideo weights to start from", type=Path)
        mergeclip: bool = flag(False, "average --pretrained_path with the CLIP of --pretrained_clip_name")
        mergeweight: float = flag(0.5, "weight of CLIP in that average", must_be=within(0, 1), tolerated=True)

    title, family = "InternVideo's video tower", "InternVideo"
    has_half, trained_with = False, "quick_gelu"
    projects_tokens = False  # InternVideo's token-wise interaction compares them so, where widths are equal
    spec_options: tuple[str, ...] = ()
    own_parts = (*(f"visual.transformer.{part}" for part in ("temporal_cls_token", "balance", "dpe.", "dec.")), UNUSED)
    # InternVideo merges by name, and CLIP has these under others: its published models keep those of its own file.
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
    def sizes_of(cls, tensors: Mapping[str, Tensor], options: Any = None) -> VideoClipSizes:
        """The decoders stand after the last blocks, one each: as many as the weights have, else (plain CLIP) four."""
        patches = tensors[PATCHES]
        if patches.ndim != 5 or patches.shape[2] != 1:
            raise ValueError(f"clip.{PATCHES} is {list(patches.shape)}, not that of a video tower, [width, 3, 1, p, p]")
        plain = super().sizes_of({**tensors, PATCHES: patches.squeeze(2)})
        layers = plain.vision_layers
        decoders = len({match[0] for match in map(DECODER.match, tensors) if match}) or min(USUAL_DECODERS, layers)
        if decoders > layers:
            raise ValueError(f"the video tower has {decoders} temporal decoders for {layers} blocks; at most one each")
        return VideoClipSizes(**vars(plain), read_after=tuple(range(layers - decoders, layers)))

    @classmethod
    def adapted(cls, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Patch weights of a plain CLIP [width, 3, p, p] become [width, 3, 1, p, p]; UNUSED is filled in."""
        found = super().adapted(tensors)
        if found[PATCHES].ndim == 4:
            found[PATCHES] = found[PATCHES].unsqueeze(2)
        found.setdefault(UNUSED, found["ln_final.weight"].new_zeros(1, 1, len(found["ln_final.weight"])))
        return found

    @classmethod
    def own_weights(cls, options: Any) -> tuple[str, Path] | None:
        return ("pretrained_path", options.pretrained_path) if options.pretrained_path else None

    @classmethod
    def merge_weight(cls, options: Any) -> float | None:
        return options.mergeweight if options.mergeclip else None

    def encode_frames(self, frames: Tensor, frame_mask: Tensor, places: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """frames uint8 or float [V, T, 3, S, S], frame_mask bool [V, T] -> frames [V, T, D], videos [V, D], not unit.

        What padding holds does not matter; its features are zeros. Under ``conventions.read_padding`` it is read as
        frames of normalised zeros (the mean colour) and counts in everything, as in InternVideo, frame features
        included; clips are first filled to ``source_frames`` (its loaders fill to --max_frames), so that the result
        does not depend on the batch. Raises ValueError for a wrong image side or an empty clip.
        """
        slots = self.check_frames(frames, frame_mask, places)
        if self.conventions.read_padding:
            missing = max(self.conventions.source_frames - frames.shape[1], 0)
            read = self.normalize(frames).masked_fill(~frame_mask[..., None, None, None], 0)
            read = torch.cat([read, read.new_zeros(len(read), missing, *read.shape[2:])], dim=1)
            everywhere = torch.arange(read.shape[0] * read.shape[1], device=read.device)
            slots = packed = Slots(torch.ones_like(read[:, :, 0, 0, 0], dtype=torch.bool), everywhere)
            read = read.flatten(0, 1)
        else:
            read, packed = self.normalize(slots.take(frames)), pack(slots)
        videos, features = (self.visual_ln_post(x) @ self.visual_proj for x in self.visual(read, packed))
        return slots.fill(features), videos

    def without_gradient(self, reads_tokens: bool, reads_whole: bool) -> tuple[str, ...]:
        return (("text_projection",) if reads_tokens else ()) + (() if reads_whole else self.own_parts)
