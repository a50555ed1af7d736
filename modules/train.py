"""The training loop: epochs of steps, an evaluation and a checkpoint after each."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader

from modules.build import checkpoint_tensors
from modules.checkpoints import CheckpointError, save_checkpoint
from modules.distributed import World, barrier, gather_objects
from modules.evaluate import Evaluation, autocast, format_metrics
from modules.files import write_whole
from modules.model import VideoTextModel
from modules.optim import BertAdam, parameter_groups
from modules.options import TrainOptions
from modules.progress import log, progress
from modules.results import read_history, write_history

LAST, SELECTED, HISTORY = "checkpoint_last.pt", "pytorch_model.bin", "history.jsonl"


class TrainingError(RuntimeError):
    """Training cannot go on; the message says at which step and with which clips."""


@dataclass
class Progress:
    """Where a run stands: the next epoch and the best score so far."""

    epoch: int = 0
    best_score: float = -math.inf
    best_epoch: int = -1


def build_optimizer(model: VideoTextModel, options: TrainOptions, compat: str, total_steps: int) -> BertAdam:
    """BertAdam with the settings of CLIP4Clip over the four parameter groups."""
    groups = parameter_groups(model, options.lr, options.coef_lr, options.weight_decay, compat)
    return BertAdam(
        groups, lr=options.lr, warmup=options.warmup_proportion, schedule="warmup_cosine", t_total=total_steps,
        betas=(0.9, 0.98), eps=1e-6, weight_decay=options.weight_decay, max_grad_norm=1.0,
    )  # fmt: skip


@dataclass
class Trainer:
    """A model in training and all that one step needs."""

    model: VideoTextModel
    optimizer: BertAdam
    world: World
    precision: str
    max_grad_norm: float
    seed: int = 0

    def __post_init__(self) -> None:
        self.scaler = torch.amp.GradScaler(self.world.device.type, enabled=self.precision == "fp16")
        device_ids = [self.world.device.index] if self.world.device.type == "cuda" else None
        self.wrapped: nn.Module = self.model
        if self.world.size > 1:
            self.wrapped = DistributedDataParallel(self.model, device_ids=device_ids)

    def rates(self) -> list[float]:
        """Learning rates of the next step, one per parameter group that has parameters."""
        groups = self.optimizer.param_groups
        return [rate for rate, group in zip(self.optimizer.current_lrs(), groups) if group["params"]]

    def step(self, batch: Any) -> tuple[float, float]:
        """One optimiser step on a batch of pairs: (loss, gradient norm before clipping).

        Order as in CLIP4Clip: backward, clip the global norm, update, clamp the logit scale.
        """
        device = self.world.device
        # From the number of the step: the same on every rank, and the same again after a resume.
        draws = torch.Generator().manual_seed(self.seed * 1_000_003 + self.optimizer.steps_taken())
        tensors = (batch.token_ids, batch.token_mask, batch.frames, batch.frame_mask)
        with autocast(device, self.precision):
            loss = self.wrapped(*(x.to(device, non_blocking=True) for x in tensors), generator=draws)
        value = loss.item()
        if not math.isfinite(value):
            raise TrainingError(f"loss is {value}; the clips of this batch: {', '.join(batch.video_ids)}")
        self.scaler.scale(loss).backward()
        self.scaler.unscale_(self.optimizer)
        norm = nn.utils.clip_grad_norm_(self.model.parameters(), self.max_grad_norm).item()
        self.scaler.step(self.optimizer)
        self.scaler.update()
        self.optimizer.zero_grad(set_to_none=True)
        self.model.clamp_logit_scale()
        return value, norm


def train_epoch(trainer: Trainer, loader: DataLoader, epoch: int, n_display: int) -> dict[str, Any]:
    """All batches of one epoch; returns its line for history.jsonl. Unreadable clips are dropped and counted."""
    trainer.model.train()
    loader.batch_sampler.epoch = epoch
    began, losses, dropped = time.perf_counter(), [], set()
    is_main = trainer.world.is_main
    for step, batch in enumerate(progress(loader, f"epoch {epoch + 1}", enabled=is_main), start=1):
        for failure in batch.failures:
            log.warning("dropped from training: %s", failure.message)
            dropped.add(failure.video_id)
        if min(gather_objects(len(batch.index))) == 0:
            continue  # a rank without a single readable clip: all ranks leave this batch out together
        loss, norm = trainer.step(batch)
        losses.append(loss)
        if step % n_display == 0 or step == len(loader):
            rates = ", ".join(f"{lr:.2e}" for lr in dict.fromkeys(trainer.rates()))
            log.info("epoch %d step %d/%d  loss %.4f  gradient norm %.2f  lr %s",
                     epoch + 1, step, len(loader), loss, norm, rates)  # fmt: skip
    if not losses:
        raise TrainingError(f"epoch {epoch + 1}: not one training clip could be read")
    everywhere = set().union(*gather_objects(dropped))
    return {
        "epoch": epoch, "loss": sum(losses) / len(losses), "last_loss": losses[-1], "steps": len(losses),
        "lr": trainer.rates(), "logit_scale": trainer.model.clip.logit_scale.exp().item(),
        "dropped_videos": sorted(everywhere), "seconds": round(time.perf_counter() - began, 2),
    }  # fmt: skip


def save_last(folder: Path, trainer: Trainer, state: Progress, options: dict[str, Any]) -> None:
    """checkpoint_last.pt: what --resume_model needs to go on after this epoch."""
    content = {
        "model": checkpoint_tensors(trainer.model), "optimizer": trainer.optimizer.state_dict(),
        "scaler": trainer.scaler.state_dict(), "progress": vars(state), "options": options,
    }  # fmt: skip
    write_whole(folder / LAST, lambda file: torch.save(content, file))


def load_last(path: Path) -> dict[str, Any]:
    """Read a checkpoint_last.pt. Raises CheckpointError for anything else."""
    if not path.is_file():
        raise CheckpointError(f"--resume_model {path}: no such file; it takes the checkpoint_last.pt of a run")
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:
        raise CheckpointError(f"--resume_model {path} cannot be read ({error}); give a checkpoint_last.pt") from error
    if not isinstance(content, dict) or not {"model", "optimizer", "progress", "options"} <= content.keys():
        raise CheckpointError(f"--resume_model {path} is not a checkpoint_last.pt; for plain weights give --init_model")
    return content


# Options that decide what is learned: a resumed run must have them as the interrupted one had.
_BINDING = ("datatype", "sim_header", "cross_num_hidden_layers", "linear_patch", "interaction", "wti_arch", "cdcr",
            "cdcr_alpha1", "cdcr_alpha2", "cdcr_lambda", "clip_evl", "compat", "epochs", "batch_size", "lr", "coef_lr",
            "warmup_proportion", "weight_decay", "freeze_layer_num", "max_grad_norm", "max_frames", "max_words",
            "feature_framerate", "frame_rule", "slice_framepos", "train_frame_order", "expand_msrvtt_sentences",
            "seed", "decoder", "precision")  # fmt: skip


def resume(
    content: dict[str, Any], trainer: Trainer, options: dict[str, Any], load: Callable[[dict], None]
) -> Progress:
    """Put a run back where `content` left it. Raises CheckpointError when options that matter differ."""
    before = content["options"]
    changed = [f"--{k} {before.get(k)} -> {options[k]}" for k in _BINDING if before.get(k) != options[k]]
    if changed:
        raise CheckpointError(f"--resume_model: the run was made with other options: {'; '.join(changed)}")
    load(content["model"])
    trainer.optimizer.load_state_dict(content["optimizer"])
    trainer.scaler.load_state_dict(content["scaler"])
    return Progress(**content["progress"])


def train(
    trainer: Trainer,
    loader: DataLoader,
    evaluate_epoch: Callable[[], Evaluation],
    options: TrainOptions,
    folder: Path,
    state: Progress,
    record: dict[str, Any],
    sidecar: dict[str, Any],
) -> Progress:
    """Train from `state` to the last epoch; the epoch with the best text-to-video R@1 is kept as pytorch_model.bin.

    `record` are the options to store for a resume; `sidecar` goes beside the weights.
    """
    is_main = trainer.world.is_main
    history = read_history(folder / HISTORY, state.epoch)
    for epoch in range(state.epoch, options.epochs):
        # Dropout draws from torch's global generator. Seeded per epoch and rank, a resumed run draws as a whole one.
        torch.manual_seed(trainer.seed * 1_000_003 + epoch * trainer.world.size + trainer.world.rank)
        line = train_epoch(trainer, loader, epoch, options.n_display)
        evaluation = evaluate_epoch()
        score = evaluation.metrics["raw"]["t2v"]["R@1"]
        log.info("epoch %d/%d: loss %.4f, %.0f s, evaluation %.0f s\n%s", epoch + 1, options.epochs, line["loss"],
                 line["seconds"], evaluation.seconds, format_metrics(evaluation.metrics))  # fmt: skip
        state.epoch = epoch + 1
        better = score >= state.best_score
        if better:
            state.best_score, state.best_epoch = score, epoch
        if is_main:
            if better:
                made = sidecar | {"epoch": epoch, "score": score}
                save_checkpoint(folder / SELECTED, checkpoint_tensors(trainer.model), made)
            history.append(line | {"evaluated_on": evaluation.split.name, "metrics": evaluation.metrics})
            write_history(folder / HISTORY, history)
            save_last(folder, trainer, state, record)
        barrier()
    log.info("best epoch %d: text-to-video R@1 %.1f", state.best_epoch + 1, state.best_score)
    return state
