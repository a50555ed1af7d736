"""Datasets, samplers and collation: every pair once, the same global batches for any number of ranks, honest masks."""

import numpy as np
import pytest
import torch

from dataloaders.datasets import Batch, Collate, Failure, Item, PairDataset, VideoDataset, VideoSource, pad_frames, trim
from dataloaders.loaders import CaptionBatches, GlobalBatchSampler, Reading, ShardedBatches, pair_loader, video_loader
from dataloaders.msrvtt import Options
from dataloaders.registry import AnnotationFiles, load_split
from dataloaders.video import FrameSampling, FrameTransform, decode_frames
from dataloaders.video.rules import RULES, FrameRule

SAMPLING = FrameSampling("stride", 1, 3, 2)


@pytest.fixture(scope="module")
def splits(sample):
    data = sample / "msrvtt"
    lists = Options(train_csv=data / "MSRVTT_train.9k.csv", val_csv=data / "MSRVTT_JSFUSION_test.csv")
    files = AnnotationFiles(data / "MSRVTT_data.json", lists)
    return {name: load_split("msrvtt", name, files, data / "videos" / "all") for name in ("train", "test")}


def tokenize(captions):
    """One token a word; enough to follow captions through a batch."""
    ids = torch.zeros(len(captions), 12, dtype=torch.long)
    for row, caption in enumerate(captions):
        words = caption.split()[:12]
        ids[row, : len(words)] = torch.tensor([len(word) for word in words])
    return ids, ids > 0


@pytest.mark.parametrize("world_size", [1, 2, 4])
def test_ranks_together_see_the_global_batches(world_size):
    alone = GlobalBatchSampler(50, 12, 0, 1, seed=3)
    ranks = [GlobalBatchSampler(50, 12, rank, world_size, seed=3) for rank in range(world_size)]
    for epoch in (0, 1):
        for sampler in (alone, *ranks):
            sampler.epoch = epoch
        together = [[key for part in parts for key in part] for parts in zip(*ranks)]
        assert together == list(alone)
        assert len(alone) == 4
        positions = [position for batch in alone for _, position in batch]
        assert len(set(positions)) == 48
        assert {e for batch in alone for e, _ in batch} == {epoch}
    alone.epoch = 0
    first = list(alone)
    alone.epoch = 1
    assert list(alone) != first


def test_batch_sizes_that_cannot_work_are_refused():
    with pytest.raises(ValueError, match="--batch_size is global and must divide by 3 processes, got 16"):
        GlobalBatchSampler(50, 16, 0, 3, 0)
    with pytest.raises(ValueError, match="--batch_size 64 exceeds the 50 training items"):
        GlobalBatchSampler(50, 64, 0, 1, 0)


@pytest.mark.parametrize("world_size", [1, 2, 3, 7])
def test_evaluation_shards_cover_everything_once(world_size):
    shards = [ShardedBatches(23, 4, rank, world_size) for rank in range(world_size)]
    batches = [tuple(batch) for shard in shards for batch in shard]
    assert sorted(batches) == [tuple(range(s, min(s + 4, 23))) for s in range(0, 23, 4)]


def test_pairs_expanded_and_drawn(splits):
    train = splits["train"]
    source = VideoSource(SAMPLING, FrameTransform(32))
    expanded = PairDataset(train, source, expand=True)
    assert len(expanded) == len(train.captions) == 48 * 20
    item = expanded[0, 25]
    assert item.caption == train.captions[25]
    assert item.video_id == train.videos[train.caption_to_video[25]].video_id
    drawn = PairDataset(train, source, expand=False, seed=1)
    assert len(drawn) == 48
    captions = [drawn[epoch, 7].caption for epoch in range(6)]
    own = {train.captions[i] for i in np.flatnonzero(train.caption_to_video == 7)}
    assert set(captions) <= own
    assert len(set(captions)) > 1
    assert drawn[2, 7].caption == captions[2]


def test_a_training_batch(splits):
    loader = pair_loader(
        splits["train"], VideoSource(SAMPLING, FrameTransform(32)), tokenize, Reading(), expand=True, batch_size=8
    )
    batch = next(iter(loader))
    assert batch.frames.dtype == torch.uint8
    assert batch.frames.shape[0] == 8
    assert batch.frames.shape[2:] == (3, 32, 32)
    assert batch.frame_mask.shape == batch.frames.shape[:2]
    assert batch.frames[~batch.frame_mask].sum() == 0
    assert batch.token_ids.shape[1] == int(batch.token_mask.sum(1).max())
    assert [splits["train"].videos[i].video_id for i in batch.index] == list(batch.video_ids)


def test_every_video_and_caption_once(splits):
    test = splits["test"]
    for world_size in (1, 2):
        seen = [
            i
            for rank in range(world_size)
            for batch in video_loader(
                test, VideoSource(SAMPLING, FrameTransform(32)), Reading(rank=rank, world_size=world_size), batch_size=5
            )
            for i in batch.index.tolist()
        ]
        assert sorted(seen) == list(range(12))
        texts = [
            i
            for rank in range(world_size)
            for where, _, _ in CaptionBatches(test, tokenize, 5, rank, world_size)
            for i in where.tolist()
        ]
        assert sorted(texts) == list(range(12))


def test_frame_order(splits):
    test = splits["test"]
    sources = [VideoSource(SAMPLING, FrameTransform(32), frame_order=order) for order in range(3)]
    straight, back, mixed = (VideoDataset(test, source, seed=4) for source in sources)
    for index in range(4):
        frames = straight[index].frames
        assert torch.equal(back[index].frames, frames.flip(0))
        assert torch.equal(mixed[index].frames, mixed[index].frames)
        assert sorted(f.sum().item() for f in mixed[index].frames) == sorted(f.sum().item() for f in frames)


def test_a_frame_rule_may_draw_in_training_and_not_in_evaluation(splits, monkeypatch):
    class Drawn(FrameRule):
        def choose(self, fps, frame_count, start, end, generator):
            return [0 if generator is None else 1 + int(generator.integers(frame_count - 1))]

    monkeypatch.setitem(RULES, "drawn", Drawn)
    source = VideoSource(FrameSampling("drawn"), FrameTransform(32))
    pairs, videos = PairDataset(splits["train"], source, expand=True), VideoDataset(splits["train"], source)
    first = FrameTransform(32)(decode_frames(splits["train"].videos[0].path, [0]))
    assert torch.equal(videos[0].frames, first)
    seen = [pairs[epoch, 0].frames for epoch in range(4)]
    assert any(not torch.equal(frames, seen[0]) for frames in seen)
    assert torch.equal(pairs[2, 0].frames, seen[2])


def test_a_failed_video_is_carried_not_replaced():
    good = Item(4, "good", torch.ones(2, 3, 8, 8, dtype=torch.uint8), "a b c")
    bad = Item(5, "bad", Failure("bad", "bad.mp4: broken"), "d")
    batch = Collate(tokenize)([bad, good])
    assert batch.index.tolist() == [4]
    assert batch.failures == (Failure("bad", "bad.mp4: broken"),)
    assert batch.token_ids.tolist() == [[1, 1, 1]]
    empty = Collate(tokenize)([bad])
    assert len(empty.index) == 0
    assert empty.token_ids is None


def test_padding_and_trimming_by_hand():
    frames, mask = pad_frames([torch.ones(1, 3, 2, 2, dtype=torch.uint8), torch.ones(3, 3, 2, 2, dtype=torch.uint8)])
    assert frames.shape == (2, 3, 3, 2, 2)
    assert mask.tolist() == [[True, False, False], [True, True, True]]
    assert frames.sum() == 4 * 12
    ids, kept = trim(torch.tensor([[5, 6, 0, 0], [5, 0, 0, 0]]), torch.tensor([[1, 1, 0, 0], [1, 0, 0, 0]]).bool())
    assert ids.tolist() == [[5, 6], [5, 0]]
    assert kept.tolist() == [[True, True], [True, False]]


def test_a_batch_can_be_pinned_or_says_why_not():
    batch = Batch(torch.tensor([0]), ("v",), torch.zeros(1, 1, 3, 2, 2, dtype=torch.uint8), torch.ones(1, 1).bool(), ())
    if torch.cuda.is_available():
        assert batch.pin_memory().frames.is_pinned()
    assert batch.token_ids is None
