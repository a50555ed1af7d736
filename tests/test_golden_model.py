"""Towers, heads, loss and gradients against numbers of the CLIP4Clip reference."""

import pytest
import torch
from golden_model import build, video_inputs
from golden_vectors import fixtures, inputs, load, weights
from tiny_models import make_encoder, make_head

from checkpoints.names import parameter_name
from modules.encoders import Sizes
from modules.encoders.clip import CLIP, ClipSizes
from modules.losses.contrastive import contrastive_loss
from modules.model import VideoTextModel

WHOLE_MODELS = fixtures("A[1-6]_*")


def gradient_norms(model: VideoTextModel, names: list[str]) -> tuple[list[float], float]:
    gradients = {parameter_name(n): p.grad for n, p in model.named_parameters() if p.grad is not None}
    total = torch.stack([g.norm() for g in gradients.values()]).norm()
    return [gradients[name].norm().item() for name in names], total.item()


@pytest.mark.parametrize("stem", WHOLE_MODELS)
def test_features_logits_loss_and_gradients(stem):
    vector = load(stem)
    model = build(weights(vector), vector.config["sim_header"], vector.config["cross_num_hidden_layers"])
    ids, token_mask, frames, frame_mask = video_inputs(inputs(vector))
    with torch.no_grad():
        features = model.clip.encode_frames(frames, torch.ones_like(frame_mask))[0]
        tower = model.clip.visual
        patches = tower.patches(frames[:1])[0] if tower.temporal_patch else tower.patches(frames[0])
        got = {
            "frame_features": features,
            "image_hidden_first2": tower.ln_post(tower.attend(patches[:2])) @ tower.proj,
            "text_features": model.clip.encode_text(ids)[0],
            "text_hidden": model.clip.encode_text(ids)[1],
            "sequence_output": model.clip.encode_text(ids)[0][:, None],
            "visual_output": features,
            "logits": model.similarity(model.encode_text(ids, token_mask), model.encode_video(frames, frame_mask)),
        }
    loss = model(ids, token_mask, frames, frame_mask)
    loss.backward()
    norms, total = gradient_norms(model, vector.data["grad_norm_params"])
    got |= {"train_loss": loss.detach()[None], "grad_norms": norms, "grad_norm_total": [total]}
    rows = vector.check(got)
    assert {row[0] for row in rows} == set(vector.expected()), "a value of the vector was not compared"
    without = {parameter_name(n) for n, p in model.named_parameters() if p.grad is None}
    assert without == set(vector.data["params_without_gradient"])


@pytest.mark.parametrize("stem", WHOLE_MODELS)
def test_text_cut_to_its_length_changes_nothing(stem):
    vector = load(stem)
    model = build(weights(vector), vector.config["sim_header"], vector.config["cross_num_hidden_layers"])
    ids, token_mask, _, _ = video_inputs(inputs(vector))
    lengths = token_mask.sum(1).tolist()
    assert min(lengths) < ids.shape[1]
    with torch.no_grad():
        whole = model.clip.encode_text(ids)[0]
        cut = torch.cat([model.clip.encode_text(ids[i : i + 1, :n])[0] for i, n in enumerate(lengths)])
    torch.testing.assert_close(cut, whole, rtol=1e-5, atol=2e-5)


@pytest.mark.parametrize("stem", WHOLE_MODELS)
def test_padding_cannot_matter(stem):
    vector = load(stem)
    model = build(weights(vector), vector.config["sim_header"], vector.config["cross_num_hidden_layers"])
    ids, token_mask, frames, frame_mask = video_inputs(inputs(vector))
    with torch.no_grad():
        text = model.encode_text(ids, token_mask)
        want = model.encode_video(frames, frame_mask)
        spoiled = torch.where(frame_mask[..., None, None, None], frames, torch.nan)
        torch.testing.assert_close(model.encode_video(spoiled, frame_mask), want, rtol=0, atol=0)
        last = len(frames) - 1
        alone = model.encode_video(frames[last:, : int(frame_mask[last].sum())], frame_mask[last:, frame_mask[last]])
        want = model.similarity(text, want)[:, last:]
        torch.testing.assert_close(model.similarity(text, alone), want, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("stem", fixtures("A7_real_*"))
def test_real_sizes(stem):
    vector = load(stem)
    tensors = weights(vector)
    ids, token_mask, frames, frame_mask = video_inputs(inputs(vector))
    model = build(tensors, vector.config["sim_header"], vector.config["cross_num_hidden_layers"])
    mean = make_head("meanP", model.clip.head_sizes)
    with torch.no_grad():
        text = model.clip.encode_text(ids)[0]
        features = model.clip.encode_frames(frames, torch.ones_like(frame_mask))[0]
        scale = model.clip.logit_scale.exp()
        vector.check(
            {
                "sequence_output": text[:, None],
                "visual_output": features,
                **{
                    f"logits_{name}": scale * head.similarity(head.text(text), head.video(features, frame_mask))
                    for name, head in (("seqTransf", model.head), ("meanP", mean))
                },
            },
            require_all=True,
        )


@pytest.mark.parametrize("stem", fixtures("A9_head_*_small"))
def test_head_on_small_features(stem):
    """Features of size 1e-3 make the eps of LayerNorm visible: 1e-12 in heads."""
    vector = load(stem)
    x, config = inputs(vector), vector.config
    sizes = build_sizes(config)
    head = make_head(config["sim_header"], head_sizes(sizes), **layers(config)).eval()
    tensors = weights(vector)
    scale = tensors.pop("clip.logit_scale").exp() if head.scaled else 1.0
    tensors.pop("clip.logit_scale", None)
    head.load_state_dict(tensors)
    with torch.no_grad():
        video = head.video(x["visual_output"], x["video_mask"].bool())
        logits = scale * head.similarity(head.text(x["sequence_output"][:, 0]), video)
    vector.check({"logits": logits}, require_all=True)


def layers(config: dict) -> dict[str, int]:
    return {"cross_num_hidden_layers": config["cross_num_hidden_layers"]}


def head_sizes(sizes: ClipSizes) -> Sizes:
    return Sizes(sizes.embed_dim, sizes.context_length, sizes.text_heads, sizes.embed_dim)


def build_sizes(config: dict) -> ClipSizes:
    return ClipSizes(
        embed_dim=config["embed_dim"],
        image_resolution=config["image_resolution"],
        vision_layers=config["vision_layers"],
        vision_width=config["vision_width"],
        patch_size=config["vision_patch_size"],
        context_length=config["context_length"],
        vocab_size=config["vocab_size"],
        text_width=config["transformer_width"],
        text_heads=config["transformer_width"] // 64,
        text_layers=config["transformer_layers"],
        vision_heads=config["vision_width"] // 64,
    )


A8_CASES = [(stem, case) for stem in fixtures("A8*") for case in load(stem).data["cases"]]


@pytest.mark.parametrize(("stem", "case"), A8_CASES)
def test_heads_start_from_clip(stem, case):
    vector = load(stem)
    clip = weights(vector)
    table = vector.data["cases"][case]
    sim_header, patch = case.split("/")
    tensors = {f"clip.{k}": v for k, v in clip.items()}
    encoder = make_encoder("clip", CLIP.sizes_of(clip), linear_patch=patch)
    head = make_head(sim_header, encoder.head_sizes, **layers(vector.config))
    start = tensors | {f"clip.{k}": v for k, v in encoder.start_values(clip).items()}
    start |= head.state_dict() | head.init_from_clip(clip)
    assert set(start) - set(tensors) == set(table["targets"])
    for target, (how, *source) in table["targets"].items():
        check_start(start[target], how, source, clip)
    model = build(start, sim_header, vector.config["cross_num_hidden_layers"])
    assert {parameter_name(k): list(v.shape) for k, v in model.state_dict().items()} == table["state_dict"]


def check_start(got: torch.Tensor, how: str, source: list, clip: dict[str, torch.Tensor]) -> None:
    if how == "copy":
        assert torch.equal(got, clip[source[0]])
    elif how == "temporal_centre":
        assert torch.equal(got[:, :, source[1]["centre"]], clip[source[0]])
        assert got.shape[2] == source[1]["kernel_t"]
        assert got.count_nonzero() == clip[source[0]].count_nonzero()
    elif how == "random":
        few = got.numel() < 1000  # then the sample's deviation is itself uncertain
        assert got.std().item() == pytest.approx(source[0]["std"], rel=0.3 if few else 0.05)
    else:
        assert torch.equal(got, {"ones": torch.ones_like, "zeros": torch.zeros_like}[how](got))


@pytest.mark.parametrize("stem", fixtures("A12*"))
def test_weights_rounded_to_half(stem):
    """CLIP4Clip keeps CLIP in float16; the same weights in our float32 give the same logits."""
    vector = load(stem)
    halves = load(fixtures("A8*")[0]).data["cases"]["meanP/2d"]["half_after_convert_weights"]
    for name in ("A1_meanP_2d", "A3_seqTransf_2d"):
        source = load(name)
        tensors = {k: v.half().float() if is_half(k, halves) else v for k, v in weights(source).items()}
        model = build(tensors, source.config["sim_header"], source.config["cross_num_hidden_layers"])
        ids, token_mask, frames, frame_mask = video_inputs(inputs(source))
        with torch.no_grad():
            logits = model.similarity(model.encode_text(ids, token_mask), model.encode_video(frames, frame_mask))
        rows = vector.check({f"{name}_fp16_weights_fp32_compute": logits, f"{name}_fp16_weights_fp16_compute": logits})
        assert len(rows) == 2


def is_half(key: str, halves: list[str]) -> bool:
    """The vector lists CLIP's tensors of a 4 + 3 layer model; others of the same kind are halved alike."""
    import re

    def kind(name: str) -> str:
        return re.sub(r"resblocks\.\d+\.", "resblocks.N.", name)

    return kind(key) in {kind(k) for k in halves}


@pytest.mark.parametrize("stem", fixtures("A10*"))
def test_an_empty_video_is_an_error_where_the_source_gives_nan(stem):
    for sim_header in load(stem).data["result"]:
        source = load(next(name for name in WHOLE_MODELS if f"_{sim_header}_2d" in name))
        model = build(weights(source), sim_header, source.config["cross_num_hidden_layers"])
        _, _, frames, frame_mask = video_inputs(inputs(source))
        frame_mask[2] = False
        with pytest.raises(ValueError, match=r"without a single frame in the batch, at \[2\]"):
            model.encode_video(frames, frame_mask)


def test_loss_by_hand():
    """Two pairs: log(1 + e^-1) for the first row and column, log(1 + e^-3) for the second ones."""
    logits = torch.tensor([[2.0, 1.0], [1.0, 4.0]])
    want = (torch.tensor([-1.0, -3.0]).exp() + 1).log().mean()
    torch.testing.assert_close(contrastive_loss(logits), want)
