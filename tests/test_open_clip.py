"""--encoder open_clip against the library itself: a dozen of its architectures with random weights."""

import pickle
import subprocess
import sys
from pathlib import Path

import numpy as np
import open_clip
import pytest
import torch
from launching import ROOT
from open_clip.loss import SigLipLoss
from open_clip.transform import PreprocessCfg, image_transform_v2
from open_clip_models import ARCHITECTURES, CAPTIONS, flags_for, our_model, save_model, save_tiny
from PIL import Image
from torchvision.transforms import CenterCrop, Compose, InterpolationMode, Resize

from dataloaders.video import FrameSampling
from dataloaders.video.decode import read_frames
from dataloaders.video.transforms import FrameTransform
from engine.features import encoder_digest, towers_are_frozen
from engine.options import parse_options
from engine.step import trade
from modules.encoders.open_clip import OpenClip, OpenClipOptions
from modules.losses.base import Pairs
from modules.losses.sigmoid import Sigmoid
from modules.optim import freeze


def assert_close(ours: torch.Tensor, theirs: torch.Tensor) -> None:
    """Within 1e-5 of the largest number."""
    assert ours.shape == theirs.shape
    assert (ours - theirs).abs().max() <= 1e-5 * max(1, theirs.abs().max())


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_equals_the_library(name, tmp_path):
    """Frames, captions in a row that is as long as the longest, tokens, pictures, and parts for freezing."""
    theirs = save_model(name, tmp_path, vocabulary=49408 if name in ("ViT-B-32", "EVA02-B-16") else 400)
    ours = our_model(tmp_path, "--max_words", "20")
    clip = ours.clip
    side = clip.image.size
    assert (side, side) == tuple(np.broadcast_to(theirs.visual.image_size, 2))
    shown = theirs.visual.preprocess_cfg
    assert (clip.image.mean, clip.image.std) == (tuple(shown["mean"]), tuple(shown["std"]))
    assert (clip.image.resize_mode, clip.image.interpolation) == (shown["resize_mode"], shown["interpolation"])
    generator = torch.Generator().manual_seed(1)
    frames = torch.randint(0, 256, (2, 2, 3, side, side), generator=generator, dtype=torch.uint8)
    mask = torch.tensor([[True, True], [True, False]])
    normal = (frames[mask].float() / 255 - torch.tensor(shown["mean"]).view(3, 1, 1)) / torch.tensor(shown["std"]).view(
        3, 1, 1
    )
    images = {"normalize": False} if name.startswith("coca") else {}
    context = clip.head_sizes.context_length
    with torch.no_grad():
        got, whole = clip.encode_frames(frames, mask)
        assert_close(got[mask], theirs.encode_image(normal, **images))
        assert whole is None
        assert not got[1, 1].any()
        if "tokenizer" in vars(clip) or clip.sizes.tokenizer or clip.text.vocab_size == 49408:
            tokenizer = open_clip.get_tokenizer(f"local-dir:{tmp_path}")
            want = tokenizer(list(CAPTIONS), context_length=20)
            ids, token_mask = clip.tokenizer(CAPTIONS, 20)
            assert torch.equal(ids, want)
            full = tokenizer(list(CAPTIONS), context_length=context)
            full[:, :20] = torch.where(token_mask, want, full[:, :20])
        else:
            ids = torch.randint(1, 390, (4, 20), generator=generator)
            token_mask = torch.arange(20) < torch.tensor([[3], [12], [7], [9]])
            ids[torch.arange(4), token_mask.sum(dim=1) - 1] = 399
            ids = ids.masked_fill(~token_mask, 0)
        padding = (
            clip.text.config.pad_token_id
            if clip.by_transformers
            else (clip.tokenizer.padding if not clip.causal else 0)
        )
        rows = torch.nn.functional.pad(ids.masked_fill(~token_mask, padding), (0, context - 20), value=padding)
        longest = int(token_mask.sum(dim=1).max())
        pooled, tokens = clip.encode_text(ids[:, :longest], token_mask[:, :longest])
        assert_close(pooled, theirs.encode_text(rows, **images))
    if tokens is not None:
        assert tokens.shape == (len(ids), longest, clip.head_sizes.token_width)
        if clip.causal:
            assert torch.equal(tokens[torch.arange(len(ids)), token_mask.sum(dim=1) - 1], pooled)
    assert clip.activation == ("quick_gelu" if "quickgelu" in name or name == "RN50-quickgelu" else "gelu")
    assert 1 <= clip.blocks <= 40
    assert {clip.depth(n) for n, _ in clip.visual.named_parameters(prefix="visual")} == {None, *range(clip.blocks + 1)}


@pytest.mark.parametrize("model", ["ViT-B-16-SigLIP", "PE-Core-B-16", "MobileCLIP-S1", "longest"])
def test_pictures_of_real_frames(model, sample):
    """Frames of a file, beside the library's own steps with PIL (2 of 255) and torchvision's on tensors (1)."""
    tags = open_clip.list_pretrained_tags_by_model(model)
    shown = open_clip.get_pretrained_cfg(model, tags[0]) if tags else {"resize_mode": "longest"}
    shown = {key: value for key, value in shown.items() if key in ("mean", "std", "interpolation", "resize_mode")}
    config = PreprocessCfg(size=45, **shown)
    frames = read_frames(sample / "msrvtt" / "videos" / "all" / "video0.mp4", FrameSampling(max_frames=2))[:, :, :50]
    ours = FrameTransform(45, config.resize_mode, config.interpolation)(frames)
    want = torch.stack([image_transform_v2(config, is_train=False)(Image.fromarray(frame)) for frame in frames])
    mean, std = (torch.tensor(values).view(3, 1, 1) for values in (config.mean, config.std))
    assert (ours.float() - 255 * (want * std + mean)).abs().max() < 2.01
    how = InterpolationMode(config.interpolation)
    steps = {"squash": [Resize((45, 45), how)], "shortest": [Resize(45, how), CenterCrop(45)]}.get(config.resize_mode)
    if steps:
        images = torch.from_numpy(np.ascontiguousarray(frames)).permute(0, 3, 1, 2)
        assert (ours.int() - Compose(steps)(images).int()).abs().max() <= 1
    with pytest.raises(ValueError, match="resize mode must be shortest, longest or squash, got 'wide'"):
        FrameTransform(45, "wide")


@pytest.mark.parametrize(("name", "size"), [("ViT-B-32", 160), ("ViT-B-16-SigLIP", 96)])
def test_another_resolution(name, size, tmp_path):
    """Positions are interpolated as by the library: by itself for its own towers, by timm for timm's."""
    save_model(name, tmp_path)
    theirs = open_clip.create_model(f"local-dir:{tmp_path}", force_image_size=size).eval()
    ours = our_model(tmp_path, "--image_size", str(size)).clip
    images = torch.randn(2, 1, 3, size, size)
    with torch.no_grad():
        got = ours.encode_frames(images, torch.ones(2, 1, dtype=torch.bool))[0][:, 0]
        assert_close(got, theirs.encode_image(images[:, 0]))
    again = OpenClip(OpenClip.sizes_of({}, None, ours.spec["sizes"]), ours.activation)
    again.load_state_dict(again.fitted(ours.state_dict()))  # a checkpoint has the new positions already
    assert again.image.size == size


def test_longer_texts_only_if_asked(tmp_path):
    save_model("ViT-B-32", tmp_path)
    ours = our_model(tmp_path, "--context_length", "248", "--max_words", "200").clip
    assert ours.text.positional_embedding.shape[0] == ours.head_sizes.context_length == 248
    short = our_model(tmp_path).clip
    ids = torch.randint(1, 390, (2, 12))
    ids[:, -1] = 399
    with torch.no_grad():
        mask = torch.ones(2, 12, dtype=torch.bool)
        assert_close(ours.encode_text(ids, mask)[0], short.encode_text(ids, mask)[0])


def test_heads_start_from_the_text_tower_or_say_what_they_lack(tmp_path):
    save_model("ViT-B-16-SigLIP", tmp_path / "siglip")
    train = ["--do_train", "--cross_num_hidden_layers", "1"]
    model = our_model(tmp_path / "siglip", *train, "--sim_header", "seqTransf", "--interaction", "wti")
    start, block = model.head.temporal.transformerClip.resblocks[0], model.clip.text.transformer.resblocks[0]
    assert torch.equal(start.mlp.c_fc.weight, block.mlp.c_fc.weight)
    assert torch.equal(model.head.temporal.frame_position_embeddings.weight, model.clip.text.positional_embedding)
    save_model("xlm-roberta-base-ViT-B-32", tmp_path / "roberta")
    with pytest.raises(
        RuntimeError, match="--interaction ti compares words with frames, and this text tower makes one"
    ):
        our_model(tmp_path / "roberta", "--interaction", "ti")
    with pytest.raises(RuntimeError, match="the text positions of roberta cannot be stretched; leave it out"):
        our_model(tmp_path / "roberta", "--context_length", "248")
    our_model(tmp_path / "roberta", *train, "--sim_header", "seqTransf")  # no tower to start from: at random


def test_batch_statistics_do_not_count(tmp_path):
    """BatchNorm reads what it was trained with, and keeps it."""
    save_model("RN50", tmp_path)
    clip = our_model(tmp_path).clip
    frames, mask = torch.randn(2, 1, 3, 64, 64), torch.ones(2, 1, dtype=torch.bool)
    with torch.no_grad():
        want = clip.encode_frames(frames, mask)[0]
        before = {name: value.clone() for name, value in clip.named_buffers()}
        assert torch.equal(clip.train().encode_frames(frames, mask)[0], want)
    assert clip.visual.training
    assert all(torch.equal(value, before[name]) for name, value in clip.named_buffers())


@pytest.mark.parametrize("name", ["ViT-B-32", "ViT-B-16-SigLIP"])
def test_recomputed_activations_change_nothing(name, tmp_path):
    """--grad_checkpointing, in the library's towers and in timm's: the same gradient."""
    save_tiny(name, tmp_path)
    model, gradients = our_model(tmp_path).train(), []
    frames, mask = torch.randn(2, 1, 3, 32, 32), torch.ones(2, 1, dtype=torch.bool)
    ids = torch.randint(1, 390, (2, 8))
    for recompute in (False, True):
        trade(model, torch.device("cpu"), recompute, compile_blocks=False)
        model(ids, torch.ones_like(ids, dtype=torch.bool), frames, mask).backward()
        gradients.append({name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None})
        model.zero_grad()
    assert any(getattr(module, "grad_checkpointing", False) for module in model.clip.visual.modules())
    assert gradients[0].keys() == gradients[1].keys()
    for name, gradient in gradients[0].items():
        torch.testing.assert_close(gradients[1][name], gradient, rtol=1e-5, atol=1e-5 * float(gradient.abs().max()))


def test_scale_and_bias_of_the_logits_train_where_both_towers_are_frozen(tmp_path):
    """No feature depends on them: neither what is kept of a frozen encoder nor the name that it is kept under."""
    save_tiny("ViT-B-16-SigLIP", tmp_path, init_logit_bias=-10)
    clip = (model := our_model(tmp_path, "--do_train", "--loss", "sigmoid")).clip
    assert not towers_are_frozen(model)
    freeze(clip, clip.blocks + 1)
    assert {name for name, p in clip.named_parameters() if p.requires_grad} == {"logit_scale", "logit_bias"}
    assert towers_are_frozen(model)
    before = encoder_digest(model, ())
    with torch.no_grad():
        clip.logit_bias += 1
        assert encoder_digest(model, ()) == before
        clip.text.ln_final.bias += 1
    assert encoder_digest(model, ()) != before


def test_the_sigmoid_loss_is_the_librarys():
    """And by hand: two pairs with logits 0 and bias 0 cost four times log 2, over 2."""
    generator = torch.Generator().manual_seed(0)
    text, video = (torch.nn.functional.normalize(torch.randn(6, 8, generator=generator), dim=-1) for _ in range(2))
    scale, bias = torch.tensor(11.0), torch.tensor(-3.0)
    got = Sigmoid()(Pairs(scale * text @ video.T, text, video, None, bias=bias))
    torch.testing.assert_close(got, SigLipLoss()(video, text, scale, bias))
    nothing = Sigmoid()(Pairs(torch.zeros(2, 2), None, None, None, bias=torch.tensor(0.0)))
    assert nothing.item() == pytest.approx(2 * np.log(2))


def known(name: str, weights: str | None = None) -> tuple[str, dict]:
    """What would be fetched, and what is known of it."""
    fetched = []
    found = OpenClip.find(
        name, OpenClipOptions(open_clip_weights=weights), lambda n: fetched.append(n) or Path("w.bin")
    )
    return fetched[0], found[1]["encoder"]["sizes"]


def test_names_and_tags_of_the_librarys_list(tmp_path):
    name, sizes = known("ViT-B/16-SigLIP", "webli")
    assert name == "hf-hub:timm/ViT-B-16-SigLIP"
    assert sizes["preprocess_cfg"]["mean"] == (0.5, 0.5, 0.5)
    assert (sizes["preprocess_cfg"]["resize_mode"], sizes["tokenizer"]) == ("squash", "timm/ViT-B-16-SigLIP")
    assert known("ViT-H-14", "laion2B-s32B-b79K")[0] == "hf-hub:laion/CLIP-ViT-H-14-laion2B-s32B-b79K"
    assert known("ViT-B-32-quickgelu", "openai")[1]["model_cfg"]["quick_gelu"]
    for arguments, message in {
        ("ViT-B-32", "openai"): "has another activation than ViT-B-32; give ViT-B-32-quickgelu",
        ("ViT-B-32-quickgelu", "laion2b_s34b_b79k"): "is neither a file nor a tag",
        ("ViT-B-32-SigLIP2", "webli"): "no model of open_clip's list; near to it: ViT-B-32-SigLIP2-256",
        ("ViT-B-16-SigLIP", None): "needs --open_clip_weights, a tag or a file; tags of ViT-B-16-SigLIP: webli",
        (str(tmp_path), "webli"): "has weights of its own; leave it out",
    }.items():
        with pytest.raises(ValueError, match=message):
            known(*arguments)
    file = (
        tmp_path / "siglip.safetensors"
    )  # a file without a configuration: pictures as all tags of the model have them
    file.touch()
    found = OpenClip.find("ViT-B-16-SigLIP", OpenClipOptions(open_clip_weights=str(file)), Path)
    assert found[0] == file
    assert found[1]["encoder"]["sizes"]["preprocess_cfg"]["resize_mode"] == "squash"


def test_the_tokenizer_travels_and_is_asked_for(tmp_path):
    save_model("ViT-B-16-SigLIP", tmp_path)
    tokenizer = our_model(tmp_path).clip.tokenizer
    again = pickle.loads(pickle.dumps(tokenizer))
    for want, got in zip(tokenizer(CAPTIONS, 32), again(CAPTIONS, 32)):
        assert torch.equal(want, got)
    ids, mask = tokenizer(["", "a red square"], 8)
    assert mask.sum(dim=1).tolist() == [1, 4]  # the end of a text counts, the same token behind it does not
    assert (ids[0] == tokenizer.padding).all()
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    for file in (*tmp_path.glob("tokenizer*"), tmp_path / "special_tokens_map.json"):
        if file.exists():
            file.rename(elsewhere / file.name)
    model = our_model(tmp_path, "--open_clip_tokenizer", str(elsewhere))
    assert torch.equal(model.clip.tokenizer(CAPTIONS, 32)[0], tokenizer(CAPTIONS, 32)[0])
    assert model.clip.spec["sizes"]["tokenizer"] == str(elsewhere)


WITHOUT = """
import sys
for name in ("open_clip", "timm", "transformers"):
    sys.modules[name] = None  # as if it were not installed: importing it fails
from main_task_retrieval import main

assert main(sys.argv[1:]) == 0
sys.exit(main([*sys.argv[1:], "--encoder", "open_clip"]))
"""


def test_without_the_extra(msrvtt_flags):
    """All else works, and asking for it says which command installs it."""
    command = [sys.executable, "-c", WITHOUT, "--do_eval", *msrvtt_flags]
    ended = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert ended.returncode == 2, ended.stderr
    told = "--encoder open_clip needs open_clip and timm and transformers, not installed here: "
    assert ended.stderr.endswith(f"{told}pip install -r requirements-open_clip.txt\n")
    assert (ROOT / "requirements-open_clip.txt").exists()


def test_flags_belong_to_the_encoder(tmp_path, capsys):
    with pytest.raises(SystemExit):
        parse_options([*flags_for(tmp_path, "--image_heads", "16")])
    assert (
        "--image_heads 16 belongs to --encoder clip or --clip_evl, got --encoder open_clip" in capsys.readouterr().err
    )
