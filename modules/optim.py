"""Parameter groups, freezing, BertAdam and its learning-rate schedules."""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Iterable, Iterator

import torch
from torch import Tensor, nn

Schedule = Callable[[float, float], float]
PORTION = 2**25  # numbers updated at once by BertAdam: three temporary copies of 128 MiB each in float32


def warmup_cosine(progress: float, warmup: float) -> float:
    """Linear to 1 at `warmup`, then ``0.5 (1 + cos(pi progress))``.

    As BertAdam has it: the cosine is not re-based, so the factor drops at the end of warm-up, and it rises past 1.
    """
    return progress / warmup if progress < warmup else 0.5 * (1.0 + math.cos(math.pi * progress))


def warmup_constant(progress: float, warmup: float) -> float:
    """Linear to 1 at `warmup`, then 1."""
    return progress / warmup if progress < warmup else 1.0


def warmup_linear(progress: float, warmup: float) -> float:
    """Linear to 1 at `warmup`, then linear to 0 at the end; with warm-up -1 it starts at one half, as BertAdam does."""
    return progress / warmup if progress < warmup else max((progress - 1.0) / (warmup - 1.0), 0.0)


SCHEDULES: dict[str, Schedule] = {
    "warmup_cosine": warmup_cosine,
    "warmup_constant": warmup_constant,
    "warmup_linear": warmup_linear,
}


class BertAdam(torch.optim.Optimizer):
    """The Adam of BERT and CLIP4Clip: decoupled weight decay, no bias correction, each tensor's gradient clipped.

    update = m / (sqrt(v) + eps) + weight_decay * p;  p -= lr * schedule(step / t_total) * update

    `t_total` -1 keeps the rate constant; `max_grad_norm` -1 turns the per-tensor clipping off. A parameter without a
    gradient is left alone.
    """

    def __init__(
        self,
        params: Iterable,
        lr: float,
        warmup: float = -1,
        t_total: float = -1,
        schedule: str = "warmup_linear",
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-6,
        weight_decay: float = 0.01,
        max_grad_norm: float = 1.0,
    ) -> None:
        if schedule not in SCHEDULES:
            raise ValueError(f"unknown schedule {schedule!r}; known: {', '.join(SCHEDULES)}")
        if not (warmup == -1 or 0 <= warmup < 1):
            raise ValueError(f"--warmup_proportion must be in [0, 1) or -1, got {warmup}")
        super().__init__(
            params,
            {
                "lr": lr,
                "warmup": warmup,
                "t_total": t_total,
                "schedule": schedule,
                "betas": betas,
                "eps": eps,
                "weight_decay": weight_decay,
                "max_grad_norm": max_grad_norm,
            },
        )

    @staticmethod
    def scheduled_lr(group: dict, step: int) -> float:
        """The rate that the step with count `step` (from 0) uses in this group."""
        if group["t_total"] == -1:
            return group["lr"]
        return group["lr"] * SCHEDULES[group["schedule"]](step / group["t_total"], group["warmup"])

    def current_lrs(self) -> list[float]:
        """The rate of the next step, one per group; a group without parameters counts its steps from 0."""
        steps = [max((self.state[p].get("step", 0) for p in g["params"]), default=0) for g in self.param_groups]
        return [self.scheduled_lr(group, step) for group, step in zip(self.param_groups, steps)]

    def steps_taken(self) -> int:
        """Steps of the parameter that has had the most."""
        return max((state.get("step", 0) for state in self.state.values()), default=0)

    @torch.no_grad()
    def step(self, closure: None = None) -> None:
        for group in self.param_groups:
            with_gradient = [p for p in group["params"] if p.grad is not None]
            for p in with_gradient:
                if not self.state[p]:
                    self.state[p] |= {"step": 0, "next_m": torch.zeros_like(p), "next_v": torch.zeros_like(p)}
            for count in sorted({self.state[p]["step"] for p in with_gradient}):
                same = [p for p in with_gradient if self.state[p]["step"] == count]
                for some in _portions(same):
                    self._update(some, group, self.scheduled_lr(group, count))

    def _update(self, params: list[Tensor], group: dict, lr: float) -> None:
        """One step of `params`, all tensors at once: a few kernels in place of a dozen for every tensor."""
        grads = [p.grad for p in params]
        m, v = ([self.state[p][name] for p in params] for name in ("next_m", "next_v"))
        if group["max_grad_norm"] > 0:
            # Scaled into copies: the caller's gradients stay as they were, for logging.
            norms = torch.stack(torch._foreach_norm(grads)).add_(1e-6)
            grads = torch._foreach_mul(grads, list((group["max_grad_norm"] / norms).clamp_(max=1.0).unbind()))
        beta1, beta2 = group["betas"]
        torch._foreach_mul_(m, beta1)
        torch._foreach_add_(m, grads, alpha=1 - beta1)
        torch._foreach_mul_(v, beta2)
        torch._foreach_addcmul_(v, grads, grads, value=1 - beta2)
        divisor = torch._foreach_sqrt(v)
        torch._foreach_add_(divisor, group["eps"])
        update = torch._foreach_div(m, divisor)
        if group["weight_decay"] > 0:
            torch._foreach_add_(update, params, alpha=group["weight_decay"])
        torch._foreach_add_(params, update, alpha=-lr)
        for p in params:
            self.state[p]["step"] += 1


def _portions(params: list[Tensor]) -> Iterator[list[Tensor]]:
    """`params` in runs of at most PORTION numbers (or one tensor): bounds the temporary copies of an update."""
    run: list[Tensor] = []
    for p in params:
        if run and sum(q.numel() for q in run) + p.numel() > PORTION:
            yield run
            run = []
        run.append(p)
    if run:
        yield run


def parameter_name(name: str) -> str:
    """A parameter's name in checkpoints: heads are stored without ``head.`` and ``temporal.`` of the module tree."""
    return name.removeprefix("head.").removeprefix("temporal.")


def is_decayed(name: str, parameter: Tensor, compat: str) -> bool:
    """Whether weight decay applies to a parameter.

    By meaning: weight matrices and convolutions only. Under ``--compat`` as in the sources: all but biases, so that
    LayerNorm weights, embeddings, positional tables and the logit scale decay as well.
    """
    if compat != "none":
        return "bias" not in name
    return parameter.ndim >= 2 and not any(part in name for part in ("embedding", "bias"))


def parameter_groups(
    model: nn.Module, lr: float, coef_lr: float, weight_decay: float, compat: str, new: Collection[str] = ()
) -> list[dict[str, object]]:
    """Four groups: decayed CLIP, decayed rest, other CLIP, other rest; CLIP learns at ``lr * coef_lr``.

    Each has ``params``, ``names``, ``lr`` and ``weight_decay``. Frozen parameters are left out. `new`: names under
    ``clip.`` that count as the rest, because they start from nothing.
    """
    groups: dict[tuple[bool, bool], dict[str, object]] = {}
    for decay in (True, False):
        for clip in (True, False):
            groups[decay, clip] = {
                "params": [],
                "names": [],
                "lr": lr * coef_lr if clip else lr,
                "weight_decay": weight_decay if decay else 0.0,
            }
    for full_name, parameter in model.named_parameters():
        name = parameter_name(full_name)
        if parameter.requires_grad:
            group = groups[is_decayed(name, parameter, compat), name.startswith("clip.") and name not in new]
            group["params"].append(parameter)
            group["names"].append(name)
    return list(groups.values())


STEM = (
    "positional_embedding",
    "token_embedding.weight",
    "visual.class_embedding",
    "visual.positional_embedding",
    "visual.conv1.weight",
    "visual.ln_pre.weight",
    "visual.ln_pre.bias",
)


def freeze(clip: nn.Module, num_layers: int) -> list[str]:
    """``--freeze_layer_num``: -1 trains all of CLIP; n >= 0 freezes what comes before block n in both towers.

    Frozen are the embeddings, positional tables, patch projection and first LayerNorm, and the first n blocks of each
    tower. The blocks from n on, the last LayerNorms, the projections and the logit scale train, as do the heads.
    Returns the names that were frozen.
    """
    depth = max(len(clip.visual.transformer.resblocks), len(clip.transformer.resblocks))
    if not -1 <= num_layers <= depth:
        raise ValueError(f"--freeze_layer_num must be in -1..{depth} for this CLIP, got {num_layers}")
    if num_layers < 0:
        return []
    blocks = tuple(f"{tower}transformer.resblocks.{i}." for tower in ("", "visual.") for i in range(num_layers))
    frozen = []
    for name, parameter in clip.named_parameters():
        if name in STEM or (blocks and name.startswith(blocks)):
            parameter.requires_grad_(False)
            frozen.append(name)
    return frozen
