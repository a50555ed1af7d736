"""What an encoder makes of videos and captions, kept in files (--feature_cache) and read again by later runs.

The unit is a batch, as evaluation deals them out: the last bits of a feature depend on what it was computed beside, so
only the same batch gives exactly the same numbers. Its file is named after all that its content depends on. Files are
written aside and moved into place: any number of processes and hosts may share a folder.

Features come before the head. Every head whose towers are the same reads the same ones, and where the towers are frozen
it trains on them.
"""

import hashlib
import json
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from torch.utils.data import Dataset

from checkpoints.whole import write_whole
from dataloaders.datasets import Batch, Failure, PairDataset, VideoSource
from dataloaders.feed import Feed
from dataloaders.registry import QueryBank
from dataloaders.split import RetrievalSplit
from engine.data import Loaders
from engine.distributed import World, barrier
from engine.options import Options
from engine.progress import log, progress
from modules.encoders.base import OF_THE_LOSS, frame_places
from modules.model import VideoTextModel

FORMAT = 1  # to be raised when the same options and weights come to give other features
LEFT_BEHIND = 24 * 3600  # seconds after which a temporary file belongs to no living process
Features = dict[str, Tensor]  # of a batch: "features" and "mask", of videos also "whole" where the encoder has it


class FeatureCache:
    """The features of one encoder with its weights, in a folder of their own under `folder`."""

    def __init__(self, folder: Path, model: VideoTextModel, options: Options, device: torch.device) -> None:
        about = options.evaluation_precision, device.type, options.run.do_train and options.train.compile
        self.folder, self.full = folder.expanduser() / encoder_digest(model, about), False
        self.folder.mkdir(parents=True, exist_ok=True)
        for path in self.folder.glob(".*.tmp"):
            if time.time() - path.stat().st_mtime > LEFT_BEHIND:
                path.unlink(missing_ok=True)

    def path(self, *content: Any) -> Path:
        """Of a batch with this content, in values that print as they are."""
        return self.folder / f"{hashlib.sha256(repr(content).encode()).hexdigest()[:40]}.pt"

    def load(self, path: Path | None) -> Features | None:
        """A batch, mapped into memory; None where there is none that can be read."""
        if path is None or not path.exists():
            return None
        try:
            return torch.load(path, map_location="cpu", weights_only=True, mmap=True)
        except Exception as error:
            log.warning("%s is damaged (%s) and is made anew", path, error)
            return None

    def keep(self, path: Path | None, batch: Features) -> Features:
        """Write a batch and give it back. A disk that takes no more ends the writing with a warning, not the run."""
        if path is None or self.full:
            return batch
        try:
            write_whole(path, lambda file: torch.save({k: v.cpu().contiguous() for k, v in batch.items()}, file))
        except OSError as error:
            self.full = True
            log.warning("--feature_cache: %s. No more features are kept; the run goes on", error)
            return batch
        return self.load(path) or batch  # mapped: a large split does not fill the memory


def encoder_digest(model: VideoTextModel, about: Any) -> str:
    """A hash of all that features depend on besides the batch: weights, sizes, arithmetic."""
    clip, rules = model.clip, model.clip.conventions
    kind = type(clip.tokenizer)
    # What the sources fill captions and clips to reaches an encoder only where it reads padding.
    rules = replace(rules, source_words=0, source_frames=rules.source_frames if rules.read_padding else 0)
    told = [FORMAT, torch.__version__, repr(about), clip.spec, repr(clip.image), repr(rules)]
    digest = hashlib.sha256(json.dumps([*told, f"{kind.__module__}.{kind.__qualname__}"], default=repr).encode())
    for name, value in sorted(clip.state_dict().items()):
        if name not in OF_THE_LOSS:
            digest.update(f"{name} {value.dtype} {list(value.shape)}".encode())
            digest.update(value.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().data)
    return digest.hexdigest()[:40]


def towers_are_frozen(model: VideoTextModel) -> bool:
    """Whether training leaves every feature of the encoder as it is."""
    return not any(p.requires_grad for name, p in model.clip.named_parameters() if name not in OF_THE_LOSS)


def open_cache(model: VideoTextModel, options: Options, world: World) -> FeatureCache | None:
    """That of --feature_cache, if it is given."""
    folder = options.data.feature_cache
    return FeatureCache(folder, model, options, world.device) if folder else None


def video_path(
    cache: FeatureCache, split: RetrievalSplit, batch: Sequence[int], source: VideoSource, seed: int
) -> Path | None:
    """Of a batch of videos: which files, as they are now, which span of each, and how frames are made of it."""
    content: list[Any] = []
    for clip in (split.videos[i] for i in batch):
        try:
            version = source.reader.version(clip.path)
        except OSError:
            return None  # whoever reads it says what is wrong
        content.append((str(clip.path.resolve()), *version, clip.start, clip.end))
    drawn = (seed, list(batch)) if source.frame_order == 2 else ()
    return cache.path("videos", content, source, drawn)


def video_batches(
    model: VideoTextModel, split: RetrievalSplit, loaders: Loaders, cache: FeatureCache | None, source: VideoSource
) -> Iterator[tuple[Tensor, Features, tuple[Failure, ...]]]:
    """This rank's videos: (index, features on the CPU or device, videos that cannot be read). Kept ones come first."""
    world, paths, kept = loaders.world, {}, []

    def wanted(batch: list[int]) -> bool:
        path = video_path(cache, split, batch, source, loaders.options.run.seed) if cache else None
        paths[tuple(batch)] = path
        if found := cache.load(path) if cache else None:
            kept.append((torch.tensor(batch), found, ()))
        return not found

    missing = loaders.videos(split, source, wanted)
    yield from kept
    with missing:
        for read in progress(missing if len(missing) else (), "videos", enabled=world.is_main):
            if not len(read.index):
                yield read.index, {}, read.failures
                continue
            arrays = read.frames, read.frame_mask, frame_places(read.frame_mask)
            frames, mask, places = (x.to(world.device, non_blocking=True) for x in arrays)
            with loaders.autocast():
                features, whole = model.clip.encode_frames(frames, mask, places)
            made = {"features": features.float(), "mask": mask} | ({} if whole is None else {"whole": whole.float()})
            if cache and not read.failures:
                made = cache.keep(paths[tuple(read.index.tolist())], made)
            yield read.index, made, read.failures


def caption_batches(
    model: VideoTextModel, captions: RetrievalSplit | QueryBank, loaders: Loaders, cache: FeatureCache | None
) -> Iterator[tuple[Tensor, Features]]:
    """This rank's captions: (index, features as the head takes them), in batches as `loaders.captions` deals them."""
    batches, device = loaders.captions(captions), loaders.world.device
    kind = "tokens" if model.head.takes_tokens else "pooled"
    for batch in progress(batches.batches, "captions", enabled=loaders.world.is_main):
        texts = [captions.captions[i] for i in batch]
        path = cache.path(kind, texts, loaders.options.data.max_words) if cache else None
        made = cache.load(path) if cache else None
        if made is None:
            _, ids, mask = batches.read(batch)
            with loaders.autocast():
                features = model.text_features(ids.to(device), mask.to(device))
            made = {"features": features, "mask": mask}
            made = cache.keep(path, made) if cache else made
        yield torch.tensor(batch), made


@dataclass(frozen=True)
class Table:
    """Features of all items of a split: batches, and of item n the batch `place[n]` and its row `row[n]`; -1: none."""

    batches: list[Features]
    place: np.ndarray
    row: np.ndarray

    @classmethod
    def of(cls, size: int, batches: Iterator[tuple[Tensor, Features]]) -> "Table":
        table = cls([], np.full(size, -1), np.full(size, -1))
        for index, features in batches:
            table.place[index.numpy()], table.row[index.numpy()] = len(table.batches), np.arange(len(index))
            table.batches.append({name: value.cpu() for name, value in features.items()})
        return table

    def item(self, n: int, chosen: str) -> tuple[Tensor, int]:
        """Features [T, D] of one item, less what is padding of its batch, and how many of its places are real."""
        batch, row = self.batches[self.place[n]], self.row[n]
        features, mask = batch[chosen][row], batch["mask"][row]
        real = int(mask.sum())
        if features.ndim == 1:
            return (features[None], 1) if "whole" not in batch else (features.expand(real, -1), real)
        # What an encoder adds to a clip stays; it adds the same to all.
        return (features[:real] if len(features) == len(mask) else features), real


class Drawn(NamedTuple):
    """A training pair, by the numbers of its caption and video."""

    caption: int
    video: int
    failed: bool = False  # to a feed: what could not be read is not read again


class FeaturePairs(Dataset):
    """The pairs of a PairDataset, which `collate` makes batches of features of."""

    def __init__(
        self, pairs: PairDataset, texts: Table, videos: Table, failures: dict[int, Failure], whole: bool
    ) -> None:
        self.pairs, self.texts, self.videos, self.failures, self.whole = pairs, texts, videos, failures, whole

    def __len__(self) -> int:
        return len(self.pairs)

    def __getitem__(self, key: tuple[int, int]) -> Drawn:
        caption, video, _ = self.pairs.draw(key)
        return Drawn(caption, video)

    def collate(self, drawn: Sequence[Drawn]) -> Batch:
        failures = tuple(self.failures[v] for _, v, _ in drawn if v in self.failures)
        good = [(c, v) for c, v, _ in drawn if v not in self.failures]
        if not good:
            empty, none = torch.empty(0, 0, 0), torch.empty(0, 0, dtype=torch.bool)
            return Batch(torch.empty(0, dtype=torch.long), (), empty, none, failures)
        texts = [self.texts.item(c, "features") for c, _ in good]
        chosen = "whole" if self.whole and "whole" in self.videos.batches[0] else "features"
        videos = [self.videos.item(v, chosen) for _, v in good]
        ids = tuple(self.pairs.split.videos[v].video_id for _, v in good)
        index = torch.tensor([v for _, v in good])
        return Batch(index, ids, *padded(videos), failures, (), *padded(texts))


def padded(items: Sequence[tuple[Tensor, int]]) -> tuple[Tensor, Tensor]:
    """Features [T_i, D] and numbers of real places -> [B, T, D] with zeros at the end, and the mask [B, T]."""
    features = pad_sequence([features for features, _ in items], batch_first=True)
    real = torch.tensor([n for _, n in items])
    return features, torch.arange(features.shape[1]) < real[:, None]


@torch.no_grad()
def feature_pairs(model: VideoTextModel, split: RetrievalSplit, loaders: Loaders, cache: FeatureCache) -> Feed:
    """The training pairs of `loaders` as features: each clip and caption is encoded once, by the ranks together."""
    world = loaders.world
    source, training = loaders.source(loaders.options.data.train_frame_order), model.training
    model.eval()
    if world.size > 1:
        for _ in video_batches(model, split, loaders, cache, source):
            pass
        for _ in caption_batches(model, split, loaders, cache):
            pass
        barrier()  # from here on the files of all ranks are there; a rank that does not see them makes its own
    alone = replace(loaders, world=replace(world, rank=0, size=1))
    failures: dict[int, Failure] = {}
    number = {clip.video_id: i for i, clip in enumerate(split.videos)}

    def readable() -> Iterator[tuple[Tensor, Features]]:
        for index, features, unread in video_batches(model, split, alone, cache, source):
            failures.update({number[one.video_id]: one for one in unread})
            if len(index):
                yield index, features

    videos = Table.of(len(split.videos), readable())
    texts = Table.of(len(split.captions), caption_batches(model, split, alone, cache))
    model.train(training)
    pairs = loaders.training_pairs(split)
    dataset = FeaturePairs(pairs.dataset, texts, videos, failures, model.head.takes_whole_video)
    log.info("the towers are frozen: training reads their features from %s", cache.folder)
    here = replace(loaders.reading(), num_workers=0)
    return Feed(dataset, pairs.batch_sampler, dataset.collate, here, pairs.shape, pairs.batch_size)
