"""Two gloo processes against one: the loss and the gradients of the whole batch."""

from functools import partial
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from golden_model import build, video_inputs
from golden_vectors import fixtures, inputs, load, weights
from tiny_models import batch, tiny_model
from torch.nn.parallel import DistributedDataParallel

from checkpoints.names import parameter_name
from engine.distributed import World, agree, gather_rows, same_sizes
from engine.step import Shares, Trainer
from modules.optim import BertAdam, parameter_groups

VECTORS = fixtures("A11_two_ranks_*")


def gradients(model) -> dict[str, torch.Tensor]:
    return {parameter_name(n): p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}


def with_others(share: list[torch.Tensor]) -> dict:
    """What forward takes for a share, padded as the trainer pads it: arrays, and how rows are gathered."""
    batch = SimpleNamespace(**dict(zip(("token_ids", "token_mask", "frames", "frame_mask"), share)))
    shares = Shares.of(batch)
    return dict(zip(vars(batch), shares.pad(batch))) | {"gather": partial(gather_rows, counts=shares.counts)}


def golden_losses(rank: int) -> dict:
    found = {}
    for stem in VECTORS:
        vector = load(stem)
        model = build(weights(vector), vector.config["sim_header"], vector.config["cross_num_hidden_layers"])
        wrapped = DistributedDataParallel(model)  # kept alive: its hooks average the gradients during backward
        batch = video_inputs(inputs(vector))
        for cut in (len(batch[0]) // 2, 1):  # even shares and uneven ones
            model.zero_grad()
            loss = wrapped(**with_others([x[:cut] if rank == 0 else x[cut:] for x in batch]))
            loss.backward()
            found[stem, cut] = (loss.item(), {k: g.clone() for k, g in gradients(model).items()})
    return found


def test_two_ranks_give_the_loss_and_gradients_of_one(ranks):
    """Even and uneven shares; the reference's single-process numbers are in the vector."""
    found = [one for rank in ranks for one in rank["golden_losses"].items()]
    assert len(found) == 2 * 2 * len(VECTORS)
    for stem in VECTORS:
        vector = load(stem)
        model = build(weights(vector), vector.config["sim_header"], vector.config["cross_num_hidden_layers"])
        loss = model(*video_inputs(inputs(vector)))
        loss.backward()
        want = gradients(model)
        norms = [want[name].norm().item() for name in vector.data["grad_norm_params"]]
        vector.check({"loss_single_process": loss.detach()[None], "grad_norms_single_process": norms})
        for rank_loss, got in (result for (of, _), result in found if of == stem):
            assert abs(rank_loss - loss.item()) < 1e-5
            assert got.keys() == want.keys()
            for name, gradient in want.items():
                torch.testing.assert_close(got[name], gradient, rtol=1e-4, atol=2e-6)


def test_gathering_is_the_identity_alone():
    x = torch.randn(3, 2, requires_grad=True)
    assert gather_rows(x, [3]) is x
    assert agree(4, 5).tolist() == [[4, 5]]


def count_collectives(rank: int) -> dict:
    found, called = {}, []
    for name in ("all_gather", "all_reduce", "all_gather_object", "broadcast", "barrier", "all_gather_into_tensor"):
        original = getattr(dist, name)

        def counted(*args, name=name, original=original, **kwargs):
            tensor = args[1] if name == "all_gather" else args[0]
            integers = isinstance(tensor, torch.Tensor) and tensor.dtype == torch.int64 and tensor.device.type == "cpu"
            called.append(f"{name} of integers" if integers else name)
            return original(*args, **kwargs)

        setattr(dist, name, counted)
    share = share_of_a_tiny_batch((slice(0, 1), slice(1, 4))[rank])
    parts = dict(zip(("token_ids", "token_mask", "frames", "frame_mask"), share))
    for pieces in (1, 2):
        model = tiny_model("xpool")
        optimizer = BertAdam(parameter_groups(model.named_parameters(), 1e-3, 0.1, 0.2), lr=1e-3)
        trainer = Trainer(model, optimizer, World(rank, 2, torch.device("cpu")), "fp32", 1.0, pieces)
        for _ in range(2):  # DDP talks more in its first step
            called.clear()
            trainer.step(SimpleNamespace(**parts, video_ids=()))
        found[pieces] = list(called)
    return found


def test_a_step_sends_one_message_besides_tensors(ranks):
    """No pickled object. X-Pool has 2 tensors for a text, 3 for a video: all are gathered, and each rank's rows of the
    similarities. Of the text nothing else is asked, so gradients of the two floating tensors of the video and of those
    rows are summed; with pieces, those of the parameters as well, where else DDP does so in C++.
    """
    for rank in ranks:
        assert len(rank["count_collectives"]) == 2
        for pieces, called in rank["count_collectives"].items():
            reductions = 3 + (pieces > 1)
            assert sorted(called) == ["all_gather"] * 6 + ["all_gather of integers"] + ["all_reduce"] * reductions


PAIRWISE = [("tightTransf", "no", "2d"), ("xpool", "no", "2d"), ("seqTransf", "wti", "2d"), ("meanP", "wti", "evl")]


def share_of_a_tiny_batch(rows: slice) -> tuple[torch.Tensor, ...]:
    """Trimmed to what these rows need, as the loaders of different ranks do."""
    ids, token_mask, frames, frame_mask = (x[rows] for x in batch())
    n, t = int(token_mask.sum(1).max()), int(frame_mask.sum(1).max())
    return ids[:, :n], token_mask[:, :n], frames[:, :t], frame_mask[:, :t]


def tiny(case: tuple[str, str, str]) -> torch.nn.Module:
    return tiny_model(*case, cdcr=1 if case[1] == "wti" else 0)


def pairwise_losses(rank: int) -> dict:
    found = {}
    for case in PAIRWISE:
        model = tiny(case)
        wrapped = DistributedDataParallel(model)
        share = share_of_a_tiny_batch((slice(0, 1), slice(1, 4))[rank])
        loss = wrapped(**with_others(share), generator=torch.Generator().manual_seed(3))
        loss.backward()
        found[case] = (loss.item(), {k: g.clone() for k, g in gradients(model).items()})
    some = (torch.ones(2, 3), torch.ones(2, dtype=torch.bool)) if rank else None
    none = gather_rows(same_sizes(some, torch.device("cpu")), [0, 2])
    assert [tuple(part.shape) for part in none] == [(2, 3), (2,)]
    assert none[1].dtype == torch.bool
    return found


def every_job(rank: int, folder: Path) -> None:
    """What two ranks do for all tests, whose imports would take longer; count_collectives changes torch."""
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2)
    jobs = (golden_losses, pairwise_losses, count_collectives)
    torch.save({job.__name__: job(rank) for job in jobs}, folder / f"rank{rank}.pt")
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def ranks(tmp_path_factory) -> list[dict[str, dict]]:
    """What each of two ranks found: name of the job -> what it gave."""
    folder = tmp_path_factory.mktemp("ranks")
    mp.spawn(every_job, (folder,), nprocs=2)
    return [torch.load(folder / f"rank{rank}.pt") for rank in range(2)]


def test_tuples_of_different_lengths_gather_exactly(ranks):
    """Uneven shares, captions and clips of other lengths on each rank, random tokens: still the loss of one process."""
    for case in PAIRWISE:
        model = tiny(case)
        loss = model(*batch(), generator=torch.Generator().manual_seed(3))
        loss.backward()
        want = gradients(model)
        for rank in ranks:
            rank_loss, got = rank["pairwise_losses"][case]
            assert abs(rank_loss - loss.item()) < 1e-5
            assert got.keys() == want.keys()
            for name, gradient in want.items():
                torch.testing.assert_close(got[name], gradient, rtol=1e-3, atol=2e-6)
