"""What results.json says about its run, repeating a run from it, and many runs in one table."""

import csv
import hashlib
import io
import json
import subprocess
from pathlib import Path

import pytest

from engine.records import git_revision
from main_task_retrieval import main
from tools.rerun import main as rerun
from tools.results import main as gather


def metrics(recall: float) -> dict:
    row = {"R@1": recall, "R@5": 50.0, "R@10": 60.0, "MedR": 2.0, "MeanR": 9.5}
    return {"raw": {"t2v": row, "v2t": row}, "dsl": {"t2v": row, "v2t": row}, "qb_norm": {"t2v": row}}


def finished(folder: Path, recall: float, **options) -> str:
    folder.mkdir(parents=True)
    found = {
        "dataset": "msvd",
        "split": "test",
        "n_videos": 670,
        "n_captions": 27763,
        "missing_videos": [],
        "metrics": metrics(recall),
        "options": {"sim_header": "meanP", "output_dir": str(folder)} | options,
    }
    (folder / "results.json").write_text(json.dumps(found))
    return str(folder)


def test_seeds_share_a_row_and_other_runs_do_not(tmp_path, capsys):
    """40, 42 and 44: mean 42, deviation of the sample 2."""
    runs = [finished(tmp_path / f"seed_{n}", 40.0 + 2 * n, seed=n) for n in range(3)]
    runs.append(finished(tmp_path / "ti", 30.0, seed=0, interaction="ti"))
    assert gather([*runs, "--format", "csv"]) == 0
    rows = list(csv.DictReader(io.StringIO(capsys.readouterr().out)))
    assert [(r["run"], r["head"], r["runs"], r["t2v R@1"]) for r in rows if r["post-processing"] == "raw"] == [
        ("seed_0", "meanP", "3", "42.0 ± 2.0"),
        ("ti", "meanP ti", "1", "30.0"),
    ]
    assert [r["post-processing"] for r in rows[:3]] == ["raw", "dsl (transductive)", "qb_norm"]
    assert [r["v2t R@1"] for r in rows] == ["42.0 ± 2.0", "42.0 ± 2.0", "", "30.0", "30.0", ""]


def test_formats(tmp_path, capsys):
    runs = [finished(tmp_path / f"a_{n}", 40.0 + n, seed=n) for n in range(2)]
    assert gather(runs) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].startswith("| run | dataset | split | videos |")
    assert set(lines[1]) == set("| -")
    assert "| 40.5 ± 0.7 |" in lines[2]
    assert gather([*runs, "--format", "latex"]) == 0
    text = capsys.readouterr().out
    assert text.startswith(r"\begin{tabular}{lllllllllrrrrrrrrrr}")
    assert r"a\_0 & msvd & test & 670 & 27763 & CLIP & meanP & raw & 2 & 40.5 $\pm$ 0.7 & 50.0 $\pm$ 0.0" in text


def test_what_is_no_run_is_named(tmp_path, capsys):
    assert gather([str(tmp_path)]) == 1
    assert f"{tmp_path}/results.json is not the results.json of a finished run" in capsys.readouterr().err


def test_revision_of_the_code(tmp_path):
    assert git_revision(tmp_path) is None
    git = ["git", "-C", str(tmp_path), "-c", "user.name=a", "-c", "user.email=a@b"]
    (tmp_path / "file").write_text("1")
    for command in (["init", "-q"], ["add", "file"], ["commit", "-qm", "x"]):
        subprocess.run([*git, *command], check=True)
    head = subprocess.run([*git, "rev-parse", "HEAD"], check=True, capture_output=True, text=True).stdout.strip()
    assert git_revision(tmp_path) == {"revision": head, "modified": False}
    (tmp_path / "file").write_text("2")
    assert git_revision(tmp_path) == {"revision": head, "modified": True}


@pytest.fixture
def trained(msrvtt_flags, tmp_path) -> Path:
    """A run of one epoch, and its results.json."""
    assert main(["--do_train", "--epochs", "1", "--batch_size", "24", "--seed", "7", *msrvtt_flags]) == 0
    return tmp_path / "out" / "results.json"


def test_a_run_says_what_it_takes_to_repeat_it_and_is_repeated(trained, msrvtt_flags, sample, tmp_path, capfd):
    found = json.loads(trained.read_text())
    assert found["command"] == [
        "main_task_retrieval.py",
        "--do_train",
        "--epochs",
        "1",
        "--batch_size",
        "24",
        "--seed",
        "7",
        *msrvtt_flags,
    ]
    assert (found["folder"], found["device"], found["processes"]) == (str(Path.cwd()), "cpu", 1)
    assert found["run_seconds"] >= found["seconds"] > 0
    for kind, paths in {
        "annotations": [
            sample / "msrvtt" / name
            for name in ("MSRVTT_data.json", "MSRVTT_train.9k.csv", "MSRVTT_JSFUSION_test.csv", "expected.json")
        ],
        "weights": [sample / "clip" / "tiny_clip.pt", tmp_path / "out" / "pytorch_model.bin"],
    }.items():
        assert found["sha256"][kind] == {str(p): hashlib.sha256(p.read_bytes()).hexdigest() for p in paths}
    assert rerun([str(trained)]) == 0
    assert capfd.readouterr().out.endswith("the same metrics\n")
    again = json.loads((tmp_path / "out_rerun" / "results.json").read_text())
    assert again["metrics"] == found["metrics"]
    assert json.loads(trained.read_text()) == found


def test_changed_files_stop_a_repetition(trained, tmp_path, capsys):
    found = json.loads(trained.read_text())
    first = next(iter(found["sha256"]["annotations"]))
    found["sha256"]["annotations"][first] = "0" * 64
    found["sha256"]["weights"]["gone.pt"] = "0" * 64
    trained.write_text(json.dumps(found))
    assert rerun([str(trained)]) == 1
    error = capsys.readouterr().err
    assert f"{first} has changed; " in error
    assert "gone.pt is gone" in error
    assert rerun([str(trained), "--show"]) == 0
    assert "--output_dir" in capsys.readouterr().out
    trained.write_text("{}")
    assert rerun([str(trained)]) == 1
    assert "is not a results.json that tells how to repeat its run" in capsys.readouterr().err
