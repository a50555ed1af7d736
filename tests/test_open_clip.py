"""--encoder open_clip against the library itself: a dozen of its architectures with random weights."""

import numpy as np
import open_clip
import pytest
import torch
from open_clip.transform import PreprocessCfg, image_transform_v2
from open_clip_models import ARCHITECTURES, CAPTIONS, our_model, save_model
from PIL import Image

from dataloaders.video.transforms import FrameTransform


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
    normal = (frames[mask].float() / 255 - torch.tensor(shown["mean"]).view(3, 1, 1)) / torch.tensor(shown["std"]).view(3, 1, 1)
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
        padding = clip.text.config.pad_token_id if clip.by_transformers else (clip.tokenizer.padding if not clip.causal else 0)
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
