"""Temporal parts of --clip_evl that no file holds start from nothing: they learn at --lr, not at CLIP's small rate."""

import torch

from engine.build import build_model, checkpoint_tensors, find_weights
from engine.compat import COMPAT
from engine.options import parse_options
from engine.step import build_optimizer
from modules.encoders.internvideo import VideoCLIP

PARTS = tuple(f"clip.{part}" for part in VideoCLIP.own_parts)


def rates(flags, *more):
    """Name -> learning rate of every parameter that trains, as a run with these flags would have it."""
    options = parse_options([*flags, "--do_train", "--clip_evl", "--lr", "1e-3", "--coef_lr", "1e-2", *more])
    model = build_model(options, find_weights(options))
    groups = build_optimizer(model, options.train, COMPAT[options.model.compat], 10).param_groups
    return {name: group["lr"] for group in groups for name in group["names"]}, model


def test_parts_from_nothing_learn_at_lr(msrvtt_flags):
    found, _ = rates(msrvtt_flags)
    temporal = {name for name in found if name.startswith(PARTS)}
    assert "clip.visual.transformer.dpe.0.weight" in temporal
    assert {found[name] for name in temporal} == {1e-3}
    assert {found[name] for name in found.keys() - temporal} == {1e-5}


def test_parts_out_of_a_file_learn_as_clip_does(msrvtt_flags, tmp_path):
    _, model = rates(msrvtt_flags)
    torch.save(checkpoint_tensors(model), tmp_path / "trained.pt")
    found, _ = rates(msrvtt_flags, "--init_model", str(tmp_path / "trained.pt"))
    assert set(found.values()) == {1e-5}


def test_compat_keeps_the_source_rate(msrvtt_flags):
    found, _ = rates(msrvtt_flags, "--compat", "internvideo")
    assert set(found.values()) == {1e-5}
