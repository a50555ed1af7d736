"""One batch of 64 in one piece, in 8 pieces, and over 3 processes: the same loss, gradients and weights."""

from types import SimpleNamespace

import pytest
import tiny_models
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import nn

from engine.data import autocast
from engine.distributed import World
from engine.step import NonFiniteError, Trainer, cached_backward, trade
from modules.encoders.clip import CLIP, ClipSizes
from modules.heads import HEADS
from modules.model import VideoTextModel
from modules.optim import BertAdam, parameter_groups

SIZES = ClipSizes(
    embed_dim=32,
    image_resolution=16,
    vision_layers=2,
    vision_width=64,
    patch_size=8,
    context_length=12,
    vocab_size=50,
    text_width=64,
    text_heads=1,
    text_layers=1,
    vision_heads=1,
)
PAIRS, STEPS, CPU = 64, 10, torch.device("cpu")
# Every head that is registered, in one piece for ten steps and in eight for three.
RUNS = [(head, pieces, steps) for head in sorted(HEADS) for pieces, steps in ((1, STEPS), (8, 3))]


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def make_model(head: str) -> VideoTextModel:
    torch.manual_seed(1)
    model = tiny_models.make_model(CLIP(SIZES, "quick_gelu"), head, cross_num_hidden_layers=1)
    model.head.register_parameter("unused", nn.Parameter(torch.ones(3, 3)))  # heads may leave parameters unused
    return model.eval()  # no dropout: ranks draw that of their own texts, one process that of all


def make_batch(step: int, rank: int = 0, size: int = 1) -> SimpleNamespace:
    """Rank's share of the 64 pairs of `step`; with 3 ranks the shares are uneven."""
    generator = torch.Generator().manual_seed(100 + step)
    ids = torch.randint(1, 48, (PAIRS, 12), generator=generator)
    ids[:, -1] = 49
    lengths = torch.randint(1, 4, (PAIRS, 1), generator=generator)
    arrays = {
        "token_ids": ids,
        "token_mask": torch.ones(PAIRS, 12, dtype=torch.bool),
        "frames": torch.randint(0, 256, (PAIRS, 3, 3, 16, 16), generator=generator, dtype=torch.uint8),
        "frame_mask": torch.arange(3)[None] < lengths,
    }
    ids = [f"v{i}" for i in range(PAIRS)]
    return SimpleNamespace(
        **{k: v.tensor_split(size)[rank] for k, v in arrays.items()},
        video_ids=[ids[i] for i in torch.arange(PAIRS).tensor_split(size)[rank]],
    )


def run(head: str, pieces: int, rank: int = 0, size: int = 1, steps: int = STEPS) -> dict:
    """Loss and gradients of the first batch, and the weights after `steps` steps."""
    model = make_model(head)
    optimizer = BertAdam(
        parameter_groups(model.named_parameters(), 1e-3, 0.1, 0.2),
        lr=1e-3,
        warmup=0.1,
        t_total=100,
        betas=(0.9, 0.98),
    )
    trainer = Trainer(model, optimizer, World(rank, size, CPU), "fp32", 1.0, pieces)
    loss = trainer.backward(make_batch(0, rank, size)).item()
    gradients = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
    optimizer.zero_grad(set_to_none=True)
    losses = [trainer.step(make_batch(step, rank, size))[0] for step in range(steps)]
    return {
        "loss": loss,
        "gradients": gradients,
        "losses": losses,
        "weights": {k: v.clone() for k, v in model.state_dict().items()},
    }


def one_rank(rank: int, size: int, folder: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/meet{size}", rank=rank, world_size=size)
    found = {each: run(each[0], each[1], rank, size, each[2]) for each in RUNS}
    torch.save(found, f"{folder}/{size}_{rank}.pt")
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def whole() -> dict[tuple, dict]:
    """Head and steps -> one process, one piece."""
    return {(head, steps): run(head, pieces=1, steps=steps) for head in sorted(HEADS) for steps in (STEPS, 3)}


def assert_same(got: dict, want: dict) -> None:
    """Loss and, per tensor, gradient and weights within 1e-5; a gradient that is zero but for noise is measured
    against the whole gradient."""
    assert got["loss"] == pytest.approx(want["loss"], rel=1e-5)
    assert got["losses"] == pytest.approx(want["losses"], rel=1e-4)
    assert got["gradients"].keys() == want["gradients"].keys()
    total = torch.stack([g.norm() for g in want["gradients"].values()]).norm()
    for name, gradient in want["gradients"].items():
        error = (got["gradients"][name] - gradient).norm()
        assert error <= 1e-5 * max(gradient.norm(), 0.2 * total), name
    for name, weight in want["weights"].items():
        torch.testing.assert_close(got["weights"][name], weight, rtol=1e-5, atol=1e-5)


def test_eight_pieces_are_one_batch(whole):
    for (head, steps), want in whole.items():
        assert "head.unused" not in want["gradients"]
        assert_same(run(head, pieces=8, steps=steps), want)


@pytest.mark.parametrize("size", [3])
def test_ranks_are_one_process(whole, size, tmp_path):
    """Also with pieces within each rank; all ranks hold the same weights."""
    mp.spawn(one_rank, (size, str(tmp_path)), nprocs=size)
    ranks = [torch.load(tmp_path / f"{size}_{rank}.pt") for rank in range(size)]
    for head, pieces, steps in RUNS:
        for found in ranks:
            got = found[head, pieces, steps]
            assert_same(got, whole[head, steps])
            for name, weight in got["weights"].items():
                assert torch.equal(weight, ranks[0][head, pieces, steps]["weights"][name])


def test_pieces_of_their_own_are_not_the_whole_batch(whole):
    """What summing the gradients of 8 small losses would give is far off: the reason for the cached step."""
    model, batch = make_model("meanP"), make_batch(0)
    for ids, mask, frames, frame_mask in zip(
        *(getattr(batch, n).chunk(8) for n in ("token_ids", "token_mask", "frames", "frame_mask"))
    ):
        (model(ids, mask, frames, frame_mask) / 8).backward()
    want = whole["meanP", STEPS]["gradients"]["clip.visual.proj"]
    assert (model.clip.visual.proj.grad - want).norm() > 0.1 * want.norm()


@pytest.mark.parametrize("compiled", [False, True])
def test_checkpointing_and_compiling_change_nothing(whole, monkeypatch, compiled):
    """Traced by torch.compile but run by its plain backend, which needs no minutes of C++ compilation."""
    original = nn.Module.compile
    monkeypatch.setattr(nn.Module, "compile", lambda module: original(module, backend="aot_eager"))
    model = make_model("seqTransf")
    trade(model, CPU, grad_checkpointing=True, compile_blocks=compiled)
    batch = make_batch(0)
    loss = model(batch.token_ids, batch.token_mask, batch.frames, batch.frame_mask)
    loss.backward()
    want = whole["seqTransf", STEPS]
    assert loss.item() == pytest.approx(want["loss"], rel=1e-6)
    got = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    assert got.keys() == want["gradients"].keys()
    for name, gradient in want["gradients"].items():
        torch.testing.assert_close(got[name], gradient, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(("device", "language"), [("cpu", "C\\+\\+"), ("cuda", "C")])
def test_compiling_without_a_compiler_is_refused(monkeypatch, device, language):
    monkeypatch.setenv("PATH", "")
    with pytest.raises(ValueError, match=f"--compile needs a {language} compiler for {device} and none is on PATH"):
        trade(make_model("meanP"), torch.device(device), grad_checkpointing=False, compile_blocks=True)


class Pairwise(nn.Module):
    """A model of another kind: tuples with masks for representations, dropout in the encoders, weights in the loss."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(2)
        self.text, self.video, self.mix = nn.Linear(5, 4), nn.Linear(6, 4), nn.Linear(4, 4)
        self.drop = nn.Dropout(0.5)

    def encode_text(self, x, mask):
        return self.drop(self.text(x)), mask

    def encode_video(self, x, mask, places):
        return self.drop(self.video(x)), mask

    def loss(self, text, video, draws=None, gather=None):
        words = self.mix(text[0]) * text[1][..., None]
        scores = torch.einsum("ntd,vfd->nvtf", words, video[0] * video[1][..., None]).amax(-1).sum(-1)
        return nn.functional.cross_entropy(scores, torch.arange(len(scores)))


def test_tuples_masks_and_dropout():
    """The second pass draws the dropout of the first: the gradient is that of the loss that was reported."""
    generator = torch.Generator().manual_seed(0)
    arrays = [
        torch.randn(7, 3, 5, generator=generator),
        torch.rand(7, 3, generator=generator) > 0.3,
        torch.randn(7, 2, 6, generator=generator),
        torch.arange(2) < torch.randint(1, 3, (7, 1), generator=generator),
    ]
    model = Pairwise()
    torch.manual_seed(9)
    loss = cached_backward(model, arrays, 3, CPU, lambda: autocast(CPU, "fp32"))
    got = {n: p.grad.clone() for n, p in model.named_parameters()}
    after = torch.get_rng_state()
    model.zero_grad()
    torch.manual_seed(9)
    text = model.encode_text(*arrays[:2])  # whole; the videos in pieces
    videos = [model.encode_video(*piece, None) for piece in zip(arrays[2].chunk(3), arrays[3].chunk(3))]
    want = model.loss(text, tuple(map(torch.cat, zip(*videos))))
    want.backward()
    assert loss.item() == pytest.approx(want.item(), rel=1e-6)
    assert torch.equal(after, torch.get_rng_state())
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(got[name], parameter.grad, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("pieces", [1, 4])
def test_a_loss_that_is_not_finite_updates_nothing(pieces):
    model = make_model("meanP")
    optimizer = BertAdam(parameter_groups(model.named_parameters(), 1e-3, 1.0, 0.2), lr=1e-3)
    trainer = Trainer(model, optimizer, World(0, 1, CPU), "fp32", 1.0, pieces)
    batch = make_batch(0)
    batch.frames = batch.frames.float()
    batch.frames[5] = float("inf")
    before = {k: v.clone() for k, v in model.state_dict().items()}
    with pytest.raises(NonFiniteError, match="the loss is nan") as caught:
        trainer.step(batch)
    assert caught.value.video_ids == batch.video_ids
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
    assert not optimizer.state
    assert all(p.grad is None for p in model.parameters())
