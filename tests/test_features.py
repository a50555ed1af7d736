"""--feature_cache and training on features of frozen towers: the same numbers to the bit as without."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from launching import ROOT
from test_main import replaced
from torch.nn.utils.rnn import pad_sequence

import modules.encoders.clip
from dataloaders.datasets import Batch
from engine.build import build_model, find_weights
from engine.compat import COMPAT
from engine.data import Loaders, load_data
from engine.distributed import World
from engine.options import parse_options
from engine.step import Trainer, build_optimizer
from main_task_retrieval import main
from modules.optim import freeze

ALL = "3"  # --freeze_layer_num: the sample's CLIP has two blocks
TRAIN = f"--do_train --epochs 2 --batch_size 12 --lr 1e-3 --freeze_layer_num {ALL}".split()


def similarity(folder: Path) -> np.ndarray:
    return np.load(folder / "similarity.npz")["similarity"]


def evaluate_into(folder: Path, flags: list[str], *more: str) -> np.ndarray:
    assert main(["--do_eval", "--save_similarity", *replaced(flags, output_dir=folder), *more]) == 0
    return similarity(folder)


@pytest.fixture
def encoded(monkeypatch) -> dict[str, int]:
    """How many batches each tower encodes from here on."""
    counts = {"encode_frames": 0, "encode_text": 0}

    def counting(name: str):
        encode = getattr(modules.encoders.clip.CLIP, name)

        def call(self, *arrays):
            counts[name] += 1
            return encode(self, *arrays)

        monkeypatch.setattr(modules.encoders.clip.CLIP, name, call)

    for name in counts:
        counting(name)
    return counts


def test_a_second_run_and_another_head_encode_nothing(msrvtt_flags, tmp_path, encoded):
    """12 videos and captions in batches of 5: three of videos, one of captions. Every matrix as without the cache."""
    small = replaced(msrvtt_flags, batch_size_val=5)
    plain = evaluate_into(tmp_path / "plain", small)
    heads = {"meanP": [], "wti": ["--interaction", "ti"]}
    kept = ["--feature_cache", str(tmp_path / "kept")]
    without = {name: evaluate_into(tmp_path / name, small, *flags) for name, flags in heads.items()}
    for times, expected in (("first", (3, 1)), ("again", (0, 0))):
        encoded.update(encode_frames=0, encode_text=0)
        assert np.array_equal(evaluate_into(tmp_path / times, small, *kept), plain)
        assert tuple(encoded.values()) == expected
    encoded.update(encode_frames=0, encode_text=0)
    assert np.array_equal(evaluate_into(tmp_path / "tokens", small, *kept, *heads["wti"]), without["wti"])
    assert tuple(encoded.values()) == (0, 1)  # of captions it takes all tokens, which were not kept


@pytest.mark.parametrize(
    ("change", "value", "expected"),
    [
        ("max_frames", 2, (1, 0)),
        ("eval_frame_order", 1, (1, 0)),
        ("max_words", 5, (0, 1)),
        ("precision", "bf16", (1, 1)),
    ],
)
def test_other_frames_words_or_arithmetic_are_not_taken_for_the_same(
    change, value, expected, msrvtt_flags, tmp_path, encoded
):
    kept = ["--feature_cache", str(tmp_path / "kept")]
    evaluate_into(tmp_path / "first", msrvtt_flags, *kept)
    encoded.update(encode_frames=0, encode_text=0)
    changed = replaced(msrvtt_flags, **{change: value})
    got = evaluate_into(tmp_path / "second", changed, *kept)
    assert tuple(encoded.values()) == expected
    assert np.array_equal(got, evaluate_into(tmp_path / "plain", changed))


def test_other_weights_and_touched_videos_are_not_taken_for_the_same(sample, msrvtt_flags, tmp_path, encoded):
    kept = ["--feature_cache", str(tmp_path / "kept")]
    videos = tmp_path / "videos"
    videos.mkdir()
    for path in (sample / "msrvtt" / "videos" / "all").iterdir():
        os.link(path, videos / path.name)
    flags = replaced(msrvtt_flags, features_path=videos)
    evaluate_into(tmp_path / "first", flags, *kept)
    for path in videos.iterdir():  # all of them, as which are in the test set does not matter here
        copied = path.read_bytes()
        path.unlink()
        path.write_bytes(copied)
    encoded.update(encode_frames=0, encode_text=0)
    evaluate_into(tmp_path / "touched", flags, *kept)
    assert tuple(encoded.values()) == (1, 0)
    tensors = torch.load(sample / "clip" / "tiny_clip.pt", weights_only=True)
    tensors["ln_final.bias"] += 1
    torch.save(tensors, tmp_path / "other.pt")
    encoded.update(encode_frames=0, encode_text=0)
    changed = replaced(flags, pretrained_clip_name=tmp_path / "other.pt", activation="quick_gelu")
    evaluate_into(tmp_path / "other", changed, *kept)
    assert tuple(encoded.values()) == (1, 1)


def test_a_damaged_file_is_made_anew(msrvtt_flags, tmp_path, encoded):
    kept = ["--feature_cache", str(tmp_path / "kept")]
    want = evaluate_into(tmp_path / "first", msrvtt_flags, *kept)
    files = list((tmp_path / "kept").rglob("*.pt"))
    assert len(files) == 2
    for path in files:
        path.write_bytes(path.read_bytes()[:-40])
    assert np.array_equal(evaluate_into(tmp_path / "second", msrvtt_flags, *kept), want)
    assert "is damaged" in (tmp_path / "second" / "log.txt").read_text()
    encoded.update(encode_frames=0, encode_text=0)
    evaluate_into(tmp_path / "third", msrvtt_flags, *kept)
    assert tuple(encoded.values()) == (0, 0)


def test_a_folder_that_takes_nothing_ends_the_keeping_and_not_the_run(msrvtt_flags, tmp_path):
    kept = tmp_path / "kept"
    plain = evaluate_into(tmp_path / "plain", msrvtt_flags)
    sync = os.fsync

    def full(file: int) -> None:
        if os.readlink(f"/proc/self/fd/{file}").startswith(str(kept)):
            raise OSError(28, "No space left on device")
        sync(file)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, "fsync", full)
        flags = replaced(msrvtt_flags, output_dir=tmp_path / "full")
        assert main(["--do_eval", *flags, "--feature_cache", str(kept)]) == 0
    assert "No space left on device" in (tmp_path / "full" / "log.txt").read_text()
    assert not list(kept.rglob("*.pt*"))
    assert np.array_equal(evaluate_into(tmp_path / "after", msrvtt_flags, "--feature_cache", str(kept)), plain)


def selected(folder: Path) -> dict[str, torch.Tensor]:
    return torch.load(folder / "pytorch_model.bin", weights_only=True)


def plain_training(flags: list[str]) -> dict[str, torch.Tensor]:
    """The two epochs without any file: every clip and caption encoded once, in the batches of evaluation."""
    options = parse_options([*TRAIN, *flags])
    torch.manual_seed(options.run.seed)
    model = build_model(options, find_weights(options))
    freeze(model.clip, options.train.freeze_layer_num)
    split = load_data(options, "train")
    tokenize = model.clip.tokenizer
    loaders = Loaders(
        options,
        World(0, 1, torch.device("cpu")),
        lambda texts: tokenize(texts, max_words=options.data.max_words),
        model.clip.image,
    )
    clips, texts = {}, {}
    with torch.no_grad():
        for batch in loaders.videos(split):
            features, _ = model.clip.encode_frames(batch.frames, batch.frame_mask)
            clips |= {int(i): x[m] for i, x, m in zip(batch.index, features, batch.frame_mask)}
        for index, ids, mask in loaders.captions(split):
            texts |= {int(i): x[None] for i, x in zip(index, model.clip.encode_text(ids, mask)[0])}
    pairs = loaders.training_pairs(split)
    optimizer = build_optimizer(model, options.train, COMPAT["none"], 2 * len(pairs))
    trainer = Trainer(model, optimizer, loaders.world, "fp32", 1.0, 1, options.run.seed)
    for epoch in range(2):
        torch.manual_seed(options.run.seed * 1_000_003 + epoch)
        model.train()
        pairs.batch_sampler.epoch = epoch
        for keys in pairs.batch_sampler:
            drawn = [pairs.dataset.draw(key) for key in keys]
            frames = pad_sequence([clips[v] for _, v, _ in drawn], batch_first=True)
            real = torch.tensor([len(clips[v]) for _, v, _ in drawn])
            mask = torch.arange(frames.shape[1]) < real[:, None]
            text = torch.stack([texts[c] for c, _, _ in drawn])
            index = torch.tensor([v for _, v, _ in drawn])
            trainer.step(Batch(index, (), frames, mask, (), (), text, torch.ones(len(text), 1, dtype=torch.bool)))
    return {name: value.detach() for name, value in model.state_dict().items()}


def test_frozen_towers_train_heads_on_kept_features_to_the_same_bits(msrvtt_flags, tmp_path, encoded):
    """seqTransf with a fresh cache, from that cache, without one, and by a plain loop: one set of weights."""
    flags = [*replaced(msrvtt_flags, batch_size_val=7), "--sim_header", "seqTransf", "--select_on", "last"]
    kept = ["--feature_cache", str(tmp_path / "kept")]
    for name, more in {"fresh": kept, "again": kept, "without": []}.items():
        encoded.update(encode_frames=0, encode_text=0)
        assert main([*TRAIN, *replaced(flags, output_dir=tmp_path / name), *more]) == 0
        assert (sum(encoded.values()) == 0) == (name == "again")
    want, start = plain_training(flags), torch.load(flags[flags.index("--pretrained_clip_name") + 1], weights_only=True)
    runs = [selected(tmp_path / name) for name in ("fresh", "again", "without")]
    moved = 0
    for name, value in runs[0].items():
        assert all(torch.equal(value, other[name]) for other in runs)
        mine = want[name if name in want else f"head.{name}"]
        assert torch.equal(value, mine), name
        tower = name.removeprefix("clip.")
        if tower in start and tower != "logit_scale":
            assert torch.equal(value, start[tower].float()), name
        moved += name.startswith("transformerClip.")
    assert moved > 0
    histories = [
        [json.loads(line)["loss"] for line in (tmp_path / n / "history.jsonl").read_text().splitlines()]
        for n in ("fresh", "again", "without")
    ]
    assert histories[0] == histories[1] == histories[2]


@pytest.mark.parametrize(
    "more", [["--interaction", "wti"], ["--clip_evl"], ["--clip_evl", "--sim_header", "seqTransf"]]
)
def test_every_kind_of_features_trains(more, msrvtt_flags, tmp_path, encoded):
    """Tokens, features of whole clips, and frames of InternVideo's tower; in pieces, too. 48 clips: 4 steps."""
    flags = [*msrvtt_flags, *more, "--gradient_accumulation_steps", "2"]
    command = [*replaced(TRAIN, epochs=1), *flags, "--feature_cache", str(tmp_path / "kept")]
    assert main(command) == 0
    history = json.loads((tmp_path / "out" / "history.jsonl").read_text().splitlines()[0])
    assert history["steps"] == 4
    assert np.isfinite(history["loss"])


def test_a_rule_that_draws_and_a_random_order_read_clips_in_every_step(msrvtt_flags, tmp_path, encoded):
    flags = replaced(msrvtt_flags, train_frame_order=2)
    assert main([*replaced(TRAIN, epochs=1), *flags]) == 0
    assert encoded["encode_frames"] >= 4
    assert "frames are drawn anew in every epoch" in (tmp_path / "out" / "log.txt").read_text()


WRITER = """
import sys, torch
from pathlib import Path
from types import SimpleNamespace
from engine.features import FeatureCache
from tests.tiny_models import tiny_model
run, train = SimpleNamespace(do_train=False), SimpleNamespace(compile=False)
options = SimpleNamespace(evaluation_precision="fp32", run=run, train=train)
cache = FeatureCache(Path(sys.argv[1]), tiny_model("meanP"), options, torch.device("cpu"))
print(cache.folder, flush=True)
for turn in range(10**9):
    number = turn % 50
    batch = {"features": torch.full((200, 500), float(number)), "mask": torch.ones(200, 1, dtype=torch.bool)}
    cache.keep(cache.path(number), batch)
"""


def test_many_writers_and_kills_leave_no_torn_file(tmp_path):
    """Three processes write the same 50 files over and over and are killed, seven times. What is there is whole."""
    environment = {**os.environ, "PYTHONPATH": f"{ROOT}:{ROOT}/tests", "OMP_NUM_THREADS": "1"}
    seen = 0
    for _ in range(7):
        command = [sys.executable, "-c", WRITER, str(tmp_path)]
        writers = [
            subprocess.Popen(command, cwd=ROOT, env=environment, stdout=subprocess.PIPE, text=True) for _ in "123"
        ]
        folder = Path([writer.stdout.readline() for writer in writers][0].strip())
        until = time.monotonic() + 1
        while time.monotonic() < until:
            seen += read_all(folder)
        for writer in writers:
            writer.send_signal(signal.SIGKILL)
            writer.wait()
        seen += read_all(folder)
    assert seen > 50


def read_all(folder: Path) -> int:
    count = 0
    for path in folder.glob("*.pt"):
        features = torch.load(path, weights_only=True)["features"]
        assert features.shape == (200, 500)
        assert (features == features[0, 0]).all()
        count += 1
    return count
