"""Token-wise interaction, CDCR, DRL's and InternVideo's ways of scoring, and X-Pool against numbers of the sources."""

import re

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from golden_model import build, video_inputs
from golden_vectors import fixtures, inputs, load, weights
from tiny_models import make_head, make_model

from checkpoints.names import parameter_name, split_towers
from checkpoints.read import load_strict
from modules.encoders.base import Conventions
from modules.encoders.clip import CLIP
from modules.encoders.internvideo import VideoCLIP
from modules.losses import Pairs
from modules.losses.cdcr import CDCR, chosen_token, cross_correlation, decorrelation
from modules.losses.contrastive import contrastive_loss
from modules.metrics import retrieval_ranks, summarize
from modules.model import VideoTextModel

AGGREGATION = {"None": "meanP", "seqLSTM": "seqLSTM", "seqTransf": "seqTransf"}


def settings_of(config: dict) -> dict:
    """InternVideo's and DRL's way: padding scores 0."""
    return {
        "cross_num_hidden_layers": config.get("cross_num_hidden_layers", 4),
        "cross_heads": config.get("cross_heads"),
        "wti_arch": config.get("wti_arch", 0) or 2,
        "mask_padding": False,
    }


def interaction_of(config: dict) -> str:
    interaction = config.get("interaction", "no")
    return interaction if interaction in ("ti", "wti") else "no"


def model_of(vector) -> VideoTextModel:
    """The model of a B2 or C vector, scoring as its source does."""
    config, tensors = vector.config, weights(vector)
    sim_header = AGGREGATION[config.get("agg_module", "None")]
    if not config.get("clip_evl"):
        return build(tensors, sim_header, compat="drl", interaction=interaction_of(config), **settings_of(config))
    sizes = VideoCLIP.sizes_of(split_towers(tensors)[0])
    conventions = Conventions(read_padding=True, source_frames=config["max_frames"])
    encoder = VideoCLIP(sizes, "quick_gelu", conventions=conventions)
    model = make_model(encoder, sim_header, interaction_of(config), scaled=False, **settings_of(config)).eval()
    names = {parameter_name(name): name for name in model.state_dict()}
    ignored = model.head.ignored_prefixes
    kept = {k: v for k, v in tensors.items() if not (ignored and k.startswith(ignored))}
    load_strict(model, {names.get(k, k): v for k, v in kept.items()}, "golden vector")
    return model


def frame_features(model: VideoTextModel, frames: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """What the head gets, padded frames included: the sources run them through the tower as well."""
    return model.frame_features(frames, torch.ones_like(mask))


def alphas(vector, name: str) -> tuple[float, float]:
    """The coefficients of a CDCR value: the vector's description of `cdcr1`, and of an `_alpha2` value its own."""
    first = vector.manifest["outputs"]["cdcr1"]["desc"] if "cdcr1" in vector.manifest["outputs"] else "alpha1 .16"
    alpha1 = float(re.search(r"alpha1 (\d*\.\d+)", first)[1])
    own = re.search(r"alpha2 (\d*\.\d+)", vector.manifest["outputs"][name]["desc"]) if "_alpha2" in name else None
    return alpha1, float(own[1]) if own else 0.0


def regularizers(vector, model: VideoTextModel, text, video) -> dict[str, torch.Tensor]:
    x = inputs(vector)
    draws = torch.stack([x["cdcr1_text_rand"], x["cdcr1_video_rand"]])
    found = {}
    for name in vector.expected():
        if name.startswith("cdcr"):
            alpha1, alpha2 = alphas(vector, name)
            found[name] = regularizer(model.head, text, video, draws, int(name[4]), alpha1, alpha2)[None]
    return found


def regularizer(head, text, video, draws, kind: int, alpha1: float, alpha2: float) -> torch.Tensor:
    """What --cdcr adds to the contrastive loss; of kind 1 with the tokens that the source drew."""
    if kind == 1 and head.takes_tokens:
        c = cross_correlation(chosen_token(text, draws[0]), chosen_token(video, draws[1]))
        return decorrelation(c, alpha1, alpha2)
    loss = CDCR(CDCR.Options(cdcr=kind, cdcr_alpha1=alpha1, cdcr_alpha2=alpha2, cdcr_lambda=1.0))
    logits = head.similarity(text, video)
    return loss(Pairs(logits, text, video, head)) - contrastive_loss(logits)


@pytest.mark.parametrize("stem", fixtures("B2_*") + fixtures("C[12]_*"))
def test_interaction_scores_losses_and_cdcr(stem):
    vector = load(stem)
    model = model_of(vector)
    ids, token_mask, frames, frame_mask = video_inputs(inputs(vector))
    with torch.no_grad():
        features = frame_features(model, frames, frame_mask)
        text, video = model.encode_text(ids, token_mask), model.head.video(features, frame_mask)
        temporal = model.head.temporal if model.head.takes_tokens else model.head
        got = {
            "visual_output": features
            if features.shape[1] == vector.expected().get("visual_output", features).shape[1]
            else features[:, :1],
            "text_feat": model.clip.encode_text(ids)[1],
            "video_feat": temporal.frames(features, frame_mask),
            "logits_eval": model.similarity(text, video),
            "logits_train": model.scale() * model.head.similarity(text, video),
        }
        loss = contrastive_loss(got["logits_train"])[None]
        got |= {"train_loss": loss, "train_loss_cdcr0": loss} | regularizers(vector, model, text, video)
        if "cdcr2" in got:
            got["train_loss_cdcr2"] = loss + 0.001 * got["cdcr2"]
    rows = vector.check(got)
    assert {row[0] for row in rows} == set(vector.expected()), "a value of the vector was not compared"


@pytest.mark.parametrize("stem", fixtures("B2_*"))
def test_whole_training_forward(stem):
    """The model's own forward, from pixels to the loss. CDCR is left out: ours encodes real frames only."""
    vector = load(stem)
    model = model_of(vector)
    with torch.no_grad():
        vector.check({"train_loss_cdcr0": model(*video_inputs(inputs(vector)))[None]})


@pytest.mark.parametrize("stem", fixtures("B1_*"))
def test_internvideos_tower_in_the_whole_model(stem):
    """Its video feature through meanP; evaluation with the logit scale, as without token interaction there."""
    vector = load(stem)
    model = model_of(vector)
    model.scale_evaluation = True
    ids, token_mask, frames, frame_mask = video_inputs(inputs(vector))
    with torch.no_grad():
        logits = model.similarity(model.encode_text(ids, token_mask), model.encode_video(frames, frame_mask))
        rows = vector.check({"logits": logits, "train_loss": model(ids, token_mask, frames, frame_mask)[None]})
    assert len(rows) == 2


@pytest.mark.parametrize("stem", fixtures("C3_*"))
def test_cross_encoder_after_an_aggregation(stem):
    """DRL's xti is the tight head, on frames that went through an aggregation."""
    vector = load(stem)
    tensors, config = weights(vector), vector.config
    cross = {k: v for k, v in tensors.items() if k.startswith(("clip.", "cross.", "similarity_dense."))}
    model = build(cross, "tightTransf", compat="drl", **settings_of(config))
    temporal = make_head(AGGREGATION[config["agg_module"]], model.clip.head_sizes, **settings_of(config)).eval()
    temporal.load_state_dict({k: v for k, v in tensors.items() if k not in cross})
    ids, token_mask, frames, frame_mask = video_inputs(inputs(vector))
    with torch.no_grad():
        aggregated = temporal.frames(frame_features(model, frames, frame_mask), frame_mask)
        video = model.head.video(aggregated, frame_mask)
        logits = model.similarity(model.encode_text(ids, token_mask), video)
    vector.check({"video_feat": aggregated, "logits_eval": logits}, require_all=True)


@pytest.mark.parametrize("stem", fixtures("B3_*"))
def test_internvideo_without_its_tower(stem):
    """Frames are not normalised before the mean."""
    vector = load(stem)
    model = build(weights(vector), vector.config["sim_header"], vector.config["cross_num_hidden_layers"], "internvideo")
    ids, token_mask, frames, frame_mask = video_inputs(inputs(vector))
    with torch.no_grad():
        text, video = model.encode_text(ids, token_mask), model.encode_video(frames, frame_mask)
        vector.check({"logits": model.similarity(text, video)}, require_all=True)


@pytest.mark.parametrize("stem", fixtures("B8*"))
def test_what_the_source_can_train_can_be_trained_here(stem):
    """Its table's combinations as options: none is refused, those that crash there included."""
    from test_options import BASE

    from engine.options import parse_options

    for row in load(stem).data["rows"]:
        flags = ["--interaction", row["interaction"], "--cdcr", str(row["cdcr"])]
        assert parse_options([*BASE, *flags, *(["--clip_evl"] if row["clip_evl"] else [])])


@pytest.mark.parametrize("stem", fixtures("C5*"))
def test_xpool(stem):
    vector = load(stem)
    model = build(weights(vector), "xpool")
    x = inputs(vector)
    ids, token_mask, frames, frame_mask = video_inputs(x)
    owner = x["owner"].numpy()
    _, first, counts = np.unique(owner, return_index=True, return_counts=True)
    with torch.no_grad():
        embeds = model.clip.encode_text(ids)[0]
        features = model.clip.encode_frames(frames, frame_mask)[0]
        text, video = model.head.text(embeds), model.head.video(features, frame_mask)
        chosen = model.head.text(embeds[first])
        sims = model.head.similarity(chosen, video)
        every = model.similarity(text, video) / model.scale()
        grid = torch.full((len(first), int(counts.max()), len(first)), float("nan"))
        for i, start in enumerate(first):
            grid[i, : counts[i]] = every[start : start + counts[i]]
        got = {
            "text_embeds": embeds[first],
            "frame_embeds": features,
            "sims_train": sims,
            "sims_eval": grid,
            "pooled": model.head.pooled(chosen, video).transpose(0, 1),
            "loss": contrastive_loss(model.scale() * sims)[None],
        } | parameter_free(embeds[first], features, vector.data)
    vector.check(got, require_all=True)
    t2v, v2t = retrieval_ranks(every, owner)
    for name, ranks in (("t2v", t2v), ("v2t", v2t)):
        want, summary = vector.data["metrics_of_sims_eval"][name], summarize(ranks)
        for key in ("R1", "R5", "R10"):
            assert summary[f"R@{key[1:]}"] == pytest.approx(want[key])
        assert (summary["MedR"], summary["MeanR"]) == pytest.approx((want["MedR"], want["MeanR"]))


def parameter_free(text: torch.Tensor, frames: torch.Tensor, data: dict) -> dict[str, torch.Tensor]:
    """The poolings that X-Pool compares itself with, on unit vectors; its mean is our meanP."""
    unit = F.normalize(text, dim=-1)
    frames = F.normalize(frames, dim=-1)
    mean = make_head("meanP", None, normalize_frames=False)
    whole = mean.video(frames, torch.ones(frames.shape[:2], dtype=torch.bool))
    scores = torch.einsum("nd,vtd->nvt", unit, frames)
    best = scores.topk(data["topk_k"], dim=-1).indices
    topk = frames[torch.arange(len(frames))[None, :, None], best].sum(dim=2)
    attended = torch.einsum("nvt,vtd->nvd", (scores / data["attention_temperature"]).softmax(dim=-1), frames)
    return {"sims_avg": unit @ whole.t()} | {
        name: torch.einsum("nd,nvd->nv", unit, F.normalize(pooled, dim=-1))
        for name, pooled in (("sims_topk", topk), ("sims_attention", attended))
    }


@pytest.mark.parametrize("stem", fixtures("C5*"))
def test_xpool_starts_as_the_identity(stem):
    vector = load(stem)
    start = make_head("xpool", CLIP(CLIP.sizes_of(split_towers(weights(vector))[0]), "gelu").head_sizes).state_dict()
    wanted = vector.data["pooling_initial_values"]
    assert set(start) == {f"pool_frames.{name}" for name in wanted}
    make = {"eye": lambda t: torch.eye(len(t)), "zeros": torch.zeros_like, "ones": torch.ones_like}
    for name, how in wanted.items():
        assert torch.equal(start[f"pool_frames.{name}"], make[how](start[f"pool_frames.{name}"])), name
