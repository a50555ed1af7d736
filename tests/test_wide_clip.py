"""CLIPs wider than OpenAI's, at other resolutions and context lengths, against open_clip on the same random weights."""

import json
from dataclasses import replace

import pytest
import torch
from open_clip import get_model_config, load_checkpoint
from open_clip.model import CLIP as OpenClip
from safetensors.torch import save_file
from test_clip import image_features
from transformers import CLIPConfig, CLIPModel

from checkpoints.names import split_towers
from checkpoints.read import read_checkpoint
from modules.encoders.clip import CLIP, stretched

# The architecture of each in open_clip's own configuration; one block a tower, fewer words, and small pictures.
WIDE = ("ViT-H-14", "ViT-g-14", "ViT-bigG-14", "ViT-H-14-quickgelu", "ViT-B-32-plus-256", "ViT-L-14-336")


def reduced(name: str, **vision) -> dict:
    config = get_model_config(name)
    patch = config["vision_cfg"]["patch_size"]
    config["vision_cfg"] |= {"layers": 1, "image_size": 3 * patch} | vision
    config["text_cfg"] |= {"layers": 1, "vocab_size": 500}
    return config


def theirs_of(config: dict) -> torch.nn.Module:
    torch.manual_seed(3)
    model = OpenClip(**config).eval()
    with torch.no_grad():  # LayerNorm starts as the identity and biases as zero: make them count
        for parameter in model.parameters():
            if parameter.ndim == 1:
                parameter.add_(0.1 * torch.randn_like(parameter))
    return model


def ours_of(path, **options) -> CLIP:
    checkpoint = read_checkpoint(path)
    own = CLIP.Options(**options)
    towers = split_towers(checkpoint.tensors)[0]
    clip = CLIP(CLIP.sizes_of(towers, own, checkpoint.told), checkpoint.activation or "gelu", own).eval()
    clip.load_state_dict(clip.fitted(towers))
    return clip


def captions(length: int, vocabulary: int) -> torch.Tensor:
    torch.manual_seed(4)
    ids = torch.randint(1, vocabulary - 1, (3, length))
    for row, end in enumerate((2, length // 2, length - 1)):
        ids[row, end], ids[row, end + 1 :] = vocabulary - 1, 0
    return ids


def assert_equal(ours: CLIP, theirs: torch.nn.Module) -> None:
    side = ours.sizes.image_resolution
    images, ids = torch.randn(2, 3, side, side), captions(ours.sizes.context_length, ours.sizes.vocab_size)
    with torch.no_grad():
        torch.testing.assert_close(image_features(ours, images), theirs.encode_image(images), rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(ours.encode_text(ids)[0], theirs.encode_text(ids), rtol=1e-5, atol=1e-5)


def save(folder, config: dict, model: torch.nn.Module) -> None:
    save_file({k: v.contiguous() for k, v in model.state_dict().items()}, folder / "open_clip_model.safetensors")
    (folder / "open_clip_config.json").write_text(json.dumps({"model_cfg": config, "preprocess_cfg": {}}))


@pytest.mark.parametrize("name", WIDE)
def test_equals_open_clip(name, tmp_path):
    """Heads by the configuration beside the weights, MLPs by the weights: 80, 88 and 104 wide, 6144 and 8192 within."""
    config = reduced(name)
    theirs = theirs_of(config)
    save(tmp_path, config, theirs)
    ours = ours_of(tmp_path)
    width = config["vision_cfg"]["width"]
    assert ours.sizes.vision_heads == width // config["vision_cfg"].get("head_width", 64)
    assert (ours.sizes.vision_mlp or 4 * width) == theirs.visual.transformer.resblocks[0].mlp.c_fc.out_features
    assert_equal(ours, theirs)
    assert ours.activation == ("quick_gelu" if "quickgelu" in name else "gelu")
    if name == "ViT-bigG-14":
        assert (ours.tower, ours.sizes.vision_heads, ours.sizes.vision_mlp) == ("CLIP ViT-bigG/14", 16, 8192)


def test_heads_by_flag_where_nothing_tells(tmp_path):
    config = reduced("ViT-H-14")
    theirs = theirs_of(config)
    save(tmp_path, config, theirs)
    (tmp_path / "open_clip_config.json").unlink()
    with pytest.raises(ValueError, match="1280 wide, and weights do not show its attention heads: give --image_heads"):
        ours_of(tmp_path)
    with pytest.raises(ValueError, match="1280 wide, 7 heads do not divide it; give --image_heads"):
        ours_of(tmp_path, image_heads=7)
    assert_equal(ours_of(tmp_path, image_heads=16), theirs)
    wrong = ours_of(tmp_path, image_heads=20)  # loads as well: nothing but the features would show it
    images = torch.randn(1, 3, 42, 42)
    with torch.no_grad():
        assert (image_features(wrong, images) - theirs.encode_image(images)).abs().max() > 1e-3


def test_hugging_face_tells_its_heads(tmp_path):
    text = {"hidden_size": 64, "intermediate_size": 128, "num_attention_heads": 1, "num_hidden_layers": 1}
    vision = {"hidden_size": 1280, "intermediate_size": 5120, "num_attention_heads": 16, "num_hidden_layers": 1}
    vision |= {"image_size": 28, "patch_size": 14}
    text |= {"vocab_size": 100, "eos_token_id": 99, "bos_token_id": 98, "max_position_embeddings": 16}
    config = CLIPConfig(text_config=text, vision_config=vision, projection_dim=32)
    for part in (config.text_config, config.vision_config):
        part.hidden_act = "gelu"
    torch.manual_seed(0)
    theirs = CLIPModel(config).eval()
    theirs.save_pretrained(tmp_path)
    ours, images, ids = ours_of(tmp_path), torch.randn(2, 3, 28, 28), captions(16, 100)
    assert (ours.sizes.vision_heads, ours.sizes.text_mlp) == (16, 128)
    with torch.no_grad():
        out = theirs(input_ids=ids, pixel_values=images)
        unit = torch.nn.functional.normalize
        torch.testing.assert_close(unit(image_features(ours, images), dim=-1), out.image_embeds, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(unit(ours.encode_text(ids)[0], dim=-1), out.text_embeds, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("grid", [2, 5])
def test_another_resolution_as_in_open_clip(grid, tmp_path):
    """open_clip interpolates the positions of 3 x 3 patches itself as it loads the file."""
    config = reduced("ViT-B-32")
    save(tmp_path, config, theirs_of(config))
    theirs = theirs_of(reduced("ViT-B-32", image_size=32 * grid))
    load_checkpoint(theirs, str(tmp_path / "open_clip_model.safetensors"))
    assert_equal(ours_of(tmp_path, image_size=32 * grid), theirs)
    with pytest.raises(ValueError, match="--image_size must be a multiple of the patches' 32 pixels, got 100"):
        ours_of(tmp_path, image_size=100)


def test_positions_stretched_as_in_long_clip():
    """77 to 248: the first 20 stay; then quarters of the step to the next, of the last one beyond the end."""
    steps = torch.arange(77.0)[:, None]
    longer = stretched(steps, 248)[:, 0]
    assert longer[:22].tolist() == [*range(20), 20.0, 20.25]
    assert longer[-5:].tolist() == [75.75, 76.0, 76.25, 76.5, 76.75]
    assert longer[20:].diff().unique().tolist() == [0.25]
    assert torch.equal(stretched(steps, 77), steps)


def test_long_captions_by_flag_and_by_weights(tmp_path):
    config = reduced("ViT-B-32")
    theirs = theirs_of(config)
    save(tmp_path, config, theirs)
    ours = ours_of(tmp_path, context_length=248)
    assert ours.head_sizes.context_length == 248
    ids = captions(200, 500)
    with torch.no_grad():
        short = ids[:1, :10]  # within the 20 that stay: nothing changes for it
        torch.testing.assert_close(ours.encode_text(ids)[0][:1], ours_of(tmp_path).encode_text(short)[0])
    with pytest.raises(ValueError, match="--context_length must be at least the 77 tokens of these weights, got 60"):
        ours_of(tmp_path, context_length=60)
    state = ours.state_dict()
    state["positional_embedding_res"] = state["positional_embedding"] + 1  # LongCLIP's own form
    torch.save(state, tmp_path / "longclip.pt")
    found = read_checkpoint(tmp_path / "longclip.pt").tensors["clip.positional_embedding"]
    assert torch.equal(found[:20], ours.positional_embedding[:20])
    assert torch.equal(found[20:], ours.positional_embedding[20:] + 1)
    assert replace(ours.sizes, context_length=248) == ours_of(tmp_path / "longclip.pt").sizes
