"""--loss sigmoid over two gloo ranks and in pieces: the loss and gradients of one process, for an encoder of open_clip
with a bias of its own and for a CLIP, to which the loss adds one."""

from pathlib import Path

import open_clip_models
import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from test_accumulation import CPU, SIZES, assert_same, make_batch, one_thread  # noqa: F401

from engine.distributed import World
from engine.step import Trainer
from modules.encoders.clip import CLIP
from modules.heads import HEADS
from modules.losses.sigmoid import Sigmoid
from modules.model import VideoTextModel
from modules.optim import BertAdam, parameter_groups

KINDS, SIZE, STEPS = ("siglip", "clip"), 2, 3


def make_model(kind: str, folder: str) -> VideoTextModel:
    torch.manual_seed(1)
    if kind == "clip":
        encoder = CLIP(SIZES, "quick_gelu")
        return VideoTextModel(encoder, HEADS["meanP"](encoder.head_sizes), Sigmoid())
    return open_clip_models.our_model(Path(folder) / "siglip", "--loss", "sigmoid", "--max_words", "12").train()


def batch_for(kind: str, step: int, rank: int, size: int):
    """The clips and captions of test_accumulation; SigLIP's pictures are larger."""
    batch = make_batch(step, rank, size)
    if kind == "siglip":
        batch.frames = batch.frames.repeat(1, 1, 1, 2, 2)
    return batch


def run(kind: str, pieces: int, folder: str, rank: int = 0, size: int = 1) -> dict:
    model = make_model(kind, folder)
    groups = parameter_groups(model.named_parameters(), 1e-3, 0.1, 0.2)
    optimizer = BertAdam(groups, lr=1e-3, warmup=0.1, t_total=100, betas=(0.9, 0.98))
    trainer = Trainer(model, optimizer, World(rank, size, CPU), "fp32", 1.0, pieces)
    loss = trainer.backward(batch_for(kind, 0, rank, size)).item()
    gradients = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
    optimizer.zero_grad(set_to_none=True)
    losses = [trainer.step(batch_for(kind, step, rank, size))[0] for step in range(STEPS)]
    weights = {k: v.clone() for k, v in model.state_dict().items()}
    return {"loss": loss, "gradients": gradients, "losses": losses, "weights": weights}


def one_rank(rank: int, folder: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=SIZE)
    found = {(kind, pieces): run(kind, pieces, folder, rank, SIZE) for kind in KINDS for pieces in (1, 4)}
    torch.save(found, f"{folder}/{rank}.pt")
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    place = tmp_path_factory.mktemp("ranks")
    open_clip_models.save_tiny("ViT-B-16-SigLIP", place / "siglip")
    return place


def test_two_ranks_and_four_pieces_are_one_process(folder):
    mp.spawn(one_rank, (str(folder),), nprocs=SIZE)
    ranks = [torch.load(folder / f"{rank}.pt") for rank in range(SIZE)]
    for kind, bias in zip(KINDS, ("clip.logit_bias", "criterion.sigmoid_bias")):
        want = run(kind, 1, str(folder))
        assert want["gradients"][bias] != 0
        for pieces in (1, 4):
            for found in ranks:
                assert_same(found[kind, pieces], want)
        assert_same(run(kind, 4, str(folder)), want)
