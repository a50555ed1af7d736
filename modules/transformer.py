"""The transformer blocks of CLIP, of which encoders and heads are made.

Batch first, attention through ``scaled_dot_product_attention``, parameters under the names of OpenAI's release.
"""

from collections import OrderedDict

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint


class QuickGELU(nn.Module):
    """``x * sigmoid(1.702 x)``: the activation OpenAI trained its CLIP models with."""

    def forward(self, x: Tensor) -> Tensor:
        return x * torch.sigmoid(1.702 * x)


ACTIVATIONS: dict[str, type[nn.Module]] = {"quick_gelu": QuickGELU, "gelu": nn.GELU}


class Attention(nn.Module):
    """Multi-head attention with the parameter names of ``nn.MultiheadAttention``."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.in_proj_weight = nn.Parameter(torch.empty(3 * width, width))
        self.in_proj_bias = nn.Parameter(torch.zeros(3 * width))
        self.out_proj = nn.Linear(width, width)
        nn.init.normal_(self.in_proj_weight, std=width**-0.5)

    def forward(self, x: Tensor, mask: Tensor | None = None, causal: bool = False, y: Tensor | None = None) -> Tensor:
        """x [B, L, W] asks; keys and values are of y [B, K, W], by default of x -> [B, L, W].

        mask: bool, broadcastable to [B, heads, L, K], True where a key may be attended.
        """
        width, weight, bias = x.shape[-1], self.in_proj_weight, self.in_proj_bias
        if y is None:
            parts = F.linear(x, weight, bias).chunk(3, dim=-1)
        else:
            keys_values = F.linear(y, weight[width:], bias[width:])
            parts = F.linear(x, weight[:width], bias[:width]), *keys_values.chunk(2, dim=-1)
        q, k, v = (part.unflatten(-1, (self.heads, -1)).transpose(1, 2) for part in parts)
        out = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=causal)
        return self.out_proj(out.transpose(1, 2).flatten(2))


def mlp(width: int, activation: str) -> nn.Sequential:
    wide, narrow = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)
    return nn.Sequential(OrderedDict(c_fc=wide, gelu=ACTIVATIONS[activation](), c_proj=narrow))


class Block(nn.Module):
    """Pre-norm residual block: attention, then MLP."""

    is_block = True  # --compile compiles each of them

    def __init__(self, width: int, heads: int, activation: str, eps: float = 1e-5) -> None:
        super().__init__()
        self.ln_1 = nn.LayerNorm(width, eps=eps)
        self.attn = Attention(width, heads)
        self.ln_2 = nn.LayerNorm(width, eps=eps)
        self.mlp = mlp(width, activation)

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
