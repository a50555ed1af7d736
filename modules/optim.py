"""Parameter groups, freezing, BertAdam and its learning-rate schedule."""

import inspect
import math
from collections.abc import Collection, Iterable
from itertools import product
from typing import Any

import torch
from torch import Tensor, nn

from modules.encoders.base import Encoder

PORTION = 2**25  # numbers updated at once by BertAdam, which bounds its four temporary copies: 128 MiB each in float32


def warmup_cosine(progress: float, warmup: float) -> float:
    """Linear to 1 at `warmup`, then ``0.5 (1 + cos(pi progress))``.

    As BertAdam has it: the cosine is not re-based, so the factor drops at the end of warm-up, and it rises past 1.
    """
    return progress / warmup if progress < warmup else 0.5 * (1.0 + math.cos(math.pi * progress))


class BertAdam(torch.optim.Optimizer):
    """The Adam of BERT and CLIP4Clip: decoupled weight decay, no bias correction, each tensor's gradient clipped.

    update = m / (sqrt(v) + eps) + weight_decay * p;  p -= lr * schedule(step / t_total) * update

    `t_total` -1 keeps the rate constant, `max_grad_norm` -1 does not clip. What has no gradient is left alone.
    """

    _fused: Any = None  # bert_adam, compiled
    schedule = staticmethod(warmup_cosine)  # (progress, warm-up) -> factor

    def __init__(
        self,
        params: Iterable,
        lr: float,
        warmup: float = -1,
        t_total: float = -1,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-6,
        weight_decay: float = 0.01,
        max_grad_norm: float = 1.0,
    ) -> None:
        settings = {"warmup": warmup, "t_total": t_total, "betas": betas, "eps": eps, "max_grad_norm": max_grad_norm}
        super().__init__(params, {"lr": lr, "weight_decay": weight_decay, **settings})

    def scheduled_lr(self, group: dict, step: int) -> float:
        """The rate that the step with count `step` (from 0) uses in this group."""
        if group["t_total"] == -1:
            return group["lr"]
        return group["lr"] * self.schedule(step / group["t_total"], group["warmup"])

    def current_lrs(self) -> list[float]:
        """The rate of the next step, one per group; a group without parameters counts its steps from 0."""
        steps = [max((self.state[p].get("step", 0) for p in g["params"]), default=0) for g in self.param_groups]
        return [self.scheduled_lr(group, step) for group, step in zip(self.param_groups, steps)]

    def steps_taken(self) -> int:
        """Steps of the parameter that has had the most."""
        return max((state.get("step", 0) for state in self.state.values()), default=0)

    def compile(self, **how: Any) -> None:
        """Update float32 numbers by kernels that torch.compile fuses: a quarter of the memory traffic.

        Equal but for the last bit, as a fused product and sum round once. how: options of torch.compile.
        """
        self._fused = torch.compile(bert_adam, dynamic=False, **how)

    @torch.no_grad()
    def step(self, closure: None = None) -> None:
        for group in self.param_groups:
            portions: dict[tuple, list[Tensor]] = {}  # of equal step count and type, about PORTION numbers each
            numbers = 0
            for p in group["params"]:
                if p.grad is not None:
                    if not self.state[p]:
                        self.state[p] |= {"step": 0, "next_m": torch.zeros_like(p), "next_v": torch.zeros_like(p)}
                    portion = numbers // PORTION if self._fused is None else 0  # fused, it makes no copies
                    portions.setdefault((self.state[p]["step"], p.dtype, portion), []).append(p)
                    numbers += p.numel()
            for (count, dtype, _), params in portions.items():
                m, v = ([self.state[p][name] for p in params] for name in ("next_m", "next_v"))
                lr: Any = self.scheduled_lr(group, count)
                update = bert_adam
                if self._fused is not None and dtype == torch.float32:
                    # As a tensor: a number would be compiled in, and it differs in every step.
                    update, lr = self._fused, torch.full((), lr, device=params[0].device)
                constants = (*group["betas"], group["eps"], group["weight_decay"], group["max_grad_norm"])
                update(params, [p.grad for p in params], m, v, lr, *constants)
                for p in params:
                    self.state[p]["step"] += 1


def bert_adam(
    params: list[Tensor],
    grads: list[Tensor],
    m: list[Tensor],
    v: list[Tensor],
    lr: float | Tensor,
    beta1: float,
    beta2: float,
    eps: float,
    weight_decay: float,
    max_grad_norm: float,
) -> None:
    """One step of `params`, all tensors at once: a few kernels in place of a dozen for every tensor."""
    if max_grad_norm > 0:
        # Scaled into copies: the caller's gradients stay as they were, for logging.
        norms = torch.stack(torch._foreach_norm(grads)).add_(1e-6)
        grads = torch._foreach_mul(grads, list((max_grad_norm / norms).clamp_(max=1.0).unbind()))
    _scale(m, beta1)
    torch._foreach_add_(m, grads, alpha=1 - beta1)
    _scale(v, beta2)
    torch._foreach_addcmul_(v, grads, grads, value=1 - beta2)
    divisor = torch._foreach_sqrt(v)
    torch._foreach_add_(divisor, eps)
    update = torch._foreach_div(m, divisor)
    if weight_decay > 0:
        torch._foreach_add_(update, torch._foreach_mul(params, weight_decay))
    # Products apart from sums: in float16 their rounding is a part of CLIP4Clip's results.
    _scale(update, lr)
    torch._foreach_sub_(params, update)


# Less the guard against torch.compile of optimisers, whose first call imports torch._dynamo: that takes seconds.
for _name in ("add_param_group", "zero_grad", "state_dict", "load_state_dict"):
    setattr(BertAdam, _name, inspect.unwrap(getattr(torch.optim.Optimizer, _name)))


def _scale(tensors: list[Tensor], factor: float | Tensor) -> None:
    """In place. One by one in float16, in which torch._foreach_mul_ rounds the factor as well on the CPU."""
    if tensors[0].dtype == torch.float16:
        for tensor in tensors:
            tensor.mul_(factor)
    else:
        torch._foreach_mul_(tensors, factor)


def parameter_groups(
    named: Iterable[tuple[str, nn.Parameter]],
    lr: float,
    coef_lr: float,
    weight_decay: float,
    decays_all: bool = False,
    new: Collection[str] = (),
) -> list[dict[str, Any]]:
    """Four groups: decayed CLIP, decayed rest, other CLIP, other rest; CLIP learns at ``lr * coef_lr``.

    named: parameters under their names in checkpoints; frozen ones are left out. Weight matrices and convolutions
    decay; with `decays_all`, as in the source projects, LayerNorm weights, embeddings, positional tables and the logit
    scale too. new: names under ``clip.`` that count as the rest. Groups hold params, names, lr and weight_decay.
    """
    groups: dict[tuple[bool, bool], dict[str, Any]] = {}
    for decay, clip in product((True, False), repeat=2):
        rates = {"lr": lr * coef_lr if clip else lr, "weight_decay": weight_decay if decay else 0.0}
        groups[decay, clip] = {"params": [], "names": [], **rates}
    for name, parameter in named:
        if parameter.requires_grad:
            decay = "bias" not in name and (decays_all or (parameter.ndim >= 2 and "embedding" not in name))
            group = groups[decay, name.startswith("clip.") and name not in new]
            group["params"].append(parameter)
            group["names"].append(name)
    return list(groups.values())


def freeze(encoder: Encoder, num_layers: int) -> list[str]:
    """``--freeze_layer_num``: -1 trains all of the encoder; n >= 0 freezes what comes before block n of each tower.

    Frozen are the embeddings, positional tables, patch projection and first LayerNorm, and the first n blocks. The
    others, the last LayerNorms, the projections and the logit scale train. One more than there are blocks freezes both
    towers as wholes; the logit scale is none of theirs. Returns the names that were frozen.
    """
    every = encoder.blocks + 1
    if not -1 <= num_layers <= every:
        raise ValueError(f"--freeze_layer_num must be in -1..{every} for this CLIP, got {num_layers}")
    frozen = []
    for name, parameter in encoder.named_parameters():
        depth = every if num_layers == every and name != "logit_scale" else encoder.depth(name)
        if depth is not None and depth <= num_layers:
            parameter.requires_grad_(False)
            frozen.append(name)
    return frozen
