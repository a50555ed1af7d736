"""The 24 scripts: each runs to its end on the sample of its dataset, from elsewhere and under paths with spaces."""

import json
import os
import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from launching import LIMIT, ROOT

from modules.encoders.clip import CLIP, ClipSizes
from modules.encoders.internvideo import VideoCLIP, VideoClipSizes
from tools.run_all import main as run_all

DATATYPE = {
    "msrvtt": "msrvtt",
    "msvd": "msvd",
    "lsmdc": "lsmdc",
    "activitynet": "activity",
    "didemo": "didemo",
    "vatex": "vatex",
}
KINDS = {  # pattern of the path -> whether it trains, whether it has InternVideo's tower
    "zeroshot_scripts/eval_{}.sh": (False, True),
    "finetune_scripts/train_{}.sh": (True, True),
    "finetune_scripts/ret_{}.sh": (True, False),
    "eval_finetuned_scripts/eval_finetuned_{}.sh": (False, True),
}
SCRIPTS = {kind.format(name): (name, *KINDS[kind]) for kind in KINDS for name in DATATYPE}
TWO_PROCESSES = ("zeroshot_scripts/eval_msvd.sh", "finetune_scripts/train_didemo.sh")
TINY = [
    "--max_frames",
    "2",
    "--batch_size",
    "24",
    "--epochs",
    "1",
    "--batch_size_val",
    "16",
    "--num_thread_reader",
    "0",
    "--device",
    "cpu",
]
SIZES = {
    "embed_dim": 64,
    "image_resolution": 32,
    "vision_layers": 2,
    "vision_width": 64,
    "patch_size": 16,
    "context_length": 77,
    "vocab_size": 49408,
    "text_width": 64,
    "text_heads": 1,
    "text_layers": 1,
    "vision_heads": 1,
}
# What stands beside "state_dict", which InternVideo's code reads, in a file of Lightning's.
LIGHTNING = {
    "epoch": 3,
    "global_step": 1200,
    "pytorch-lightning_version": "1.5.10",
    "optimizer_states": [{"state": {0: {"step": 1200, "exp_avg": torch.zeros(2)}}, "param_groups": [{"lr": 1e-5}]}],
    "lr_schedulers": [],
}
LAUNCHERS = (
    "RANK",
    "WORLD_SIZE",
    "LOCAL_RANK",
    "MASTER_ADDR",
    "MASTER_PORT",
    "CUDA_VISIBLE_DEVICES",
    "DATA_PATH",
    "VIDEO_PATH",
    "WEIGHTS",
    "CLIP",
    "OUTPUT",
    "NPROC",
    "NNODES",
    "NODE_RANK",
)


def environment(**more: object) -> dict[str, str]:
    """This process's environment without anything that a launcher or the user has set for scripts."""
    clean = {k: v for k, v in os.environ.items() if k not in LAUNCHERS and not k.startswith("SLURM")}
    return clean | {"OMP_NUM_THREADS": "1", "PYTHON": sys.executable} | {k: str(v) for k, v in more.items()}


def script(path: str, *flags: str, cwd: Path = ROOT, **variables: object) -> subprocess.CompletedProcess:
    return subprocess.run(
        ["bash", str(ROOT / path), *flags],
        cwd=cwd,
        env=environment(**variables),
        text=True,
        capture_output=True,
        timeout=LIMIT,
    )


def place(sample: Path, weights: Path, path: str, out: Path) -> dict[str, Path]:
    """The variables of a script for the sample."""
    name, _, video_tower = SCRIPTS[path]
    data = sample / DATATYPE[name]
    videos = data / "videos" / ("all" if name == "msrvtt" else "")
    return {
        "DATA_PATH": data,
        "VIDEO_PATH": videos,
        "CLIP": weights / "clip.bin",
        "OUTPUT": out,
        "WEIGHTS": weights / ("video tower.bin" if video_tower else "clip.bin"),
    }


@pytest.fixture(scope="module")
def weights(tmp_path_factory) -> Path:
    """A folder with a plain CLIP and InternVideo's tower of the same size, untrained."""
    folder = tmp_path_factory.mktemp("weights $(of) 'mine'")
    torch.manual_seed(0)
    clip = CLIP(ClipSizes(**SIZES), "quick_gelu")
    video = VideoCLIP(VideoClipSizes(**SIZES, read_after=(0, 1)), "quick_gelu")
    for file, model in (("clip.bin", clip), ("video tower.bin", video)):
        state = {f"clip.{k}": v for k, v in model.state_dict().items()}
        torch.save({"state_dict": state, **LIGHTNING}, folder / file)
    return folder


@pytest.fixture(scope="module")
def runs(sample_all, weights, tmp_path_factory) -> dict[str, tuple[subprocess.CompletedProcess, Path]]:
    """Every script once, two at a time."""
    folder = tmp_path_factory.mktemp("runs of all")
    data = folder / "the data"
    data.symlink_to(sample_all)

    def start(path: str) -> tuple[subprocess.CompletedProcess, Path]:
        out = folder / path.replace("/", " ")
        return script(path, *TINY, cwd=folder, NPROC=1, **place(data, weights, path, out)), out

    with ThreadPoolExecutor(2) as pool:
        return dict(zip(SCRIPTS, pool.map(start, SCRIPTS)))


def test_there_are_24():
    found = {str(path.relative_to(ROOT)) for path in ROOT.glob("*_scripts/*")}
    assert found == set(SCRIPTS)
    assert all(os.access(ROOT / path, os.X_OK) for path in found)


@pytest.mark.parametrize("path", SCRIPTS)
def test_a_script_runs_to_its_end(path, runs):
    done, out = runs[path]
    assert done.returncode == 0, done.stdout + done.stderr
    name, trains, video_tower = SCRIPTS[path]
    found = json.loads((out / "results.json").read_text())
    options = found["options"]
    assert (found["dataset"], found["split"], found["n_videos"]) == (DATATYPE[name], "test", 12)
    assert options["do_train"] is trains
    assert (out / "pytorch_model.bin").exists() is trains
    assert options["compat"] == ("internvideo" if video_tower else "none")
    assert options["frame_rule"] == ("second" if name in ("msvd", "activitynet") else "stride")
    assert (options["max_frames"], options["num_thread_reader"]) == (2, 0)  # the later flag counts


@pytest.mark.parametrize("path", TWO_PROCESSES)
def test_two_processes(path, runs, sample_all, weights, tmp_path):
    """The result of one process, to the last digit where nothing is trained."""
    done = script(path, *TINY, NPROC=2, **place(sample_all, weights, path, tmp_path / "out"))
    assert done.returncode == 0, done.stdout + done.stderr
    assert "cpu, 2 process(es)" in (tmp_path / "out" / "log.txt").read_text()
    found, alone = (json.loads((out / "results.json").read_text()) for out in (tmp_path / "out", runs[path][1]))
    assert found["n_videos"] == 12
    if not SCRIPTS[path][1]:
        assert found["metrics"] == alone["metrics"]


@pytest.mark.parametrize("path", SCRIPTS)
def test_help_says_what_runs(path):
    done = script(path, "--help", "--epochs", "7")
    assert done.returncode == 0, done.stderr
    assert path in done.stdout
    last = done.stdout.strip().splitlines()[-1]
    assert "main_task_retrieval.py --do_" in last
    assert last.endswith("--epochs 7")
    for name in ("DATA_PATH", "VIDEO_PATH", "WEIGHTS", "CLIP", "OUTPUT", "NPROC", "NNODES", "PYTHON"):
        assert f"\n  {name} " in done.stdout


@pytest.mark.parametrize(
    ("variable", "message"),
    [
        ("DATA_PATH", "set DATA_PATH to the folder of didemo's annotation files"),
        ("VIDEO_PATH", "set VIDEO_PATH to the folder of didemo's video files"),
        ("WEIGHTS", "set WEIGHTS to InternVideo's pre-trained checkpoint"),
        ("CLIP", "set CLIP to ViT-L/14 or the file of a CLIP"),
    ],
)
def test_what_is_missing_is_named_at_once(variable, message, sample_all, weights, tmp_path):
    path = "zeroshot_scripts/eval_didemo.sh"
    variables = place(sample_all, weights, path, tmp_path / "out") | {variable: tmp_path / "no such"}
    done = script(path, **variables)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.startswith("error: no f")
    assert message in done.stderr
    assert not (tmp_path / "out").exists()


def test_without_variables_the_repository_s_own_folders_are_named():
    done = script("eval_finetuned_scripts/eval_finetuned_activitynet.sh", "--help")
    for place in (
        "data/activity",
        "data/activity/videos",
        "runs/train_activitynet/pytorch_model.bin",
        "runs/eval_finetuned_activitynet",
    ):
        assert f"{ROOT}/{place}\n" in done.stdout


@pytest.mark.parametrize(
    ("variables", "start"),
    [
        ({"NPROC": 1}, "PYTHON "),
        ({"NPROC": 4}, "PYTHON -m torch.distributed.run --standalone --nproc_per_node 4 "),
        ({"CUDA_VISIBLE_DEVICES": "2,5,6"}, "PYTHON -m torch.distributed.run --standalone --nproc_per_node 3 "),
        ({"CUDA_VISIBLE_DEVICES": ""}, "PYTHON "),
        ({"CUDA_VISIBLE_DEVICES": "-1"}, "PYTHON "),
        (
            {"NPROC": 8, "NNODES": 2, "NODE_RANK": 1, "MASTER_ADDR": "a", "MASTER_PORT": 5},
            "PYTHON -m torch.distributed.run --nnodes 2 --node_rank 1 --nproc_per_node 8 --master_addr a "
            "--master_port 5 ",
        ),
        ({"SLURM_JOB_ID": 7, "SLURM_NTASKS": 8}, "srun --kill-on-bad-exit=1 PYTHON "),
        ({"SLURM_JOB_ID": 7, "SLURM_NTASKS": 1, "NPROC": 2}, "PYTHON -m torch.distributed.run --standalone "),
        ({"SLURM_JOB_ID": 7, "SLURM_NTASKS": 8, "SLURM_STEP_ID": 0, "SLURM_STEP_NUM_TASKS": 8}, "PYTHON "),
    ],
)
def test_the_launcher_fits_the_place(variables, start):
    last = script("finetune_scripts/ret_msvd.sh", "--help", **variables).stdout.strip().splitlines()[-1].strip()
    launcher, _ = last.split(str(ROOT / "main_task_retrieval.py"))
    assert launcher.startswith(start.replace("PYTHON", sys.executable))
    if "torch.distributed" not in start:
        assert launcher == start.replace("PYTHON", sys.executable)


def test_several_machines_need_an_address(sample_all, weights, tmp_path):
    path = "finetune_scripts/ret_msvd.sh"
    done = script(path, NNODES=2, NPROC=1, **place(sample_all, weights, path, tmp_path / "out"))
    assert (done.returncode, done.stderr) == (2, "error: NNODES is 2: set MASTER_ADDR to the host of NODE_RANK 0\n")


def test_bash_and_shellcheck_find_nothing():
    files = [str(path.relative_to(ROOT)) for path in [*ROOT.glob("*_scripts/*.sh"), *ROOT.glob("scripts/*.sh")]]
    assert len(files) == 25
    for file in files:
        subprocess.run(["bash", "-n", file], cwd=ROOT, check=True)
    if shutil.which("shellcheck"):
        done = subprocess.run(["shellcheck", *files], cwd=ROOT, capture_output=True, text=True)
        assert done.returncode == 0, done.stdout


def test_all_datasets_in_one_call(sample_all, weights, tmp_path, monkeypatch, capfd):
    """One dataset works, one lacks its videos; the second call repeats only what failed."""
    (tmp_path / "data" / "didemo").mkdir(parents=True)
    (tmp_path / "data" / "msvd").symlink_to(sample_all / "msvd")
    for name in LAUNCHERS:
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("CLIP", str(weights / "clip.bin"))
    call = [
        "--weights",
        str(weights / "video tower.bin"),
        "--data_root",
        str(tmp_path / "data"),
        "--output_root",
        str(tmp_path / "out"),
        *TINY,
    ]
    for again in (False, True):
        assert run_all(call) == 1
        said = capfd.readouterr()
        assert "| msvd | msvd | test | 12 |" in said.out
        assert ("== msvd: its results are there" in said.out) is again
        assert "set VIDEO_PATH to the folder of didemo's video files" in said.err
        assert "error: didemo failed" in said.err
