"""CLIP's two towers (Radford et al., arXiv 2103.00020): a ViT for images and a causal transformer for text.

Batch first, attention through ``scaled_dot_product_attention``. Parameters carry the names of OpenAI's release
(``visual.transformer.resblocks.0.attn.in_proj_weight`` ...), so a released state dict loads as it stands.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from checkpoints.read import ClipSizes

IMAGE_MEAN = (0.48145466, 0.4578275, 0.40821073)
IMAGE_STD = (0.26862954, 0.26130258, 0.27577711)


class QuickGELU(nn.Module):
    """``x * sigmoid(1.702 x)``: the activation OpenAI trained its CLIP models with."""

    def forward(self, x: Tensor) -> Tensor:
        return x * torch.sigmoid(1.702 * x)


ACTIVATIONS: dict[str, type[nn.Module]] = {"quick_gelu": QuickGELU, "gelu": nn.GELU}


class SelfAttention(nn.Module):
    """Multi-head self-attention with the parameter names of ``nn.MultiheadAttention``."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.in_proj_weight = nn.Parameter(torch.empty(3 * width, width))
        self.in_proj_bias = nn.Parameter(torch.zeros(3 * width))
        self.out_proj = nn.Linear(width, width)
        nn.init.normal_(self.in_proj_weight, std=width**-0.5)

    def forward(self, x: Tensor, mask: Tensor | None = None, causal: bool = False) -> Tensor:
        """x [B, L, W]; mask bool, broadcastable to [B, heads, L, L], True where a key may be attended."""
        batch, length, width = x.shape
        qkv = F.linear(x, self.in_proj_weight, self.in_proj_bias)
        q, k, v = qkv.view(batch, length, 3, self.heads, width // self.heads).permute(2, 0, 3, 1, 4)
        out = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=causal)
        return self.out_proj(out.transpose(1, 2).reshape(batch, length, width))


class Mlp(nn.Module):
    def __init__(self, width: int, activation: str) -> None:
        super().__init__()
        self.c_fc = nn.Linear(width, 4 * width)
        self.act = ACTIVATIONS[activation]()
        self.c_proj = nn.Linear(4 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        return self.c_proj(self.act(self.c_fc(x)))


class Block(nn.Module):
    """Pre-norm residual block: attention, then MLP."""

    def __init__(self, width: int, heads: int, activation: str, eps: float = 1e-5) -> None:
        super().__init__()
        self.ln_1 = nn.LayerNorm(width, eps=eps)
        self.attn = SelfAttention(width, heads)
        self.ln_2 = nn.LayerNorm(width, eps=eps)
        self.mlp = Mlp(width, activation)

    def forward(self, x: Tensor, mask: Tensor | None = None, causal: bool = False) -> Tensor:
        x = x + self.attn(self.ln_1(x), mask, causal)
        return x + self.mlp(self.ln_2(x))


class Transformer(nn.Module):
    """A stack of :class:`Block`; x [B, L, W] -> [B, L, W].

    With `checkpointing` set, a block keeps only its input for the backward pass and computes the rest again there.
    """

    checkpointing = False

    def __init__(self, width: int, layers: int, heads: int, activation: str, eps: float = 1e-5) -> None:
        super().__init__()
        self.resblocks = nn.ModuleList(Block(width, heads, activation, eps) for _ in range(layers))

    def forward(self, x: Tensor, mask: Tensor | None = None, causal: bool = False) -> Tensor:
        for block in self.resblocks:
            if self.checkpointing and torch.is_grad_enabled():
                x = checkpoint(block, x, mask, causal, use_reentrant=False)
            else:
                x = block(x, mask, causal)
        return x


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

    def patches(self, images: Tensor) -> Tensor:
        """images float [B, 3, S, S] -> embedded patches [B, P, width]; with `temporal_patch` clips of one frame."""
        if self.temporal_patch:
            return self.clip_patches(images[:, None])[:, 0]
        return self.conv1(images).flatten(2).transpose(1, 2)

    def clip_patches(self, clips: Tensor) -> Tensor:
        """clips float [V, T, 3, S, S], zeros at padding as beyond the ends -> [V, T, P, width] by `conv2`."""
        return self.conv2(clips.transpose(1, 2)).flatten(3).permute(0, 2, 3, 1)

    def tokens(self, images: Tensor) -> Tensor:
        """images float [B, 3, S, S] -> tokens [B, 1 + P, width] before ``ln_post`` and projection; CLS first."""
        return self.attend(self.patches(images))

    def attend(self, patches: Tensor) -> Tensor:
        """Embedded patches [B, P, width] -> tokens [B, 1 + P, width]."""
        cls = self.class_embedding.to(patches.dtype).expand(len(patches), 1, -1)
        x = torch.cat([cls, patches], dim=1) + self.positional_embedding.to(patches.dtype)
        return self.transformer(self.ln_pre(x))

    def feature(self, tokens: Tensor) -> Tensor:
        """tokens [B, 1 + P, width] -> features [B, D], not unit length."""
        return self.ln_post(tokens[:, 0]) @ self.proj

    def forward(self, images: Tensor) -> Tensor:
        """images float [B, 3, S, S], normalised -> image features [B, D], not unit length."""
        return self.feature(self.tokens(images))


def centred_in_time(patch_weight: Tensor) -> Tensor:
    """Start of `conv2` from `conv1`: [W, 3, P, P] -> [W, 3, 3, P, P], the middle frame only, as CLIP4Clip does."""
    start = patch_weight.new_zeros(*patch_weight.shape[:2], 3, *patch_weight.shape[2:])
    start[:, :, 1] = patch_weight
    return start


class CLIP(nn.Module):
    """Both towers and the logit scale; ``sizes`` says how big, ``activation`` which MLP non-linearity.

    `temporal_patch`: see :class:`ImageTower`.
    """

    def __init__(self, sizes: ClipSizes, activation: str, temporal_patch: bool = False) -> None:
        super().__init__()
        if activation not in ACTIVATIONS:
            raise ValueError(f"--activation must be one of {', '.join(ACTIVATIONS)}, got {activation!r}")
        self.sizes, self.activation = sizes, activation
        self.visual = ImageTower(sizes, activation, temporal_patch)
        self.transformer = Transformer(sizes.text_width, sizes.text_layers, sizes.text_heads, activation)
        self.token_embedding = nn.Embedding(sizes.vocab_size, sizes.text_width)
        self.positional_embedding = nn.Parameter(0.01 * torch.randn(sizes.context_length, sizes.text_width))
        self.ln_final = nn.LayerNorm(sizes.text_width)
        self.text_projection = nn.Parameter(sizes.text_width**-0.5 * torch.randn(sizes.text_width, sizes.embed_dim))
        self.logit_scale = nn.Parameter(torch.tensor(1 / 0.07).log())
        nn.init.normal_(self.token_embedding.weight, std=0.02)

    def normalize(self, images: Tensor) -> Tensor:
        """uint8 [..., 3, S, S] in 0..255 -> float32 with CLIP's mean and deviation; float input is taken as done."""
        if images.is_floating_point():
            return images
        std = torch.tensor(IMAGE_STD, device=images.device).view(3, 1, 1)
        mean = torch.tensor(IMAGE_MEAN, device=images.device).view(3, 1, 1)
        # One conversion and two in-place passes: a naive (x / 255 - mean) / std would cost four copies of the clip.
        return images.float().mul_(1 / (255 * std)).sub_(mean / std)

    def encode_image(self, images: Tensor) -> Tensor:
        """images uint8 or float [B, 3, S, S] -> [B, D], not unit length."""
        self.check_side(images)
        return self.visual(self.normalize(images))

    def check_side(self, images: Tensor) -> None:
        """Raises ValueError unless [..., S, S] are the pixels this tower takes."""
        side = self.sizes.image_resolution
        if images.shape[-2:] != (side, side):
            raise ValueError(f"this CLIP takes frames of {side}x{side} pixels, got {tuple(images.shape[-2:])}")

    def encode_frames(self, frames: Tensor, frame_mask: Tensor) -> Tensor:
        """frames uint8 or float [V, T, 3, S, S], frame_mask bool [V, T] -> [V, T, D] float32; zeros at padding.

        Only real frames go through the tower. Raises ValueError for a wrong image side or a clip without any.
        """
        if not frame_mask.any(dim=1).all():
            empty = (~frame_mask.any(dim=1)).nonzero().flatten().tolist()
            raise ValueError(f"clips without a single frame in the batch, at {empty}: drop them before the model")
        if self.visual.temporal_patch:
            self.check_side(frames)
            clips = self.normalize(frames).masked_fill(~frame_mask[..., None, None, None], 0)
            patches = self.visual.clip_patches(clips)[frame_mask]
            features = self.visual.feature(self.visual.attend(patches)).float()
        else:
            features = self.encode_image(frames[frame_mask]).float()
        out = features.new_zeros(*frame_mask.shape, features.shape[-1])
        return out.masked_scatter(frame_mask.unsqueeze(-1), features)

    def text_tokens(self, token_ids: Tensor) -> Tensor:
        """token_ids int64 [N, L], L up to the context length -> projected tokens [N, L, D].

        The mask is causal, so cutting L to the longest caption changes nothing for the tokens that remain.
        """
        length = token_ids.shape[1]
        if length > self.sizes.context_length:
            raise ValueError(f"--max_words {length} exceeds the model's context of {self.sizes.context_length} tokens")
        x = self.token_embedding(token_ids) + self.positional_embedding[:length]
        return self.ln_final(self.transformer(x, causal=True)) @ self.text_projection

    def encode_text(self, token_ids: Tensor) -> Tensor:
        """token_ids int64 [N, L] -> [N, D] at the end-of-text token (the highest id), not unit length."""
        tokens = self.text_tokens(token_ids)
        return tokens[torch.arange(len(tokens), device=tokens.device), token_ids.argmax(dim=-1)]
