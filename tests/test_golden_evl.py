"""InternVideo's video tower, its checkpoints and their merging against numbers of the InternVideo reference."""

import re

import pytest
import torch
import torch.nn.functional as F
from golden_vectors import fixtures, inputs, load, recipe, weights
from torch import nn

from checkpoints.names import NamedTensors, canonical_names, merge, parameter_name, split_towers, unwrap
from checkpoints.read import CheckpointError, load_strict
from engine.build import missing_own_parts
from modules.encoders import ENCODERS
from modules.encoders.base import Conventions
from modules.encoders.clip import CLIP
from modules.encoders.internvideo import VideoCLIP, VideoClipSizes
from modules.losses.contrastive import contrastive_loss
from modules.optim import freeze, parameter_groups

WHOLE = fixtures("B1_*")
UNUSED = "text_mask_embedding"
ENCODERS_KNOWN = list(ENCODERS.values())


def build(tensors: dict[str, torch.Tensor]) -> VideoCLIP:
    """Tensors under InternVideo's names -> the tower in evaluation mode; heads are left out."""
    towers = split_towers(tensors)[0]
    clip = VideoCLIP(VideoCLIP.sizes_of(towers), "quick_gelu").eval()
    load_strict(clip, towers, "golden vector")
    return clip


def encode_video(
    clip: VideoCLIP, frames: torch.Tensor, mask: torch.Tensor, source_padding: bool = False, source_frames: int = 0
) -> tuple[torch.Tensor, torch.Tensor]:
    """Videos and frames; with `source_padding` as InternVideo does with padding."""
    clip.conventions = Conventions(read_padding=source_padding, source_frames=source_frames)
    return clip.encode_frames(frames, mask)[::-1]


def encode_image(clip: CLIP, images: torch.Tensor) -> torch.Tensor:
    """Each image as a clip of one frame."""
    frames, whole = clip.encode_frames(images[:, None], torch.ones(len(images), 1, dtype=torch.bool))
    return frames[:, 0] if whole is None else whole


def video_inputs(vector) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    x = inputs(vector)
    return x["input_ids"], x["video"].squeeze(3).squeeze(1), x["video_mask"].bool()


def some_clips(clip: VideoCLIP) -> tuple[torch.Tensor, torch.Tensor]:
    """Three clips of 4, 2 and 3 different frames."""
    side = clip.sizes.image_resolution
    frames = torch.randn(3, 4, 3, side, side, generator=torch.Generator().manual_seed(0))
    return frames, torch.arange(4) < torch.tensor([[4], [2], [3]])


def cosines(text: torch.Tensor, video: torch.Tensor) -> torch.Tensor:
    return F.normalize(text, dim=-1) @ F.normalize(video, dim=-1).t()


@pytest.mark.parametrize("stem", WHOLE)
def test_features_logits_loss_and_gradients(stem):
    vector = load(stem)
    clip = build(weights(vector))
    assert list(clip.sizes.read_after) == vector.config["return_list"]
    ids, frames, mask = video_inputs(vector)
    last = []
    hook = clip.visual.transformer.resblocks[-1].register_forward_hook(lambda *call: last.append(call[2].detach()))
    text, (video, features) = clip.encode_text(ids)[0], encode_video(clip, frames, mask, source_padding=True)
    hook.remove()
    tokens = last[0].unflatten(0, mask.shape)
    logits = clip.logit_scale.exp() * cosines(text, video)
    loss = contrastive_loss(logits)
    loss.backward()
    gradients = {f"clip.{n}": p.grad for n, p in clip.named_parameters() if p.grad is not None}
    with torch.no_grad():
        first = encode_image(clip, frames[:, 0])
        got = {
            "evl_output": video,
            "frame_cls": tokens[:, :, 0],
            "frame0_tokens": tokens[0, 0],
            "frame_features": features,
            "evl_output_image_mode": first,
            "text_features": text,
            "text_all": clip.text_tokens(ids),
            "logits": logits,
            "train_loss": loss[None],
            "grad_norms": torch.stack([gradients[name].norm() for name in vector.data["grad_norm_params"]]),
            "grad_norm_total": torch.stack([g.norm() for g in gradients.values()]).norm()[None],
        }
        vector.check({k: v.detach() for k, v in got.items()}, require_all=True)
    without = {f"clip.{n}" for n, p in clip.named_parameters() if p.grad is None}
    assert without == set(vector.data["params_without_gradient"])
    zero = [name for name, grad in gradients.items() if not grad.any()]
    assert not zero, f"a gradient of zeros everywhere: {zero}"


@pytest.mark.parametrize("stem", fixtures("B2_*_evl"))
def test_tokens_for_the_interactions(stem):
    """wti takes the frames' features, ti the whole video's."""
    vector = load(stem)
    clip = build(weights(vector))
    _, frames, mask = video_inputs(vector)
    with torch.no_grad():
        video, features = encode_video(clip, frames, mask, source_padding=True)
    whole = vector.config["interaction"] == "ti"
    vector.check({"visual_output": video[:, None] if whole else features})


@pytest.mark.parametrize("stem", fixtures("B9_real_*"))
def test_real_sizes(stem):
    vector = load(stem)
    clip = build(weights(vector))
    assert list(clip.sizes.read_after) == vector.config["return_list"]
    assert clip.sizes.vision_heads == vector.config["vision_width"] // 64
    ids, frames, mask = video_inputs(vector)
    with torch.no_grad():
        text, (video, features) = clip.encode_text(ids)[0], encode_video(clip, frames, mask, source_padding=True)
        logits = clip.logit_scale.exp() * cosines(text, video)
    vector.check(
        {"evl_output": video, "frame_features": features, "text_features": text, "logits": logits}, require_all=True
    )


@pytest.mark.parametrize("stem", WHOLE)
def test_padding_cannot_matter(stem):
    clip = build(weights(load(stem)))
    frames, mask = some_clips(clip)
    with torch.no_grad():
        video, features = encode_video(clip, frames, mask)
        spoiled = frames.masked_fill(~mask[..., None, None, None], torch.nan)
        assert all(map(torch.equal, encode_video(clip, spoiled, mask), (video, features)))
        longer = F.pad(frames, (0, 0, 0, 0, 0, 0, 0, 3)), F.pad(mask, (0, 3))
        torch.testing.assert_close(encode_video(clip, *longer)[0], video, rtol=1e-5, atol=1e-5)
        for i, row in enumerate(mask):
            alone, alone_features = encode_video(clip, frames[i : i + 1, row], mask[i : i + 1, row])
            torch.testing.assert_close(alone[0], video[i], rtol=1e-5, atol=1e-5)
            torch.testing.assert_close(alone_features[0], features[i, row], rtol=1e-5, atol=1e-5)
            assert not features[i, ~row].any()
        source = encode_video(clip, frames, mask, source_padding=True)[0]
    assert ((source - video)[1:].abs().amax(dim=1) > 0.01).all(), "the source's padding must matter"
    torch.testing.assert_close(source[0], video[0], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("stem", WHOLE)
def test_a_gap_among_the_frames_is_closed(stem):
    clip = build(weights(load(stem)))
    frames, _ = some_clips(clip)
    gap = torch.tensor([True, False, True, True])
    with torch.no_grad():
        video, features = encode_video(clip, frames, gap.expand(3, 4))
        want, want_features = encode_video(clip, frames[:, gap], torch.ones(3, 3, dtype=torch.bool))
    torch.testing.assert_close(video, want, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(features[:, gap], want_features, rtol=1e-5, atol=1e-5)
    assert not features[:, 1].any()


@pytest.mark.parametrize("stem", WHOLE)
def test_source_padding_is_normalised_zeros_up_to_a_fixed_length(stem):
    """uint8 frames as they come from our loader, padded to the batch, score as the source's padded to max_frames."""
    clip = build(weights(load(stem)))
    side = clip.sizes.image_resolution
    frames = torch.randint(0, 256, (2, 2, 3, side, side), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    mask = torch.tensor([[True, True], [True, False]])
    with torch.no_grad():
        got, features = encode_video(clip, frames, mask, source_padding=True, source_frames=4)
        as_loaded = torch.zeros(2, 4, 3, side, side)
        as_loaded[:, :2][mask] = clip.normalize(frames)[mask]
        want = encode_video(clip, as_loaded, torch.ones(2, 4, dtype=torch.bool))[0]
    assert features.shape[:2] == (2, 4)
    torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("stem", WHOLE)
def test_the_order_of_frames_matters(stem):
    clip = build(weights(load(stem)))
    frames, mask = some_clips(clip)
    with torch.no_grad():
        forth, back = (encode_video(clip, x, mask[:1])[0] for x in (frames[:1], frames[:1].flip(1)))
    assert (forth - back).abs().max() > 1e-3


@pytest.mark.parametrize("stem", WHOLE)
def test_bf16_autocast_is_close(stem):
    vector = load(stem)
    clip = build(weights(vector))
    ids, frames, mask = video_inputs(vector)
    with torch.no_grad():
        want = cosines(clip.encode_text(ids)[0], encode_video(clip, frames, mask)[0])
        with torch.autocast("cpu", torch.bfloat16):
            text, (video, _) = clip.encode_text(ids)[0], encode_video(clip, frames, mask)
    torch.testing.assert_close(cosines(text.float(), video.float()), want, rtol=0, atol=0.01)


@pytest.mark.parametrize("stem", WHOLE)
def test_the_tower_compiles_without_a_break(stem):
    """Only the packing of frames, before the tower, depends on the mask's values."""
    clip = build(weights(load(stem)))
    frames, mask = some_clips(clip)
    with torch.no_grad():
        want = encode_video(clip, frames, mask)[0]
        clip.visual = torch.compile(clip.visual, fullgraph=True, backend="aot_eager")
        torch.testing.assert_close(encode_video(clip, frames, mask)[0], want, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("stem", WHOLE)
def test_wrong_input_is_refused(stem):
    clip = build(weights(load(stem)))
    side, length = clip.sizes.image_resolution, clip.sizes.context_length + 1
    with pytest.raises(ValueError, match=r"without a single frame in the batch, at \[1\]"):
        encode_video(clip, torch.zeros(2, 1, 3, side, side), torch.tensor([[True], [False]]))
    with pytest.raises(ValueError, match=f"{side}x{side} pixels"):
        encode_video(clip, torch.zeros(1, 1, 3, 16, 16), torch.tensor([[True]]))
    with pytest.raises(ValueError, match=f"--max_words {length}"):
        clip.text_tokens(torch.zeros(1, length, dtype=torch.long))


# Checkpoints: names, spellings, merging.


@pytest.mark.parametrize("stem", fixtures("B5*"))
@pytest.mark.parametrize("size", ["ViT-B/16", "ViT-L/14"])
def test_names_and_shapes_of_the_real_sizes(stem, size):
    table = load(stem).data[size]
    with torch.device("meta"):
        shapes = {k: torch.empty(v) for k, v in table["clip_evl_model"].items()}
        clip = VideoCLIP(VideoCLIP.sizes_of(shapes), "quick_gelu")
        released = {k: torch.empty(v) for k, v in table["openai_clip"].items()}
        plain = VideoCLIP.adapted(released)
        assert VideoCLIP.sizes_of(plain) == clip.sizes
    own = {k: list(v.shape) for k, v in clip.state_dict().items()}
    assert own == table["clip_evl_model"]
    assert sum(p.numel() for p in clip.parameters()) == table["n_parameters"]
    missing = {k for k in own if k not in plain}
    assert missing == missing_own_parts(clip, released).keys()
    assert missing | {UNUSED} == set(table["only_in_evl"]) - OTHER_NAMES


def spelled(tensors: dict[str, torch.Tensor], case: str) -> dict[str, torch.Tensor]:
    """The vector's weights, which are spelled the standard way, as the case's title says."""
    if "visual.proj / visual.ln_post" in case:
        tensors = {
            k.replace("visual_proj", "visual.proj").replace("visual_ln_post", "visual.ln_post"): v
            for k, v in tensors.items()
        }
    if "visual.proj missing" in case:
        tensors = {k: v for k, v in tensors.items() if k != "clip.visual_proj"}
    if "balance missing" in case:
        tensors = {k: v for k, v in tensors.items() if not re.search(r"\.dpe\.|\.dec\.|temporal_cls|balance", k)}
    if "conv1 4-D" in case:
        tensors = tensors | {"clip.visual.conv1.weight": tensors["clip.visual.conv1.weight"].squeeze(2)}
    if case.startswith("no prefix"):
        tensors = {k.removeprefix("clip."): v for k, v in tensors.items()}
    if "extra keys" in case:
        tensors = tensors | {"caption_decoder.x": torch.ones(2), "queue_text": torch.ones(2)}
    return tensors


def read(tensors: dict[str, torch.Tensor]) -> NamedTensors:
    """As a Lightning checkpoint holds them."""
    named = canonical_names(unwrap({"state_dict": tensors, "epoch": 3}), ENCODERS_KNOWN)
    assert named.encoder == "internvideo"
    return named


def as_loaded(named: NamedTensors) -> dict[str, torch.Tensor]:
    """All tensors, those of the tower as the encoder takes them."""
    towers, rest = split_towers(named.tensors)
    return {f"clip.{k}": v for k, v in VideoCLIP.adapted(towers).items()} | rest


@pytest.mark.parametrize("stem", fixtures("B6*"))
def test_spellings(stem):
    """What the reference loads equals ours; of what it refuses we load patch weights without time, and say the rest."""
    vector = load(stem)
    standard = weights(vector)
    for case, found in vector.data.items():
        if case == "visual.proj missing and visual_proj missing":
            with pytest.raises(CheckpointError, match="without visual.proj"):
                read(spelled(standard, case))
            continue
        named = read(spelled(standard, case))
        loaded = as_loaded(named)
        got = {k: v for k, v in loaded.items() if k.startswith("clip.")}
        heads = loaded.keys() - got.keys()
        assert heads == ({"caption_decoder.x", "queue_text"} if "extra keys" in case else set())
        different = {k for k, v in standard.items() if k not in got or not torch.equal(got[k], v)}
        if "balance missing" in case:
            assert set(found["differs"]) <= different
            assert all(re.search(r"\.dpe\.|\.dec\.|temporal_cls|balance", k) for k in different)
        else:
            assert not different, case
            assert set(got) == set(standard), case
            assert found.get("same_as_standard", True) or "raises" in found


@pytest.mark.parametrize("stem", fixtures("B6*"))
def test_only_a_prefix_at_the_front_is_removed(stem):
    tensors = weights(load(stem)) | {"head.clip.weight": torch.ones(1)}
    assert "head.clip.weight" in read(tensors).tensors


@pytest.mark.parametrize("stem", fixtures("B6*"))
def test_what_we_save_loads_back(stem):
    tensors = weights(load(stem))
    saved = {f"clip.{k}": v for k, v in build(tensors).state_dict().items()}
    again = read(saved).tensors
    assert set(again) == set(tensors)
    assert all(torch.equal(again[k], v) for k, v in tensors.items())


@pytest.mark.parametrize("stem", fixtures("B4*"))
def test_mergeclip(stem):
    vector = load(stem)
    upstream, clip = towers_to_merge(vector)
    for case, want in vector.data["cases"].items():
        got = upstream if case == "None" else merge(upstream, clip, float(case), VIDEO_PARTS)
        got = {f"clip.{k}": v for k, v in got.items()}
        before = {f"clip.{k}": v for k, v in upstream.items()}
        assert set(got) == set(before)
        for key, numbers in want["checksums"].items():
            scale = max(1.0, numbers[1])
            assert recipe.checksum(got[key]) == pytest.approx(numbers, rel=1e-5, abs=1e-6 * scale), (case, key)
        changed = {k for k in got if got[k] is not before[k]}
        merged = want["merged"]
        assert changed == set(merged) if isinstance(merged, list) else len(changed) == merged
        if want["not_merged"] is not None:
            assert set(before) - changed == set(want["not_merged"])
            assert {f"clip.{k}" for k in OTHER_NAMES} <= set(want["not_merged"])


OTHER_NAMES = set(VideoCLIP.renamed.values())
VIDEO_PARTS = (*OTHER_NAMES, *VideoCLIP.own_parts)


def towers_to_merge(vector) -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor]]:
    """InternVideo's tower and the CLIP, both under the names of the video tower."""
    both = (canonical_names(weights_of(vector, f"weights_{n}"), ENCODERS_KNOWN) for n in ("upstream", "clip"))
    return tuple(VideoCLIP.adapted(split_towers(named.tensors)[0]) for named in both)


def weights_of(vector, name: str) -> dict[str, torch.Tensor]:
    return {k: torch.as_tensor(v) for k, v in vector.weights(name).items()}


@pytest.mark.parametrize("stem", fixtures("B4*"))
def test_mergeclip_refuses_another_size(stem):
    vector = load(stem)
    upstream, clip = towers_to_merge(vector)
    with pytest.raises(CheckpointError, match=r"same size.*clip\.ln_final\.bias \[\d+\] and \[3\]"):
        merge(upstream, clip | {"ln_final.bias": torch.zeros(3)}, 0.5, VIDEO_PARTS)
    shallow = {k: v for k, v in clip.items() if "resblocks.2." not in k}
    with pytest.raises(CheckpointError, match=r"clip\.visual\.transformer\.resblocks\.2\..* only in the file"):
        merge(upstream, shallow, 0.5, VIDEO_PARTS)


@pytest.mark.parametrize("stem", fixtures("B4*"))
def test_a_plain_clip_starts_the_tower_as_the_mean_of_frames(stem):
    """With its temporal parts at initial values a clip of one frame gives what CLIP's image tower gives."""
    towers = split_towers(canonical_names(weights_of(load(stem), "weights_clip")).tensors)[0]
    plain = CLIP(CLIP.sizes_of(towers), "quick_gelu").eval()
    load_strict(plain, towers, "golden vector")
    start = VideoCLIP.adapted(towers)
    model = VideoCLIP(VideoCLIP.sizes_of(start), "quick_gelu").eval()
    new = missing_own_parts(model, towers)
    assert len(new.keys() - {UNUSED}) == 66
    load_strict(model, start | new, "tiny.pt")
    images = some_clips(model)[0][:, 0]
    with torch.no_grad():
        torch.testing.assert_close(encode_image(model, images), encode_image(plain, images), rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("stem", fixtures("B4*"))
def test_half_a_temporal_decoder_is_not_filled_up(stem):
    tensors = weights_of(load(stem), "weights_upstream")
    model = build(tensors)
    del tensors[f"clip.{UNUSED}"], tensors["clip.visual.transformer.balance"]
    towers = split_towers(tensors)[0]
    assert not missing_own_parts(model, towers)
    with pytest.raises(CheckpointError, match=r"1 missing in the file: visual\.transformer\.balance"):
        load_strict(model, VideoCLIP.adapted(towers), "cut.bin")


# Optimizer groups and freezing.

# Frozen by the source only because its list of always-trained names does not know this tower's names.
FROZEN_BY_ACCIDENT = {
    "visual_proj",
    "visual_ln_post.weight",
    "visual_ln_post.bias",
    "visual.transformer.temporal_cls_token",
    "visual.transformer.balance",
}


def empty_model(config: dict) -> nn.ModuleDict:
    sizes = VideoClipSizes(
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
        read_after=tuple(config["return_list"]),
    )
    return nn.ModuleDict({"clip": VideoCLIP(sizes, "quick_gelu")})


@pytest.mark.parametrize("stem", fixtures("B10*"))
def test_freezing_by_meaning(stem):
    """The source's list less its accidents: projection, last LayerNorm and temporal parts always train."""
    vector = load(stem)
    for case, want in vector.data["freeze"].items():
        clip = empty_model(vector.config)["clip"]
        frozen = set(freeze(clip, int(case.partition("=")[2])))
        assert {n for n, p in clip.named_parameters() if not p.requires_grad} == frozen | {UNUSED}
        blocks = {int(n.split("resblocks.")[1].split(".")[0]) for n in frozen if n.startswith("visual.transformer.")}
        assert blocks == set(want["frozen"]["blocks"]["visual.transformer.resblocks."])
        assert {n for n in frozen if "resblocks" not in n} == (
            set(want["frozen"]["names"]) - FROZEN_BY_ACCIDENT - {UNUSED}
        )
        n_accidents = len((FROZEN_BY_ACCIDENT | {UNUSED}) & set(want["frozen"]["names"]))
        assert len(frozen) == want["n_frozen"] - n_accidents


@pytest.mark.parametrize("stem", fixtures("B10*"))
def test_groups_as_in_the_source(stem):
    vector = load(stem)
    config = vector.config
    groups = parameter_groups(
        [(parameter_name(n), p) for n, p in empty_model(config).named_parameters()],
        config["lr"],
        config["coef_lr"],
        0.2,
        decays_all=True,
    )
    for group, want in zip(groups, vector.data["groups"]):
        names = {n for n in want["names_block0_only"] if n.startswith("clip.")} - {f"clip.{UNUSED}"}
        first = {n for n in group["names"] if not re.search(r"\.(resblocks|dpe|dec)\.(?!0\.)", n)}
        assert first == names
        if names:
            assert len(group["names"]) == want["n"] - (f"clip.{UNUSED}" in want["names_block0_only"])
            assert group["lr"] == pytest.approx(want["lr"])
            assert group["weight_decay"] == want["weight_decay"]
