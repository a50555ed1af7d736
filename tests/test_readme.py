"""README and the pages of docs/ and data/: their commands are run, on samples in place of the datasets they name."""

import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import cv2
import pytest
import torch
from open_clip_models import save_tiny
from repository_copy import ROOT, copy_repository, run_in

from dataloaders.video import FrameSampling, read_frames
from modules.encoders.clip import ClipSizes
from modules.encoders.internvideo import VideoCLIP, VideoClipSizes
from tools import flags

README = (ROOT / "README.md").read_text(encoding="utf-8")
PAGES = ["README.md", *sorted(str(page.relative_to(ROOT)) for page in (ROOT / "docs").glob("*.md")), "data/README.md"]
SIZES = ClipSizes(
    embed_dim=64,
    image_resolution=32,
    vision_layers=1,
    vision_width=64,
    patch_size=8,
    context_length=77,
    vocab_size=49408,
    text_width=64,
    text_heads=1,
    text_layers=1,
    vision_heads=1,
)
# What the sample is too small for, or this machine: text of a page -> text that is run.
SMALLER = {
    "hf-hub:laion/CLIP-ViT-H-14-laion2B-s32B-b79K": "weights/clip.pt",
    "ViT-B-16-SigLIP --open_clip_weights webli": "weights/open_clip",
    "ViT-B/32": "weights/clip.pt",
    "--batch_size=128": "--batch_size=250",
    "--batch_size 128": "--batch_size 24 --epochs 1 --device cpu",
    "--epochs=5": "--epochs=1 --device cpu",
    "--num_thread_reader=4": "--num_thread_reader=1",
    "--nproc_per_node=4": "--nproc_per_node=2",
    "tools.sample_data ": "tools.sample_data --n_train 4 --n_val 2 --n_test 2 --resolution 64 ",
}


def blocks(page: str) -> list[str]:
    return re.findall(r"```bash\n(.*?)```", (ROOT / page).read_text(encoding="utf-8"), flags=re.DOTALL)


def test_make_targets_do_what_the_readme_says():
    assert [block.strip() for block in blocks("README.md")[:2]] == ["make demo", "make test"]
    makefile = (ROOT / "Makefile").read_text()
    for line in ("$(BIN)/python -m tools.demo", "$(BIN)/python -m pytest", "$(BIN)/ruff check ."):
        assert line in makefile


def test_the_demo(tmp_path):
    """The whole demo with fewer clips and one epoch: it ends by comparing the saved checkpoint's numbers itself."""
    out = tmp_path / "demo"
    less = "--epochs 1 --n_train 64 --n_test 16".split()
    shown = run_in(ROOT, sys.executable, "-m", "tools.demo", "--output_dir", str(out), *less)
    for title in ("zero-shot, untrained CLIP", "fine-tuned, meanP", "its checkpoint, evaluated again"):
        assert title in shown
        assert title in README
    for run in ("zero_shot", "fine_tune", "evaluate"):
        assert json.loads((out / run / "results.json").read_text())["n_videos"] == 16


@pytest.fixture(scope="module")
def home(sample_all, tmp_path_factory) -> Path:
    """A copy of the repository with samples in place of the datasets and small weights in place of the real ones."""
    folder = copy_repository(tmp_path_factory.mktemp("home") / "repository")
    for data in ("msrvtt", "msvd", "lsmdc", "activity", "didemo", "vatex"):
        shutil.copytree(sample_all / data, folder / "data" / data)
    for video in (folder / "data" / "msvd" / "videos").glob("*"):  # what some projects distribute in place of videos
        (folder / "data" / "msvd" / "frames" / video.stem).mkdir(parents=True)
        for number, image in enumerate(read_frames(video, FrameSampling("stride", 3, 60)), start=1):
            name = folder / "data" / "msvd" / "frames" / video.stem / f"{number:06d}.jpg"
            cv2.imwrite(str(name), image[..., ::-1])
    (folder / "weights").mkdir()
    shutil.copy(sample_all / "clip" / "tiny_clip.pt", folder / "weights" / "clip.pt")
    torch.manual_seed(0)
    video_tower = VideoCLIP(VideoClipSizes(**vars(SIZES), read_after=(0,)), "quick_gelu")
    tensors = {f"clip.{name}": value for name, value in video_tower.state_dict().items()}
    torch.save(tensors, folder / "weights" / "InternVideo-MM-L-14.ckpt")
    save_tiny("ViT-B-32", folder / "weights" / "open_clip", init_logit_bias=-10)
    return folder


@pytest.mark.parametrize("page", [page for page in PAGES if blocks(page)])
def test_every_command_of_a_page_runs(page, home):
    for block in blocks(page)[2 if page == "README.md" else 0 :]:
        for text, smaller in SMALLER.items():
            block = block.replace(text, smaller)
        run_in(home, "bash", "-euo", "pipefail", "-c", block, CLIP="weights/clip.pt", NPROC="1")
    for folder, count in {
        "README.md": [("msrvtt_meanP", 12), ("msrvtt_meanP_eval", 12), ("msvd", 12)],
        "docs/heads.md": [("msvd_zero_shot", 12)],
        "docs/encoders.md": [("msvd_siglip", 12), ("msvd_siglip_tuned_eval", 12)],
        "docs/training.md": [("msvd_meanP", 12)],
        "docs/frame_cache.md": [("msvd_cached", 12), ("msvd_frames", 12)],
        "docs/scripts.md": [("msvd", 12), ("msvd_rerun", 12)],
    }.get(page, []):
        assert json.loads((home / "runs" / folder / "results.json").read_text())["n_videos"] == count
    if page == "README.md":
        trained, scored = (home / "runs" / name / "results.json" for name in ("msrvtt_meanP", "msrvtt_meanP_eval"))
        assert json.loads(trained.read_text())["metrics"] == json.loads(scored.read_text())["metrics"]
    if page == "data/README.md":
        assert (home / "runs" / "sample" / "didemo" / "test_data.json").exists()
        assert len(list((home / "data" / "msrvtt" / "videos" / "small").glob("*.mp4"))) == 36
        assert len([block for block in blocks(page) if "preprocess.check_dataset" in block]) == 6


def test_the_tree_is_true():
    """Every file that README's tree names exists, and every source file stands in it under its folder."""
    tree = README[README.index("```text\nmain_task_retrieval.py") :].split("```")[1].removeprefix("text\n")
    listed = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=True).stdout.split()
    folders = dict(re.findall(r"^(\w+)/ (.*?)(?=^\S|\Z)", tree, re.DOTALL | re.MULTILINE))
    for folder in ("engine", "modules", "checkpoints", "dataloaders", "preprocess", "tools", "plugins"):
        files = [Path(name) for name in listed if name.startswith(f"{folder}/") and "/sample_data/" not in name]
        words = set(re.findall(r"\w+", folders[folder]))
        names = {path.stem for path in files if path.suffix == ".py"}
        assert not names - words - {"__init__"}, folder
        assert not set(re.findall(r"(\w+)\.py\b", folders[folder])) - names, folder
    for name in re.findall(r"^([\w/]+\.py|[\w/]+/)", tree, flags=re.MULTILINE):
        assert (ROOT / name).exists(), name


def test_links_lead_somewhere():
    for page in (*PAGES, "benchmarks/README.md"):
        text = (ROOT / page).read_text(encoding="utf-8")
        for target in re.findall(r"\]\((?!https?:)([^)#]*)(?:#[^)]*)?\)", text):
            assert ((ROOT / page).parent / target).exists(), f"{page}: {target}"


def test_the_page_of_flags_is_what_the_parser_knows():
    assert (ROOT / "docs" / "flags.md").read_text(encoding="utf-8") == flags.page()
