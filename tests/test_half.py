"""--precision half: CLIP4Clip's arithmetic, against its vectors and a plain loop of its formulas in float16."""

import json
import math
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from golden_model import build, video_inputs
from golden_vectors import fixtures, load
from test_golden_model import inputs, is_half, weights
from test_main import TRAIN, replaced
from tiny_models import SIZES, make_model

from engine.compat import COMPAT
from engine.distributed import World
from engine.options import resolve
from engine.step import Trainer, build_optimizer, tensor_float32
from main_task_retrieval import main
from modules.encoders.clip import CLIP
from modules.optim import BertAdam

SHORT = replace(SIZES, context_length=8, vocab_size=50)
FLAGS = {
    "do_train": True,
    "output_dir": "out",
    "data_path": "d",
    "features_path": "f",
    "train_csv": "t",
    "val_csv": "v",
}
STEPS = 20
HALVES = load(fixtures("A8*")[0]).data["cases"]["meanP/2d"]["half_after_convert_weights"]


def test_what_is_half_is_what_the_reference_halves():
    source = load("A3_seqTransf_2d")
    model = build(weights(source), "seqTransf", source.config["cross_num_hidden_layers"])
    model.clip.to_half()
    for name, value in model.state_dict().items():
        wanted = torch.float16 if is_half(name, HALVES) else torch.float32
        assert value.dtype == wanted, name


@pytest.mark.parametrize("name", ["A1_meanP_2d", "A3_seqTransf_2d"])
def test_logits_of_the_reference_in_float16(name):
    source = load(name)
    model = build(weights(source), source.config["sim_header"], source.config["cross_num_hidden_layers"])
    model.clip.to_half()
    ids, token_mask, frames, frame_mask = video_inputs(inputs(source))
    with torch.no_grad():
        logits = model.similarity(model.encode_text(ids, token_mask), model.encode_video(frames, frame_mask))
    assert load(fixtures("A12*")[0]).check({f"{name}_fp16_weights_fp16_compute": logits})


def norm(x, w, name):
    """CLIP's LayerNorm: in float32, and back."""
    return F.layer_norm(x.float(), x.shape[-1:], w[f"{name}.weight"], w[f"{name}.bias"]).to(x.dtype)


def blocks(x, w, tower, causal):
    for n in range(2):
        name = f"{tower}transformer.resblocks.{n}."
        y = norm(x, w, name + "ln_1")
        q, k, v = F.linear(y, w[name + "attn.in_proj_weight"], w[name + "attn.in_proj_bias"]).chunk(3, dim=-1)
        y = F.scaled_dot_product_attention(q[:, None], k[:, None], v[:, None], is_causal=causal)[:, 0]
        x = x + F.linear(y, w[name + "attn.out_proj.weight"], w[name + "attn.out_proj.bias"])
        y = F.linear(norm(x, w, name + "ln_2"), w[name + "mlp.c_fc.weight"], w[name + "mlp.c_fc.bias"])
        y = y * torch.sigmoid(1.702 * y)
        x = x + F.linear(y, w[name + "mlp.c_proj.weight"], w[name + "mlp.c_proj.bias"])
    return x


def loss_of(w, ids, images):
    """Mean pooling's loss of [B, 8] captions and [B, 3, 16, 16] clips of one frame, as CLIP4Clip's modules compute."""
    x = F.conv2d(images.half(), w["visual.conv1.weight"], stride=8).flatten(2).transpose(1, 2)
    first = w["visual.class_embedding"].half() + torch.zeros(len(x), 1, 64, dtype=torch.half)
    x = torch.cat([first, x], dim=1) + w["visual.positional_embedding"].half()
    x = blocks(norm(x, w, "visual.ln_pre"), w, "visual.", causal=False)
    video = (norm(x[:, 0], w, "visual.ln_post") @ w["visual.proj"]).float()
    x = w["token_embedding.weight"][ids].half() + w["positional_embedding"].half()
    x = norm(blocks(x, w, "", causal=True), w, "ln_final")
    text = (x @ w["text_projection"])[torch.arange(len(ids)), ids.argmax(dim=1)].float()
    video = F.normalize(F.normalize(video, dim=1), dim=1)  # frames, then their mean
    logits = w["logit_scale"].exp() * F.normalize(text, dim=1) @ video.T
    target = torch.arange(len(ids))
    return (F.cross_entropy(logits, target) + F.cross_entropy(logits.T, target)) / 2


def bert_adam(w, moments, step, total, lr):
    """The update of modules/optimization.py, tensor by tensor; moments have the type of the weights."""
    progress = step / total
    lr = lr * (progress / 0.1 if progress < 0.1 else 0.5 * (1 + math.cos(math.pi * progress)))
    for name, p in w.items():
        m, v = moments.setdefault(name, (torch.zeros_like(p), torch.zeros_like(p)))
        torch.nn.utils.clip_grad_norm_(p, 1.0)
        m.mul_(0.9).add_(p.grad, alpha=1 - 0.9)
        v.mul_(0.98).addcmul_(p.grad, p.grad, value=1 - 0.98)
        update = m / (v.sqrt() + 1e-6)
        if "bias" not in name:
            update += 0.2 * p.data
        p.data.add_(-(lr * update))
        p.grad = None


def test_steps_are_those_of_a_plain_loop():
    """Each step from the state that the last one left: rounding the other way once would grow over twenty steps."""
    torch.manual_seed(0)
    clip = CLIP(SHORT, "quick_gelu")
    clip.to_half()
    model = make_model(clip, "meanP")
    options = resolve(FLAGS | {"lr": 1e-4, "coef_lr": 1e-2, "compat": "clip4clip"}).train
    optimizer = build_optimizer(model, options, COMPAT["clip4clip"], STEPS)
    trainer = Trainer(model, optimizer, World(0, 1, torch.device("cpu")), "half", 1.0)
    for step in range(STEPS):
        batch = some_batch(step)
        start = {name: p.detach().clone() for name, p in clip.named_parameters()}
        w = {name: p.clone().requires_grad_() for name, p in start.items()}
        states = {name: optimizer.state[p] for name, p in clip.named_parameters() if optimizer.state[p]}
        moments = {name: (state["next_m"].clone(), state["next_v"].clone()) for name, state in states.items()}
        expected = loss_of(w, batch.token_ids, batch.frames[:, 0])
        expected.backward()
        torch.nn.utils.clip_grad_norm_(w.values(), 1.0)
        bert_adam(w, moments, step, STEPS, 1e-6)
        w["logit_scale"].data.clamp_(max=math.log(100))
        loss, _ = trainer.step(batch)
        assert loss == pytest.approx(expected.item(), rel=1e-6)
        for name, p in clip.named_parameters():
            assert p.dtype == optimizer.state[p]["next_m"].dtype == w[name].dtype
            apart, moved = ((p.detach() - q.detach()).double().norm() for q in (w[name], start[name]))
            assert apart <= 0.1 * moved, (step, name)
    lost = torch.cat([(v == 0).flatten() for name, (_, v) in moments.items() if is_half(f"clip.{name}", HALVES)])
    assert lost.float().mean() > 0.5  # v underflows, which is what makes the steps large


def test_bert_adam_in_float16_to_the_bit():
    """The same gradients: weights and both moments are those of the loop, also where v has underflowed."""
    draws = torch.Generator().manual_seed(0)
    start = {name: torch.randn(40, 30, generator=draws).mul(0.1).half() for name in ("weight", "bias")}
    ours, theirs = ({name: p.clone().requires_grad_() for name, p in start.items()} for _ in range(2))
    settings = {"warmup": 0.1, "t_total": STEPS, "betas": (0.9, 0.98)}
    groups = [{"params": [p], "weight_decay": 0.2 * (name != "bias")} for name, p in ours.items()]
    optimizer, moments = BertAdam(groups, lr=1e-6, **settings), {}
    for step in range(STEPS):
        for name, p in ours.items():
            gradient = torch.randn(p.shape, generator=draws).mul(10.0 ** (-step % 6 - 1)).half()
            p.grad, theirs[name].grad = gradient, gradient.clone()
        optimizer.step()
        bert_adam(theirs, moments, step, STEPS, 1e-6)
        for name, p in ours.items():
            state = optimizer.state[p]
            assert torch.equal(p, theirs[name]), (step, name)
            assert torch.equal(state["next_m"], moments[name][0])
            assert torch.equal(state["next_v"], moments[name][1])
    assert all(not torch.equal(p, start[name]) for name, p in ours.items())


def some_batch(step):
    draws = torch.Generator().manual_seed(step)
    ids = torch.randint(1, 48, (6, 8), generator=draws)
    ids[:, 7] = 49
    return SimpleNamespace(
        token_ids=ids,
        token_mask=torch.ones(6, 8, dtype=torch.bool),
        frames=torch.randn(6, 1, 3, 16, 16, generator=draws),
        frame_mask=torch.ones(6, 1, dtype=torch.bool),
        video_ids=(),
    )


@pytest.mark.parametrize(
    ("flags", "precision"),
    [
        ({}, "auto"),
        ({"compat": "clip4clip"}, "half"),
        ({"compat": "internvideo"}, "half"),
        ({"compat": "internvideo", "clip_evl": True}, "fp32"),
        ({"compat": "clip4clip", "precision": "fp32"}, "fp32"),
    ],
)
def test_the_source_chooses_the_arithmetic(flags, precision):
    assert resolve(FLAGS | flags).run.precision == precision


@pytest.mark.parametrize(
    ("flags", "precision"),
    [({}, "fp32"), ({"precision": "bf16"}, "bf16"), ({"fp16": True}, "fp16"), ({"compat": "clip4clip"}, "half")],
)
def test_evaluation_is_in_float32_unless_asked(flags, precision):
    """Also where auto has found bf16 for the training."""
    options = resolve(FLAGS | flags)
    if not flags:
        options = replace(options, run=replace(options.run, precision="bf16"))
    assert options.evaluation_precision == precision


def test_tf32_is_allowed_within_a_step_only():
    for allowed, seen in ((False, ("highest", False)), (True, ("high", True))):
        before = torch.backends.cudnn.allow_tf32
        torch.backends.cudnn.allow_tf32 = False
        with tensor_float32(allowed):
            assert (torch.get_float32_matmul_precision(), torch.backends.cudnn.allow_tf32) == seen
        assert (torch.get_float32_matmul_precision(), torch.backends.cudnn.allow_tf32) == ("highest", False)
        torch.backends.cudnn.allow_tf32 = before
    assert COMPAT["none"].tf32
    assert not any(compat.tf32 for name, compat in COMPAT.items() if name != "none")


def test_the_video_tower_has_no_half():
    with pytest.raises(ValueError, match="--precision half is for a plain CLIP, as in CLIP4Clip; InternVideo's"):
        resolve(FLAGS | {"precision": "half", "clip_evl": True})


def test_a_run_names_its_arithmetic(msrvtt_flags, tmp_path):
    """Trained in half and evaluated again in float32: both are in results.json; the file keeps float16."""
    trained, again = tmp_path / "trained", tmp_path / "again"
    flags = replaced(msrvtt_flags, output_dir=trained, compat="clip4clip")
    assert main([*replaced(TRAIN, epochs=1), *flags]) == 0
    found = json.loads((trained / "results.json").read_text())
    assert (found["options"]["precision"], found["trained_in"]) == ("half", "half")
    held = torch.load(trained / "pytorch_model.bin")
    assert held["clip.visual.proj"].dtype == torch.float16
    assert held["clip.logit_scale"].dtype == torch.float32
    flags = replaced(msrvtt_flags, output_dir=again, finetuned_path=trained / "pytorch_model.bin")
    assert main(["--do_eval", "--compat", "clip4clip", *flags]) == 0
    assert json.loads((again / "results.json").read_text())["metrics"] == found["metrics"]
    assert main(["--do_eval", *flags]) == 0
    found = json.loads((again / "results.json").read_text())
    assert (found["options"]["precision"], found["trained_in"]) == ("fp32", "half")


def test_the_project_of_compat_brings_its_defaults():
    options = resolve(FLAGS | {"compat": "clip4clip", "max_words": 32, "datatype": "msrvtt"})
    data, train = options.data, options.train
    assert (data.max_words, data.max_frames, train.coef_lr, train.batch_size, train.epochs) == (32, 100, 1.0, 256, 20)
    assert options.own["frame_rule"].slice_framepos == 0
    assert "--max_frames 100" in options.of_source
    assert not [line for line in options.of_source if "max_words" in line]
    old = resolve(FLAGS | {"loose_type": True, "slice_framepos": 2, "max_words": 20})
    assert old.of_source == []
    assert "--max_frames 12 (100 there)" in old.unlike_source
    assert not [line for line in old.unlike_source if "max_words" in line or "slice" in line]
    assert resolve(FLAGS).unlike_source == []
    chosen = resolve(FLAGS | {"compat": "clip4clip", "datatype": "didemo", "select_on": "auto"})
    assert (chosen.train.select_on, "--select_on test" in chosen.of_source) == ("test", True)


def test_every_epoch_is_kept_and_the_last_scored_once(msrvtt_flags, tmp_path):
    flags = replaced(TRAIN, epochs=2, select_on="last")
    assert main([*flags, "--keep_epochs", *msrvtt_flags]) == 0
    kept = [torch.load(tmp_path / "out" / f"pytorch_model.bin{end}") for end in ("", ".1", ".0")]
    assert all(torch.equal(value, kept[1][name]) for name, value in kept[0].items())
    assert any(not torch.equal(value, kept[2][name]) for name, value in kept[0].items())
    assert (tmp_path / "out" / "log.txt").read_text().count("captions x 12 videos") == 1
