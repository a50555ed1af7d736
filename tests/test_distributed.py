"""Two gloo processes against one: the loss and the gradients of the whole batch."""

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from golden_model import build, video_inputs
from golden_vectors import fixtures, inputs, load, weights
from torch.nn.parallel import DistributedDataParallel

from modules.distributed import gather_rows
from modules.optim import parameter_name

VECTORS = fixtures("A11_two_ranks_*")


def gradients(model) -> dict[str, torch.Tensor]:
    return {parameter_name(n): p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}


def one_rank(rank: int, stem: str, store: str, uneven: bool, results) -> None:
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=2)
    vector = load(stem)
    model = build(weights(vector), vector.config["sim_header"], vector.config["cross_num_hidden_layers"])
    batch = video_inputs(inputs(vector))
    cut = 1 if uneven else len(batch[0]) // 2
    share = [x[:cut] if rank == 0 else x[cut:] for x in batch]
    wrapped = DistributedDataParallel(model)  # kept alive: its hooks average the gradients during backward
    loss = wrapped(*share)
    loss.backward()
    results[rank] = (loss.item(), {k: g.numpy() for k, g in gradients(model).items()})
    dist.destroy_process_group()


def test_two_ranks_give_the_loss_and_gradients_of_one(tmp_path):
    """Even and uneven shares; the reference's single-process numbers are in the vector."""
    for stem in VECTORS:
        vector = load(stem)
        model = build(weights(vector), vector.config["sim_header"], vector.config["cross_num_hidden_layers"])
        loss = model(*video_inputs(inputs(vector)))
        loss.backward()
        want = gradients(model)
        norms = [want[name].norm().item() for name in vector.data["grad_norm_params"]]
        vector.check({"loss_single_process": loss.detach()[None], "grad_norms_single_process": norms})
        for uneven in (False, True):
            with mp.Manager() as manager:
                results = manager.dict()
                mp.spawn(one_rank, (stem, str(tmp_path / f"{stem}{uneven}"), uneven, results), nprocs=2)
                for rank_loss, got in results.values():
                    assert abs(rank_loss - loss.item()) < 1e-5
                    assert got.keys() == want.keys()
                    for name, gradient in want.items():
                        torch.testing.assert_close(torch.from_numpy(got[name]), gradient, rtol=1e-4, atol=2e-6)


def test_gathering_is_the_identity_alone():
    x = torch.randn(3, 2, requires_grad=True)
    assert gather_rows(x) is x
