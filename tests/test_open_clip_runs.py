"""--encoder open_clip through whole runs on real video files: evaluation, fine-tuning, checkpoints, resume."""

import json
import shutil
from pathlib import Path

import numpy as np
import open_clip
import pytest
import torch
from open_clip_models import save_tiny
from test_main import TRAIN, read_results, replaced
from torch.nn.functional import normalize

import engine.train
from dataloaders.video import FrameSampling
from dataloaders.video.decode import read_frames
from dataloaders.video.transforms import FrameTransform
from engine.data import load_data
from engine.options import parse_options
from main_task_retrieval import main

# Model -> epochs until it knows some of the clips that it is trained on, of which SCORED are scored.
LEARNS = {"ViT-B-32": 14, "convnext_base": 8, "ViT-B-16-SigLIP": 14}
SCORED = 24


def similarity_of(folder: Path) -> np.ndarray:
    with np.load(folder / "similarity.npz", allow_pickle=False) as saved:
        return saved["similarity"]


@pytest.fixture(scope="module")
def models(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("models")
    for name in LEARNS:
        save_tiny(name, folder / name)
    return folder


@pytest.fixture
def flags(sample, msrvtt_flags, tmp_path) -> list[str]:
    """Scored on training clips: so few steps from random weights show there, and only there, beyond chance."""
    captions = json.loads((sample / "msrvtt" / "MSRVTT_data.json").read_text())["sentences"]
    listed = (sample / "msrvtt" / "MSRVTT_train.9k.csv").read_text().split()[1:]
    first = {each["video_id"]: each["caption"] for each in reversed(captions)}
    rows = [f'ret{i},msr{i},{video},"{first[video]}"' for i, video in enumerate(listed[:SCORED])]
    (tmp_path / "scored.csv").write_text("\n".join(["key,vid_key,video_id,sentence", *rows]))
    changed = replaced(msrvtt_flags, max_frames=2, val_csv=tmp_path / "scored.csv")
    return [*changed, "--save_similarity", "--allow_missing", "--allow_overlap"]


def library_similarity(folder: Path, flags: list[str]) -> np.ndarray:
    """Of the test split by open_clip alone: its model, its tokenizer, the mean of the frames' unit features."""
    options = parse_options(["--do_eval", *flags])
    split = load_data(options, "test")
    model = open_clip.create_model(f"local-dir:{folder}").eval()
    tokenizer = open_clip.get_tokenizer(f"local-dir:{folder}")
    shown = model.visual.preprocess_cfg
    transform = FrameTransform(shown["size"][0], shown["resize_mode"], shown["interpolation"])
    mean, std = (torch.tensor(shown[name]).view(3, 1, 1) for name in ("mean", "std"))
    sampling, videos = FrameSampling("stride", 1, 2), []
    with torch.no_grad():
        texts = normalize(model.encode_text(tokenizer(list(split.captions))), dim=-1)
        for clip in split.videos:
            frames = transform(read_frames(clip.path, sampling, clip.start, clip.end)).float() / 255
            features = normalize(model.encode_image((frames - mean) / std), dim=-1)
            videos.append(normalize(features.mean(dim=0), dim=-1))
        return (model.logit_scale.exp() * texts @ torch.stack(videos).T).numpy()


@pytest.mark.parametrize("name", LEARNS)
def test_fine_tuning_and_its_checkpoint(name, models, flags, tmp_path):
    """Zero-shot as the library has it; then the loss falls, R@1 rises, and the checkpoint needs no flag."""
    model = ["--encoder", "open_clip", "--pretrained_clip_name", str(models / name)]
    before, after, again = (tmp_path / folder for folder in ("before", "after", "again"))
    assert main(["--do_eval", *replaced(flags, output_dir=before), *model]) == 0
    want = library_similarity(models / name, flags)
    assert np.abs(similarity_of(before) - want).max() <= 1e-5 * np.abs(want).max()
    assert main([*replaced(TRAIN, epochs=LEARNS[name]), *replaced(flags, output_dir=after), *model]) == 0
    history = [json.loads(line) for line in (after / "history.jsonl").read_text().splitlines()]
    assert history[-1]["loss"] < 0.95 * history[0]["loss"]
    first, last = (read_results(folder)["metrics"]["raw"]["t2v"] for folder in (before, after))
    assert last["R@1"] >= first["R@1"] + 2 * 100 / SCORED  # two more captions at least, of about one by chance
    assert last["MeanR"] < first["MeanR"]
    trained = replaced(flags, output_dir=again, finetuned_path=after / "pytorch_model.bin")
    assert main(["--do_eval", *trained]) == 0
    assert np.array_equal(similarity_of(again), similarity_of(after))
    found = read_results(again)
    assert found["metrics"] == read_results(after)["metrics"]
    assert (found["options"]["encoder"], found["tower"]) == ("open_clip", f"open_clip {name}")
    spec = json.loads((after / "pytorch_model.bin.json").read_text())["encoder"]
    assert spec["sizes"]["model_cfg"] == json.loads((models / name / "open_clip_config.json").read_text())["model_cfg"]
    if name == "ViT-B-16-SigLIP":  # its own loss, from there
        sigmoid = replaced(flags, output_dir=tmp_path / "sigmoid", init_model=after / "pytorch_model.bin")
        assert main([*replaced(TRAIN, epochs=3, lr=1e-4), *sigmoid, "--loss", "sigmoid"]) == 0
        losses = [
            json.loads(line)["loss"] for line in (tmp_path / "sigmoid" / "history.jsonl").read_text().splitlines()
        ]
        assert losses[-1] < losses[0]
        saved, start = (
            torch.load(folder / "pytorch_model.bin", weights_only=True) for folder in (tmp_path / "sigmoid", after)
        )
        assert saved["clip.logit_bias"] != start["clip.logit_bias"] == -10  # cross entropy does not see it
        assert "sigmoid_bias" not in saved


def test_resume(models, flags, tmp_path, monkeypatch):
    """The second epoch is that of a run without interruption, to the bit."""
    kept, save = tmp_path / "after_epoch_1.pt", engine.train.save_last

    def save_and_keep(folder: Path, *arguments) -> None:
        save(folder, *arguments)
        if not kept.exists():
            shutil.copy(folder / "checkpoint_last.pt", kept)

    monkeypatch.setattr(engine.train, "save_last", save_and_keep)
    flags = [*replaced(flags, pretrained_clip_name=models / "ViT-B-16-SigLIP"), "--encoder", "open_clip"]
    command = [*replaced(TRAIN, freeze_layer_num=1), "--gradient_accumulation_steps", "2", "--loss", "sigmoid"]
    assert main([*command, *replaced(flags, output_dir=tmp_path / "whole")]) == 0
    assert main([*command, *replaced(flags, output_dir=tmp_path / "resumed", resume_model=kept)]) == 0
    assert np.array_equal(similarity_of(tmp_path / "whole"), similarity_of(tmp_path / "resumed"))
    start = torch.load(kept, weights_only=True)["model"]
    end = torch.load(tmp_path / "whole" / "checkpoint_last.pt", weights_only=True)["model"]
    frozen = {name for name, value in end.items() if torch.equal(value, start[name])}
    assert {"clip.visual.trunk.patch_embed.proj.weight", "clip.visual.trunk.blocks.0.attn.qkv.weight"} <= frozen
    assert not {"clip.visual.trunk.blocks.1.attn.qkv.weight", "clip.text.ln_final.weight"} & frozen
