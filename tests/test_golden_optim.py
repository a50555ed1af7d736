"""BertAdam, parameter groups, freezing and whole training steps against the CLIP4Clip reference."""

import re
from types import SimpleNamespace

import pytest
import torch
from golden_model import build, video_inputs
from golden_vectors import fixtures, inputs, load, weights
from test_golden_model import build_sizes
from tiny_models import make_encoder, make_model

from checkpoints.names import parameter_name
from engine.distributed import World
from engine.step import Trainer
from modules import optim
from modules.model import VideoTextModel
from modules.optim import BertAdam, freeze, parameter_groups, warmup_cosine

# Those of the reference's optimiser; its projects train with the first only.
SCHEDULES = {
    "warmup_cosine": warmup_cosine,
    "warmup_constant": lambda progress, warmup: progress / warmup if progress < warmup else 1.0,
    "warmup_linear": lambda progress, warmup: (
        progress / warmup if progress < warmup else max((progress - 1.0) / (warmup - 1.0), 0.0)
    ),
}


@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize("stem", fixtures("E1*"))
def test_bertadam(stem, compiled):
    """compiled: traced whole, and run by torch's plain backend, which needs no minutes of C++ compilation."""
    vector = load(stem)
    x, config = inputs(vector), vector.config
    assert set(vector.data) == set(vector.expected())
    for run, settings in vector.data.items():
        params = {n: torch.nn.Parameter(x[f"p_{n}"].clone()) for n in config["flat_order"]}
        groups = [
            {
                "params": [params[n] for n in group["names"]],
                "lr": group["lr"],
                "weight_decay": settings["weight_decay"] if group["weight_decay"] == "wd" else group["weight_decay"],
            }
            for group in config["groups"]
        ]
        optimizer = BertAdam(
            groups,
            lr=config["base_lr"],
            warmup=settings["warmup"],
            t_total=settings["t_total"],
            betas=(config["b1"], config["b2"]),
            eps=config["e"],
            max_grad_norm=settings["max_grad_norm"],
        )
        if compiled:
            torch._dynamo.reset()
            optimizer.compile(backend="aot_eager", fullgraph=True)
        optimizer.schedule = SCHEDULES[settings["schedule"]]
        trace = []
        for step, rates in enumerate(settings["lr_used_at_step"]):
            assert optimizer.current_lrs() == pytest.approx(rates, rel=1e-6, abs=1e-12), (run, step)
            for name, parameter in params.items():
                parameter.grad = x[f"g_{name}"][step].clone()
            optimizer.step()
            trace.append(torch.cat([params[n].detach().flatten() for n in config["flat_order"]]))
        assert vector.check({run: torch.stack(trace)})


def test_all_tensors_at_once_are_one_by_one(monkeypatch):
    """Against the formula written out for one tensor; in portions, and with a tensor that gets no gradient at first."""
    monkeypatch.setattr(optim, "PORTION", 30)
    generator = torch.Generator().manual_seed(3)
    shapes = [(4, 5), (7,), (3, 3), (40,), ()]
    params = [torch.nn.Parameter(torch.randn(s, generator=generator)) for s in shapes]
    want = [p.detach().clone() for p in params]
    state = [[torch.zeros(s), torch.zeros(s), 0] for s in shapes]
    optimizer = BertAdam(params, lr=0.1, warmup=0.25, t_total=8, weight_decay=0.3)
    for step in range(6):
        for i, p in enumerate(params):
            p.grad = 3 * torch.randn(shapes[i], generator=generator) if i != 2 or step > 1 else None
            if p.grad is not None:
                m, v, done = state[i]
                grad = p.grad * (1 / (p.grad.norm() + 1e-6)).clamp(max=1)
                state[i] = [0.9 * m + 0.1 * grad, 0.999 * v + 0.001 * grad**2, done + 1]
                update = state[i][0] / (state[i][1].sqrt() + 1e-6) + 0.3 * want[i]
                want[i] -= optimizer.scheduled_lr(optimizer.param_groups[0], done) * update
        optimizer.step()
    for p, w in zip(params, want):
        torch.testing.assert_close(p.detach(), w, rtol=1e-5, atol=1e-7)


def model_of(config: dict, sim_header: str, patch: str = "2d") -> VideoTextModel:
    encoder = make_encoder("clip", build_sizes(config), linear_patch=patch)
    return make_model(encoder, sim_header, cross_num_hidden_layers=config["cross_num_hidden_layers"])


def named(model: torch.nn.Module) -> list[tuple[str, torch.nn.Parameter]]:
    return [(parameter_name(name), parameter) for name, parameter in model.named_parameters()]


# In the source's groups but never with a gradient, so never updated there; here they are not trainable at all.
UNTRAINED = {
    "seqLSTM/2d": "frame_position_embeddings.weight",
    "tightTransf/2d": "clip.logit_scale",
    "seqTransf/3d": "clip.visual.conv1.weight",
}
GROUP_CASES = [(stem, case) for stem in fixtures("E2*") for case in load(stem).data["groups"]]


def block0_only(names: list[str]) -> set[str]:
    return {n for n in names if not re.search(r"resblocks\.[1-9]", n)}


@pytest.mark.parametrize(("stem", "case"), GROUP_CASES)
def test_parameter_groups_of_clip4clip(stem, case):
    vector = load(stem)
    config = vector.config
    model = model_of(config, *case.split("/"))
    groups = parameter_groups(named(model), config["lr"], config["coef_lr"], config["weight_decay"], decays_all=True)
    wanted = vector.data["groups"][case]["groups"]
    assert len(groups) == len(wanted)
    for ours, theirs in zip(groups, wanted):
        assert ours["lr"] == pytest.approx(theirs["lr"])
        assert ours["weight_decay"] == theirs["weight_decay"]
        untrained = {UNTRAINED.get(case)} & set(theirs["names_block0_only"])
        assert len(ours["names"]) == theirs["n"] - len(untrained)
        assert block0_only(ours["names"]) == set(theirs["names_block0_only"]) - untrained


def test_weight_decay_by_meaning():
    """Without --compat only weight matrices decay: no bias, LayerNorm, embedding, positional table or scale."""
    model = model_of(load(fixtures("E2*")[0]).config, "seqTransf")
    groups = parameter_groups(named(model), 1e-4, 1e-3, 0.2)
    decayed = {n for g in groups if g["weight_decay"] for n in g["names"]}
    kept = {n for g in groups if not g["weight_decay"] for n in g["names"]}
    assert "clip.visual.conv1.weight" in decayed
    assert "clip.text_projection" in decayed
    assert "transformerClip.resblocks.0.mlp.c_fc.weight" in decayed
    assert {
        "clip.logit_scale",
        "clip.visual.ln_pre.weight",
        "clip.token_embedding.weight",
        "clip.positional_embedding",
        "clip.visual.class_embedding",
        "frame_position_embeddings.weight",
        "transformerClip.resblocks.0.ln_1.weight",
    } <= kept
    assert len(decayed) + len(kept) == len(list(model.parameters()))


@pytest.mark.parametrize("stem", fixtures("E2*"))
@pytest.mark.parametrize("sim_header", ["meanP", "seqTransf"])
@pytest.mark.parametrize("num_layers", [-1, 0, 2, 12])
def test_freezing(stem, sim_header, num_layers):
    vector = load(stem)
    model = model_of(vector.config, sim_header)
    frozen = freeze(model.clip, num_layers)
    wanted = vector.data["freeze"][f"{sim_header}/2d/freeze_layer_num={num_layers}"]
    blocks = wanted["frozen"]["blocks"]
    names = set(wanted["frozen"]["names"])
    for name, _ in model.clip.named_parameters():
        names |= {name for prefix, which in blocks.items() for i in which if name.startswith(f"{prefix}{i}.")}
    assert set(frozen) == names
    assert len(frozen) == wanted["n_frozen"]
    assert {n for n, p in model.clip.named_parameters() if not p.requires_grad} == names
    assert all(p.requires_grad for p in model.head.parameters())


@pytest.mark.parametrize("stem", fixtures("E3*"))
def test_whole_training_steps(stem):
    vector = load(stem)
    config, x = vector.config, inputs(vector)
    start = weights(vector)
    model = build(start, config["sim_header"], config["cross_num_hidden_layers"])
    groups = parameter_groups(named(model), config["lr"], config["coef_lr"], config["weight_decay"], decays_all=True)
    optimizer = BertAdam(
        groups,
        lr=config["lr"],
        warmup=config["warmup_proportion"],
        betas=(0.9, 0.98),
        t_total=config["t_total"],
        weight_decay=config["weight_decay"],
        max_grad_norm=1.0,
    )
    trainer = Trainer(model, optimizer, World(0, 1, torch.device("cpu")), "fp32", config["max_grad_norm"])
    losses, norms, scales = [], [], []
    for step in range(config["t_total"]):
        ids, token_mask, frames, frame_mask = video_inputs(x, f"_{step}")
        loss, norm = trainer.step(
            SimpleNamespace(token_ids=ids, token_mask=token_mask, frames=frames, frame_mask=frame_mask, video_ids=())
        )
        losses.append(loss)
        norms.append(norm)
        scales.append(model.clip.logit_scale.item())
    end = {parameter_name(k): v for k, v in model.state_dict().items()}
    changes = [(end[n] - start[n]).norm().item() for n in vector.data["weight_change_params"]]
    vector.check(
        {
            "losses": losses,
            "total_grad_norms": norms,
            "logit_scales": scales,
            "weight_change_norms": changes,
            "clip.ln_final.bias": end["clip.ln_final.bias"],
        },
        require_all=True,
    )
