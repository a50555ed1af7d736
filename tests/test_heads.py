"""What every head must do, whatever its formula: properties on small random models."""

import pytest
import torch
from tiny_models import CASES, SIZES, batch, tiny_model
from torch import Tensor

from modules.encoders.base import Conventions, Slots, frame_places
from modules.heads import HEADS
from modules.heads.base import Head, register
from modules.model import pair_blocks
from modules.representation import as_parts, concat, count, take

every_head = pytest.mark.parametrize("case", CASES, ids="-".join)


def scores(model, ids, token_mask, frames, frame_mask) -> Tensor:
    with torch.no_grad():
        return model.similarity(model.encode_text(ids, token_mask), model.encode_video(frames, frame_mask))


@every_head
def test_padding_changes_nothing(case):
    """Longer padding, and any content of padded frames, even NaN."""
    model = tiny_model(*case)
    ids, token_mask, frames, frame_mask = batch()
    want = scores(model, ids, token_mask, frames, frame_mask)
    spoiled = torch.where(frame_mask[..., None, None, None], frames, torch.nan)
    torch.testing.assert_close(scores(model, ids, token_mask, spoiled, frame_mask), want, rtol=0, atol=0)
    longer = (
        torch.cat([ids, ids.new_zeros(4, 5)], 1),
        torch.cat([token_mask, token_mask.new_zeros(4, 5)], 1),
        torch.cat([frames, torch.randn(4, 3, 3, 16, 16)], 1),
        torch.cat([frame_mask, frame_mask.new_zeros(4, 3)], 1),
    )
    torch.testing.assert_close(scores(model, *longer), want, rtol=1e-4, atol=1e-4)
    for i in range(4):
        n, t = int(token_mask[i].sum()), int(frame_mask[i].sum())
        alone = scores(
            model, ids[i : i + 1, :n], token_mask[i : i + 1, :n], frames[i : i + 1, :t], frame_mask[i : i + 1, :t]
        )
        torch.testing.assert_close(alone[0, 0], want[i, i], rtol=1e-4, atol=1e-4)


@every_head
def test_gradient_reaches_every_trainable_parameter(case):
    model = tiny_model(*case)
    model(*batch()).backward()
    without = [n for n, p in model.named_parameters() if p.requires_grad and (p.grad is None or not p.grad.any())]
    # These add the same to everything a softmax compares (candidates, frames, tokens): their true gradient is zero.
    assert not [n for n in without if not n.endswith(("similarity_dense.bias", "k_proj.bias", "weight_fc.2.bias"))]
    assert all(p.grad is not None for p in model.parameters() if p.requires_grad)  # what DistributedDataParallel needs


@every_head
def test_bfloat16_autocast_stays_close(case):
    model = tiny_model(*case)
    want = scores(model, *batch())
    with torch.autocast("cpu", dtype=torch.bfloat16):
        got = scores(model, *batch())
        loss = model(*batch())
    assert loss.dtype == torch.float32
    torch.testing.assert_close(loss, model(*batch()), rtol=0.03, atol=0.03)
    assert got.dtype == torch.float32
    assert (got - want).abs().max() <= 0.05 * want.abs().max()


@every_head
def test_one_caption_one_video_one_frame(case):
    model = tiny_model(*case, cdcr=2 if HEADS[case[0]].separable else 0)
    ids, token_mask, frames, frame_mask = (x[:1] for x in batch())
    one = (ids, token_mask, frames[:, :1], frame_mask[:, :1])
    got = scores(model, *one)
    assert got.shape == (1, 1)
    assert got.isfinite().all()
    loss = model(*one)
    assert loss.isfinite()
    assert loss.item() == pytest.approx(0, abs=1e-6)  # nothing to choose between


@every_head
def test_blocks_give_the_whole_matrix(case):
    model = tiny_model(*case)
    ids, token_mask, frames, frame_mask = batch()
    with torch.no_grad():
        text, video = model.encode_text(ids, token_mask), model.encode_video(frames, frame_mask)
        text, video = concat([text, text, text]), concat([video, video])
        whole = (model.scale() * model.head.similarity(text, video)).float()
        pair = model.head.pair_bytes(text, video)
        for pairs in (1, 3, 5, 11, 1000):
            got = model.similarity(text, video, memory_mb=(pairs + 0.5) * pair / 2**20)
            torch.testing.assert_close(got, whole, rtol=1e-5, atol=1e-5)


def test_blocks_cover_everything_once_and_keep_to_the_budget():
    for n, v, pairs in ((7, 5, 1), (7, 5, 4), (7, 5, 12), (7, 5, 1000), (1, 1, 0)):
        seen = torch.zeros(n, v, dtype=torch.int)
        for rows, columns in pair_blocks(n, v, pairs):
            assert seen[rows, columns].numel() <= max(pairs, 1)
            seen[rows, columns] += 1
        assert (seen == 1).all()


@every_head
def test_items_do_not_depend_on_their_batch(case):
    """Two-phase: encoded in parts of other lengths and joined, the items score as encoded together."""
    model = tiny_model(*case)
    ids, token_mask, frames, frame_mask = batch()
    with torch.no_grad():
        texts, videos = [], []
        for part in (slice(0, 1), slice(1, 4)):
            n, t = int(token_mask[part].sum(1).max()), int(frame_mask[part].sum(1).max())
            texts.append(model.encode_text(ids[part, :n], token_mask[part, :n]))
            videos.append(model.encode_video(frames[part, :t], frame_mask[part, :t]))
        got = model.similarity(concat(texts), concat(videos))
    assert count(concat(texts)) == 4
    torch.testing.assert_close(got, scores(model, *batch()), rtol=1e-4, atol=1e-4)


@every_head
def test_compiles_without_a_break(case):
    """No graph break in text, video or similarity; the LSTM, which torch.compile leaves to cuDNN, is the exception."""
    model = tiny_model(*case)
    ids, token_mask, frames, frame_mask = batch()
    head = model.head
    with torch.no_grad():
        features = model.frame_features(frames, frame_mask)
        pooled, tokens = model.clip.encode_text(ids)
        sentence = tokens if head.takes_tokens else pooled
        text, video = head.text(sentence, token_mask), head.video(features, frame_mask)
        calls = [(head.text, (sentence, token_mask)), (head.similarity, (text, video))]
        if case[0] != "seqLSTM":
            calls.append((head.video, (features, frame_mask)))
        for function, arguments in calls:
            torch._dynamo.reset()
            got = torch.compile(function, backend="eager", fullgraph=True)(*arguments)
            for ours, want in zip(as_parts(got), as_parts(function(*arguments))):
                torch.testing.assert_close(ours, want)


@pytest.mark.parametrize("tower", ["2d", "3d"])
def test_towers_compile_without_a_break(tower):
    model = tiny_model("meanP", "no", tower)
    ids, _, frames, _ = batch()
    visual, clips = model.clip.visual, frames if tower == "3d" else frames.flatten(0, 1)
    patches = visual.patches(clips).flatten(0, -3)
    for function, argument in ((visual.patches, clips), (visual, patches), (model.clip.text_tokens, ids)):
        torch._dynamo.reset()
        with torch.no_grad():
            got = torch.compile(function, backend="eager", fullgraph=True)(argument)
            torch.testing.assert_close(got, function(argument))


def test_internvideos_tower_compiles_without_a_break():
    model = tiny_model("meanP", "no", "evl")
    _, _, frames, frame_mask = batch()
    arguments = (frames[frame_mask], Slots(frame_mask, frame_places(frame_mask)))
    torch._dynamo.reset()
    with torch.no_grad():
        got = torch.compile(model.clip.visual, backend="eager", fullgraph=True)(*arguments)
        torch.testing.assert_close(got, model.clip.visual(*arguments))


def test_order_of_frames_matters_where_it_should():
    ids, token_mask, frames, frame_mask = (x[2:3] for x in batch())
    for name, blind in (
        ("meanP", True),
        ("seqLSTM", False),
        ("seqTransf", False),
        ("tightTransf", False),
        ("xpool", True),
    ):
        model = tiny_model(name, noise=0.2)
        forth = scores(model, ids, token_mask, frames, frame_mask)
        back = scores(model, ids, token_mask, frames.flip(1), frame_mask)
        assert torch.allclose(forth, back, rtol=1e-5, atol=1e-5) is blind, name


def test_token_interaction_by_hand():
    """One word (1, 0) against frames (1, 0) and (0, 1), and a padded frame that would fit even better."""
    head = tiny_model("meanP", "ti").head
    text = (torch.tensor([[[1.0, 0.0]]]), torch.tensor([[True]]), torch.tensor([[1.0]]))
    frames = torch.tensor([[[0.6, 0.8], [0.0, 1.0], [1.0, 0.0]]])
    video = (frames, torch.tensor([[True, True, False]]), torch.tensor([[0.5, 0.5, 0.0]]))
    # The word's best real frame scores 0.6; the frames' best word 0.6 and 0.0, on average 0.3.
    assert head.similarity(text, video).item() == pytest.approx((0.6 + 0.3) / 2)


def test_padding_scores_zero_only_where_the_sources_numbers_are_asked_for():
    """All real cosines negative: the sources' padded frame, at 0, wins the maximum over frames."""
    text = (torch.tensor([[[1.0, 0.0]]]), torch.tensor([[True]]), torch.tensor([[1.0]]))
    video = (torch.tensor([[[-1.0, 0.0], [1.0, 0.0]]]), torch.tensor([[True, False]]), torch.tensor([[1.0, 0.0]]))
    for mask_padding, want in ((True, -1.0), (False, -0.5)):
        assert tiny_model("meanP", "ti", mask_padding=mask_padding).head.similarity(text, video).item() == want


def test_the_cross_encoder_trains_the_same_in_blocks(monkeypatch):
    """Computed again for the backward pass, block by block, or kept: the same gradients."""
    gradients = []
    for allowed in (2**30, 1):
        monkeypatch.setattr("modules.heads.tight_transformer.TRAINING_BYTES", allowed)
        model = tiny_model("tightTransf")
        model(*batch()).backward()
        gradients.append({n: p.grad for n, p in model.named_parameters() if p.grad is not None})
    assert gradients[0].keys() == gradients[1].keys()
    for name, gradient in gradients[0].items():
        torch.testing.assert_close(gradients[1][name], gradient, rtol=1e-4, atol=1e-7)


@pytest.mark.parametrize("case", [("meanP", "ti"), ("seqTransf", "wti"), ("meanP", "wti", "evl")], ids="-".join)
def test_the_sources_scores_do_not_depend_on_the_batch_either(case):
    """Their loaders fill captions and clips to a fixed length, ours to the longest of the batch: no difference."""
    model = tiny_model(*case, mask_padding=False, source_words=12, source_frames=6)
    if case[-1] == "evl":
        model.clip.conventions = Conventions(read_padding=True, source_frames=6)
    ids, token_mask, frames, frame_mask = batch()
    filled = (
        torch.cat([ids, ids.new_zeros(4, 3)], 1),
        torch.cat([token_mask, token_mask.new_zeros(4, 3)], 1),
        torch.cat([frames, torch.zeros(4, 2, 3, 16, 16)], 1),
        torch.cat([frame_mask, frame_mask.new_zeros(4, 2)], 1),
    )
    want = scores(model, *filled)
    torch.testing.assert_close(scores(model, ids, token_mask, frames, frame_mask), want, rtol=1e-4, atol=1e-5)
    for i in range(4):
        n, t = int(token_mask[i].sum()), int(frame_mask[i].sum())
        alone = scores(
            model, ids[i : i + 1, :n], token_mask[i : i + 1, :n], frames[i : i + 1, :t], frame_mask[i : i + 1, :t]
        )
        torch.testing.assert_close(alone[0, 0], want[i, i], rtol=1e-4, atol=1e-5)


@every_head
def test_a_clip_without_frames_is_refused(case):
    model = tiny_model(*case)
    _, _, frames, frame_mask = batch()
    frame_mask[1] = False
    with pytest.raises(ValueError, match=r"clips without a single frame in the batch, at \[1\]"):
        model.encode_video(frames, frame_mask)


def test_random_token_choice_follows_the_generator():
    model = tiny_model("meanP", "ti", cdcr=1, cdcr_alpha2=0.06, cdcr_lambda=1.0)
    losses = [model(*batch(), generator=torch.Generator().manual_seed(seed)).item() for seed in (1, 1, 2)]
    assert losses[0] == losses[1]
    assert losses[0] != losses[2]


def test_a_second_head_of_one_name_is_refused():
    with pytest.raises(ValueError, match="two plug-ins are called --sim_header meanP"):
        register("meanP")(type("Other", (Head,), {}))


def test_too_many_frames_are_refused_by_name():
    for name in ("seqTransf", "tightTransf"):
        head = tiny_model(name).head
        features = torch.randn(1, SIZES.context_length + 1, 64)
        with pytest.raises(ValueError, match=f"--sim_header {name} takes at most"):
            head.video(features, torch.ones(features.shape[:2], dtype=torch.bool))


def test_taking_rows_keeps_the_kind():
    pair = (torch.arange(6).view(3, 2), torch.ones(3, dtype=torch.bool))
    assert isinstance(take(pair, slice(1, 2)), tuple)
    assert take(pair[0], slice(1, 2)).tolist() == [[2, 3]]
