"""What runs on a CUDA device, on one: golden vectors, every model, training in each precision, resuming, compiling.

Skipped where there is none; a vector that cannot be read is a failure there as everywhere. Two ranks over NCCL need two
cards: NCCL refuses two ranks on one. So here a group of one rank uses NCCL's collectives, and what several ranks
compute is tested over gloo in test_distributed.py and test_accumulation.py.
"""

import copy
import json
import os
import shutil
import signal
from types import SimpleNamespace

import golden_vectors
import numpy as np
import pytest
import test_golden_evl
import test_golden_interaction
import test_golden_model
import test_golden_optim
import test_half
import torch
import torch.distributed as dist
from golden_vectors import GOLDEN_DIR, load, recipe
from test_main import TRAIN, replaced
from tiny_models import CASES, batch, tiny_model

from engine.data import autocast
from engine.distributed import World, choose_device, gather_rows, read_place
from engine.step import Trainer, trade
from main_task_retrieval import main
from modules.encoders.base import frame_places
from modules.optim import BertAdam, parameter_groups

CUDA = torch.device("cuda", 0)
on_cuda = pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device is visible to torch")
needs_bf16 = pytest.mark.skipif(
    not (torch.cuda.is_available() and torch.cuda.is_bf16_supported(including_emulation=False)),
    reason="no CUDA device with bfloat16 of its own is visible to torch",
)
# The tests of golden vectors whose numbers a device computes; each is run again with all its tensors there.
GOLDEN = [
    test_golden_model.test_features_logits_loss_and_gradients,
    test_golden_model.test_padding_cannot_matter,
    test_golden_model.test_real_sizes,
    test_golden_model.test_head_on_small_features,
    test_golden_model.test_weights_rounded_to_half,
    test_golden_evl.test_features_logits_loss_and_gradients,
    test_golden_evl.test_tokens_for_the_interactions,
    test_golden_evl.test_real_sizes,
    test_golden_interaction.test_interaction_scores_losses_and_cdcr,
    test_golden_interaction.test_whole_training_forward,
    test_golden_interaction.test_internvideos_tower_in_the_whole_model,
    test_golden_interaction.test_cross_encoder_after_an_aggregation,
    test_golden_interaction.test_internvideo_without_its_tower,
    test_golden_interaction.test_xpool,
    test_golden_optim.test_bertadam,
    test_golden_optim.test_whole_training_steps,
    test_half.test_logits_of_the_reference_in_float16,
]


def calls(test) -> list[dict]:
    """The arguments of every case of a test, from its parametrisation."""
    cases = [{}]
    for mark in getattr(test, "pytestmark", ()):
        if mark.name == "parametrize":
            names = [n.strip() for n in mark.args[0].split(",")] if isinstance(mark.args[0], str) else mark.args[0]
            rows = [dict(zip(names, row if len(names) > 1 else [row])) for row in mark.args[1]]
            cases = [case | row for case in cases for row in rows]
    return cases


VECTORS = [(test, case) for test in GOLDEN for case in calls(test)]


@pytest.fixture
def device():
    """The one that a run would choose, with the settings that it would make."""
    yield choose_device("cuda", read_place({}))
    torch.backends.cudnn.allow_tf32 = True


@on_cuda
@pytest.mark.parametrize(
    ("test", "case"), VECTORS, ids=[f"{t.__module__}.{t.__name__}-{'-'.join(map(str, c.values()))}" for t, c in VECTORS]
)
def test_golden_vectors(test, case, device, monkeypatch):
    """float32 without TF32, within the tolerance of each vector; float16 where the vector is."""
    compare = recipe.Fixture.compare

    def on_the_cpu(self, got, *rest):
        return compare(self, {k: v.detach().cpu() if isinstance(v, torch.Tensor) else v for k, v in got.items()}, *rest)

    monkeypatch.setattr(recipe.Fixture, "compare", on_the_cpu)
    monkeypatch.setattr(test_golden_optim, "World", lambda rank, size, _: World(rank, size, device))
    with device:
        test(**case)


def test_every_vector_of_tensors_is_among_them():
    """All that hold weights or gradients to compute with, but A11: its two ranks need two cards."""
    here = {value for _, case in VECTORS for value in case.values()}
    manifests = {path.stem: json.loads(path.read_text()) for path in GOLDEN_DIR.glob("*.json")}
    computed = {
        stem for stem, found in manifests.items() if "weights" in found and (GOLDEN_DIR / f"{stem}.npz").exists()
    }
    assert len(computed) > 30
    assert {stem for stem in computed if not stem.startswith("A11_")} <= here
    assert all(load(stem) for stem in computed)
    assert golden_vectors.fixtures("E1*")[0] in here


def on_device(model: torch.nn.Module, arrays, device: torch.device):
    """Loss and gradients of a model and a batch, on `device`."""
    model = copy.deepcopy(model).to(device)
    moved = [x.to(device) for x in (*arrays, frame_places(arrays[3]))]
    loss = model(*moved, torch.Generator().manual_seed(0))
    loss.backward()
    return loss.item(), {n: p.grad.cpu() for n, p in model.named_parameters() if p.grad is not None}


@on_cuda
@pytest.mark.parametrize("case", CASES, ids="-".join)
def test_every_model_gives_what_it_gives_on_the_cpu(case, device):
    model, arrays = tiny_model(*case), batch()
    if case[0] == "seqLSTM":
        model.train()  # cuDNN has no backward pass in evaluation; this head draws nothing at random
    (want, wanted), (loss, gradients) = (on_device(model, arrays, where) for where in (torch.device("cpu"), device))
    assert loss == pytest.approx(want, rel=1e-4)
    assert gradients.keys() == wanted.keys()
    total = torch.stack([g.norm() for g in wanted.values()]).norm()
    for name, gradient in gradients.items():
        assert (gradient - wanted[name]).norm() <= 1e-3 * max(wanted[name].norm(), 0.01 * total), name


def trainer_of(case: tuple[str, str, str], precision: str, device: torch.device, pieces: int = 1, tf32: bool = False):
    model = tiny_model(*case).train().to(device)
    groups = parameter_groups(model.named_parameters(), 1e-3, 1.0, 0.2)
    return Trainer(model, BertAdam(groups, lr=1e-3), World(0, 1, device), precision, 1.0, pieces, 0, tf32)


def loaded():
    """The pairs of tiny_models.batch, as a loader gives them."""
    ids, words, frames, mask = batch()
    return SimpleNamespace(token_ids=ids, token_mask=words, frames=frames, frame_mask=mask, video_ids=())


PRECISIONS = ["fp32", "fp16", pytest.param("bf16", marks=needs_bf16)]


@on_cuda
@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("pieces", [1, 2])
@pytest.mark.parametrize("case", [case for case in CASES if case[2] != "3d"], ids="-".join)
def test_training_in_each_precision(case, pieces, precision, device):
    """The first loss is that of float32, 30 steps on one batch bring it down, and weights stay in float32.

    The host waits for the device nowhere but where the loss is read, which torch itself watches here.
    """
    trainer = trainer_of(case, precision, device, pieces, tf32=precision == "fp32")
    want = trainer_of(case, "fp32", torch.device("cpu")).backward(loaded()).item()
    first = trainer.step(loaded())[0]  # also chooses kernels
    assert first == pytest.approx(want, rel=0.5 if case[0] in ("tightTransf", "xpool") else 0.03)  # those have dropout
    torch.cuda.set_sync_debug_mode("error")
    try:
        trainer.backward(loaded())
    finally:
        torch.cuda.set_sync_debug_mode("default")
    trainer.optimizer.zero_grad(set_to_none=True)
    losses = [trainer.step(loaded())[0] for _ in range(30)]
    assert min(losses[-5:]) < 0.8 * first
    assert {p.dtype for p in trainer.model.parameters()} == {torch.float32}


@on_cuda
@pytest.mark.parametrize("precision", PRECISIONS)
def test_evaluation_in_each_precision(precision, device):
    """Similarities of float32 within 1e-4 of the CPU's, of half precision within 0.1 of a scale of 14."""
    for case in CASES:
        model, arrays = tiny_model(*case), batch()
        found = []
        for where in (torch.device("cpu"), device):
            ids, words, *clips = (x.to(where) for x in (*arrays, frame_places(arrays[3])))
            there = copy.deepcopy(model).to(where)
            with torch.inference_mode(), autocast(where, precision if where == device else "fp32"):
                found.append(there.similarity(there.encode_text(ids, words), there.encode_video(*clips)))
        bound = 1e-3 if precision == "fp32" else 0.5
        assert (found[0] - found[1]).abs().max() < bound, case


@on_cuda
def test_pieces_are_one_batch(device):
    trainers = [trainer_of(("xpool", "no", "2d"), "fp32", device, pieces) for pieces in (1, 2)]
    for trainer in trainers:
        trainer.model.eval()
    losses = [trainer.backward(loaded()).item() for trainer in trainers]
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)
    for (name, p), q in zip(trainers[0].model.named_parameters(), trainers[1].model.parameters()):
        if p.grad is not None:
            torch.testing.assert_close(p.grad, q.grad, rtol=1e-3, atol=1e-5, msg=name)


@on_cuda
@pytest.mark.skipif(not shutil.which("gcc"), reason="Triton needs a C compiler, and no gcc is on PATH")
@pytest.mark.parametrize("checkpointing", [False, True])
def test_compiled_blocks_and_optimiser(checkpointing, device):
    """Five steps of the compiled model and optimiser are those of the plain ones."""
    plain, compiled = (trainer_of(("seqTransf", "no", "evl"), "fp32", device) for _ in range(2))
    trade(compiled.model, device, checkpointing, compile_blocks=True)
    compiled.optimizer.compile()
    for _ in range(5):
        assert compiled.step(loaded()) == pytest.approx(plain.step(loaded()), rel=1e-3)
    for p, q in zip(plain.model.parameters(), compiled.model.parameters()):
        torch.testing.assert_close(p, q, rtol=1e-3, atol=1e-4)


@on_cuda
def test_nccl_gathers_its_own_rows(device):
    """One rank: what is gathered is what it has, and gradients come back as they are."""
    dist.init_process_group("cpu:gloo,cuda:nccl", store=dist.HashStore(), rank=0, world_size=1, device_id=device)
    try:
        x = torch.randn(3, 4, device=device, requires_grad=True)
        mask = torch.rand(3, 2, device=device) > 0.5
        rows, kept = gather_rows((x, mask), [3])
        assert torch.equal(rows, x)
        assert torch.equal(kept, mask)
        (rows * 2).sum().backward()
        assert torch.equal(x.grad, torch.full_like(x, 2))
    finally:
        dist.destroy_process_group()


def flags_of(flags: list[str], folder, **values) -> list[str]:
    return replaced(flags, output_dir=folder, device="cuda", **values)


@on_cuda
@pytest.mark.parametrize("precision", PRECISIONS)
def test_a_run_that_is_resumed_ends_as_one_that_was_not(precision, msrvtt_flags, tmp_path, monkeypatch):
    """Two epochs of 3 steps, and the same stopped by SIGTERM in the fourth: equal but for the order of sums."""
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    train, plain, taken = replaced(TRAIN, precision=precision), Trainer.step, []

    def step(self, *given):
        taken.append(1)
        if len(taken) == 4:
            os.kill(os.getpid(), signal.SIGTERM)
        return plain(self, *given)

    assert main([*train, *flags_of(msrvtt_flags, whole)]) == 0
    with monkeypatch.context() as patched:
        patched.setattr(Trainer, "step", step)
        assert main([*train, *flags_of(msrvtt_flags, parts)]) == 128 + signal.SIGTERM
    assert main([*train, "--resume_model", "auto", *flags_of(msrvtt_flags, parts)]) == 0
    lines = [[json.loads(line) for line in (f / "history.jsonl").read_text().splitlines()] for f in (whole, parts)]
    assert len(lines[0]) == len(lines[1]) == 2
    for one, other in zip(*lines):
        assert other["loss"] == pytest.approx(one["loss"], rel=1e-2)
    found = json.loads((whole / "results.json").read_text())
    assert (found["trained_in"], found["evaluated_in"]) == (precision, precision)


@on_cuda
def test_what_auto_means(msrvtt_flags, tmp_path):
    """Training in bf16 where the card has it, evaluation in float32: the CPU gives the same similarities."""
    assert main([*replaced(TRAIN, epochs=1), *flags_of(msrvtt_flags, tmp_path / "cuda")]) == 0
    found = json.loads((tmp_path / "cuda" / "results.json").read_text())
    native = torch.cuda.is_bf16_supported(including_emulation=False)
    assert (found["trained_in"], found["evaluated_in"]) == ("bf16" if native else "fp32", "fp32")
    again = ["--do_eval", "--save_similarity", "--finetuned_path", str(tmp_path / "cuda" / "pytorch_model.bin")]
    for where in ("cuda", "cpu"):
        flags = replaced(msrvtt_flags, output_dir=tmp_path / f"on_{where}", device=where)
        assert main([*again, *flags]) == 0
    cuda, cpu = (np.load(tmp_path / f"on_{where}" / "similarity.npz")["similarity"] for where in ("cuda", "cpu"))
    np.testing.assert_allclose(cuda, cpu, atol=1e-3)
