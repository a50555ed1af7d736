"""The towers against open_clip's on the same random weights, at several sizes and with both activations."""

import pytest
import torch
from open_clip.model import CLIP as OpenClip
from open_clip.model import CLIPTextCfg, CLIPVisionCfg

from modules.encoders.clip import CLIP

# image side, patch, vision width, vision layers, text width, text layers, embedding, context, vocabulary
SIZES = {
    "small": (32, 8, 128, 3, 64, 2, 32, 16, 128),
    "wide text": (48, 16, 64, 2, 192, 3, 96, 77, 512),
    "B/32 shape, shallow": (224, 32, 768, 2, 512, 2, 512, 77, 1000),
    "L/14@336 shape, shallow": (336, 14, 1024, 1, 768, 1, 768, 77, 1000),
}


def pair(name: str, activation: str) -> tuple[CLIP, OpenClip]:
    side, patch, v_width, v_layers, t_width, t_layers, embed, context, vocab = SIZES[name]
    torch.manual_seed(3)
    vision = CLIPVisionCfg(layers=v_layers, width=v_width, head_width=64, patch_size=patch, image_size=side)
    text = CLIPTextCfg(context_length=context, vocab_size=vocab, width=t_width, heads=t_width // 64, layers=t_layers)
    theirs = OpenClip(embed, vision, text, quick_gelu=activation == "quick_gelu").eval()
    with torch.no_grad():  # LayerNorm starts as the identity and biases as zero: make them count
        for parameter in theirs.parameters():
            if parameter.ndim == 1:
                parameter.add_(0.1 * torch.randn_like(parameter))
    state = {k: v for k, v in theirs.state_dict().items() if k != "attn_mask"}
    ours = CLIP(CLIP.sizes_of(state), activation).eval()
    ours.load_state_dict(state)
    return ours, theirs


def image_features(clip: CLIP, images: torch.Tensor) -> torch.Tensor:
    """Each image as a clip of one frame."""
    return clip.encode_frames(images[:, None], torch.ones(len(images), 1, dtype=torch.bool))[0][:, 0]


@pytest.mark.parametrize("name", SIZES)
@pytest.mark.parametrize("activation", ["quick_gelu", "gelu"])
def test_equals_open_clip(name, activation):
    ours, theirs = pair(name, activation)
    images = torch.randn(3, 3, ours.sizes.image_resolution, ours.sizes.image_resolution)
    ids = torch.randint(1, ours.sizes.vocab_size - 1, (4, ours.sizes.context_length))
    for row, end in enumerate((2, 5, ours.sizes.context_length // 2, ours.sizes.context_length - 1)):
        ids[row, end] = ours.sizes.vocab_size - 1
        ids[row, end + 1 :] = 0
    with torch.no_grad():
        torch.testing.assert_close(image_features(ours, images), theirs.encode_image(images), rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(ours.encode_text(ids)[0], theirs.encode_text(ids), rtol=1e-5, atol=1e-5)
    assert ours.logit_scale == theirs.logit_scale


def test_activations_differ():
    """The comparison above could not tell the two apart if they agreed."""
    ours, _ = pair("small", "quick_gelu")
    other = CLIP(ours.sizes, "gelu").eval()
    other.load_state_dict(ours.state_dict())
    images = torch.randn(2, 3, 32, 32)
    with torch.no_grad():
        assert (image_features(ours, images) - image_features(other, images)).abs().max() > 1e-3


def test_uint8_frames_are_normalised_as_published():
    """(x / 255 - mean) / std with CLIP's mean and deviation, channel by channel."""
    ours, _ = pair("small", "gelu")
    frame = torch.arange(3 * 32 * 32, dtype=torch.float64).remainder(256).to(torch.uint8).view(1, 3, 32, 32)
    mean = torch.tensor([0.48145466, 0.4578275, 0.40821073], dtype=torch.float64).view(3, 1, 1)
    std = torch.tensor([0.26862954, 0.26130258, 0.27577711], dtype=torch.float64).view(3, 1, 1)
    want = ((frame.double() / 255 - mean) / std).float()
    torch.testing.assert_close(ours.normalize(frame), want, rtol=1e-5, atol=1e-5)
    assert ours.normalize(want) is want


def test_wrong_sizes_are_refused():
    ours, _ = pair("small", "gelu")
    with pytest.raises(ValueError, match="frames of 32x32 pixels, got .64, 64"):
        image_features(ours, torch.zeros(1, 3, 64, 64))
    with pytest.raises(ValueError, match="--max_words 17 exceeds the model's context of 16 tokens"):
        ours.encode_text(torch.ones(1, 17, dtype=torch.long))
    with pytest.raises(ValueError, match="--activation must be one of quick_gelu, gelu, got 'relu'"):
        CLIP(ours.sizes, "relu")
