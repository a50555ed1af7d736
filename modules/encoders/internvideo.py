"""InternVideo's video tower (`--clip_evl`): CLIP's ViT on every frame and a global temporal decoder over all of them.

After each of the last blocks a depth-wise 3x3x3 position convolution is added to the patch tokens, and by
cross-attention one temporal class token reads every token of the clip (EVL, arXiv 2208.03550; UniFormerV2,
arXiv 2211.09552; InternVideo, arXiv 2212.03191). Parameters carry InternVideo's names, so its state dicts load as they
stand.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from checkpoints.files import CheckpointError
from checkpoints.names import CLIP_PREFIX
from checkpoints.read import ClipSizes, clip_sizes
from modules.encoders.clip import CLIP, Mlp, SelfAttention, Transformer

USUAL_DECODERS = 4  # in every InternVideo model, for every size of ViT
PATCH_WEIGHT = f"{CLIP_PREFIX}visual.conv1.weight"


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


class VideoCLIP(CLIP):
    """CLIP whose image tower is InternVideo's video tower; the text tower is CLIP's."""

    def __init__(self, sizes: VideoClipSizes, activation: str) -> None:
        super().__init__(replace(sizes, vision_layers=0), activation)  # no image blocks: the video tower replaces them
        self.sizes = sizes
        self.visual = VideoTower(sizes, activation)
        self.visual_ln_post = nn.LayerNorm(sizes.vision_width)
        self.visual_proj = nn.Parameter(sizes.vision_width**-0.5 * torch.randn(sizes.vision_width, sizes.embed_dim))
        # InternVideo's files hold it for a pre-training task; nothing reads it, so nothing trains it either.
        self.text_mask_embedding = nn.Parameter(torch.zeros(1, 1, sizes.text_width), requires_grad=False)

    def text_tokens_unprojected(self, token_ids: Tensor) -> Tensor:
        """token_ids int64 [N, L] -> tokens [N, L, text width] after ``ln_final``, not multiplied by text_projection.

        InternVideo's token-wise interaction compares these with the frames, which works where both are equally wide.
        """
        length = token_ids.shape[1]
        if length > self.sizes.context_length:
            raise ValueError(f"--max_words {length} exceeds the model's context of {self.sizes.context_length} tokens")
        x = self.token_embedding(token_ids) + self.positional_embedding[:length]
        return self.ln_final(self.transformer(x, causal=True))

    def text_tokens(self, token_ids: Tensor) -> Tensor:
        """token_ids int64 [N, L] -> projected tokens [N, L, D]."""
        return self.text_tokens_unprojected(token_ids) @ self.text_projection

    def encode_image(self, images: Tensor) -> Tensor:
        """images uint8 or float [B, 3, S, S] -> [B, D], each as a clip of one frame; not unit length."""
        return self.encode_video(images[:, None], torch.ones(len(images), 1, dtype=torch.bool, device=images.device))[0]

    def encode_video(
        self, frames: Tensor, frame_mask: Tensor, source_padding: bool = False, source_frames: int = 0
    ) -> tuple[Tensor, Tensor]:
        """frames uint8 or float [V, T, 3, S, S], frame_mask bool [V, T] -> videos [V, D], frames [V, T, D], not unit.

        Frames that the mask leaves out take no part, whatever they hold: a clip gives what it gives without them, and
        their own features are zeros. With `source_padding` they are read as frames of normalised zeros (the mean
        colour) and take part in everything, as in InternVideo; clips are first filled to `source_frames` (its loaders
        fill to --max_frames), so that the result does not depend on the batch. The frame features then cover the
        padding as well: T is at least `source_frames`. Raises ValueError for a wrong image side or an empty clip.
        """
        side = self.sizes.image_resolution
        if frames.shape[-2:] != (side, side):
            raise ValueError(f"this CLIP takes frames of {side}x{side} pixels, got {tuple(frames.shape[-2:])}")
        empty = (~frame_mask.any(dim=1)).nonzero().flatten().tolist()
        if empty:
            raise ValueError(f"clips without a single frame in the batch, at {empty}: drop them before the model")
        if source_padding:
            return self._encode_with_padding(frames, frame_mask, max(source_frames - frames.shape[1], 0))
        lengths = frame_mask.sum(dim=1, keepdim=True)
        # Packed to the front: to the convolution over time a frame's neighbours are its clip's other real frames.
        packed = Slots.of(torch.arange(frames.shape[1], device=lengths.device) < lengths)
        videos, features = self._project(self.normalize(frames[frame_mask]), packed)
        return videos, Slots.of(frame_mask).fill(features)

    def _encode_with_padding(self, frames: Tensor, frame_mask: Tensor, missing: int) -> tuple[Tensor, Tensor]:
        frames = self.normalize(frames).masked_fill(~frame_mask[..., None, None, None], 0)
        frames = torch.cat([frames, frames.new_zeros(len(frames), missing, *frames.shape[2:])], dim=1)
        slots = Slots(torch.ones(frames.shape[:2], dtype=torch.bool, device=frames.device), None)
        videos, features = self._project(frames.flatten(0, 1), slots)
        return videos, slots.fill(features)

    def _project(self, frames: Tensor, slots: Slots) -> tuple[Tensor, Tensor]:
        videos, features = self.visual(frames, slots)
        return self.visual_ln_post(videos) @ self.visual_proj, self.visual_ln_post(features) @ self.visual_proj


def video_clip_sizes(tensors: Mapping[str, Tensor]) -> VideoClipSizes:
    """Sizes of the tower in `tensors` (canonical names, 5-D patch weights). CheckpointError for other shapes.

    The decoders stand after the last blocks, one each: as many as the weights have, else (plain CLIP) four.
    """
    patches = tensors.get(PATCH_WEIGHT)
    if patches is None or patches.ndim != 5 or patches.shape[2] != 1:
        found = "is missing" if patches is None else f"has shape {list(patches.shape)}"
        raise CheckpointError(f"{PATCH_WEIGHT} {found}: not the patches [width, 3, 1, p, p] of a video tower")
    plain = clip_sizes({**tensors, PATCH_WEIGHT: patches.squeeze(2)})
    layers = plain.vision_layers
    decoder = f"{CLIP_PREFIX}visual.transformer.dec."
    decoders = len({key[len(decoder) :].split(".")[0] for key in tensors if key.startswith(decoder)})
    decoders = decoders or min(USUAL_DECODERS, layers)
    if decoders > layers:
        raise CheckpointError(f"the video tower has {decoders} temporal decoders for {layers} blocks; at most one each")
    return VideoClipSizes(**vars(plain), read_after=tuple(range(layers - decoders, layers)))
