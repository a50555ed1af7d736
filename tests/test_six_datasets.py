"""Every dataset end to end on decoded files: checked, trained one step, scored; damage is always reported."""

import json
import os
import pickle
from pathlib import Path

import pytest

import dataloaders.video.decode
from dataloaders.registry import DATASETS, AnnotationFiles, load_split
from main_task_retrieval import main
from plugins import from_flags
from preprocess.check_dataset import main as check_dataset

DATATYPES = ("msrvtt", "msvd", "lsmdc", "activity", "didemo", "vatex")


def annotation_flags(root: Path, datatype: str) -> list[str]:
    data = root / datatype
    if datatype == "msrvtt":
        return [
            "--datatype",
            "msrvtt",
            "--data_path",
            f"{data}/MSRVTT_data.json",
            "--train_csv",
            f"{data}/MSRVTT_train.9k.csv",
            "--val_csv",
            f"{data}/MSRVTT_JSFUSION_test.csv",
        ]
    return ["--datatype", datatype, "--data_path", str(data)]


def video_folder(root: Path, datatype: str) -> Path:
    return root / datatype / "videos" / ("all" if datatype == "msrvtt" else "")


def run_flags(root: Path, datatype: str, out: Path, videos: Path | None = None) -> list[str]:
    return [
        *annotation_flags(root, datatype),
        "--features_path",
        str(videos or video_folder(root, datatype)),
        "--output_dir",
        str(out),
        "--pretrained_clip_name",
        str(root / "clip" / "tiny_clip.pt"),
        "--max_frames",
        "3",
        "--num_thread_reader",
        "0",
        "--device",
        "cpu",
        "--max_words",
        "77",
    ]


def mirrored(source: Path, target: Path) -> dict[str, Path]:
    """The same tree of links, and its files by name."""
    for path in sorted(source.rglob("*")):
        if path.is_file():
            link = target / path.relative_to(source)
            link.parent.mkdir(parents=True, exist_ok=True)
            link.symlink_to(path)
    return {path.name: path for path in target.rglob("*") if path.is_symlink()}


def test_videos(root: Path, datatype: str) -> list[Path]:
    data = root / datatype
    flags = {"val_csv": data / "MSRVTT_JSFUSION_test.csv"}
    annotations = data / "MSRVTT_data.json" if datatype == "msrvtt" else data
    files = AnnotationFiles(annotations, from_flags(DATASETS[datatype].Options, flags))
    return [video.path for video in load_split(datatype, "test", files, video_folder(root, datatype)).videos]


test_videos.__test__ = False


def count_reads(monkeypatch) -> list[Path]:
    """Paths of the videos read from now on, one entry a reading; reading itself goes on as before."""
    paths, read = [], dataloaders.video.decode.read_frames

    def counted(path, *args, **more):
        paths.append(path)
        return read(path, *args, **more)

    monkeypatch.setattr(dataloaders.video.decode, "read_frames", counted)
    return paths


@pytest.mark.parametrize("datatype", DATATYPES)
def test_a_clean_set_passes_in_one_line_per_split(sample_all, datatype, capsys):
    flags = [*annotation_flags(sample_all, datatype), "--features_path", str(video_folder(sample_all, datatype))]
    assert check_dataset([*flags, "--num_workers", "1"]) == 0
    lines = [line for line in capsys.readouterr().out.splitlines() if line]
    splits = DATASETS[datatype].splits
    assert len(lines) == len(splits)
    assert all(line.startswith(f"{datatype} {name}: ok: ") for line, name in zip(lines, splits))


@pytest.mark.parametrize("datatype", DATATYPES)
def test_one_training_step_and_an_evaluation(sample_all, datatype, tmp_path, monkeypatch):
    decoded = count_reads(monkeypatch)
    out = tmp_path / "out"
    flags = run_flags(sample_all, datatype, out)
    assert main(["--do_train", "--epochs", "1", "--batch_size", "12", "--freeze_layer_num", "-1", *flags]) == 0
    found = json.loads((out / "results.json").read_text())
    assert (found["dataset"], found["split"], found["n_videos"]) == (datatype, "test", 12)
    assert found["missing_videos"] == []
    assert found["protocol"]["selected_on"] == ("val" if "val" in DATASETS[datatype].splits else "test")
    assert found["options"]["frame_rule"] == ("second" if datatype in ("msvd", "activity") else "stride")
    assert found["overlap_with_training"]["videos"] == []
    if datatype in ("msvd", "vatex"):
        assert found["n_captions"] > 12
    # The last thing done was the evaluation: every test video decoded once, whatever its number of captions.
    assert sorted(decoded[-12:]) == sorted(test_videos(sample_all, datatype))
    rule, endings = found["options"]["frame_rule"], " ".join(DATASETS[datatype].extensions)
    assert f"frames by the {rule} rule; files {endings}" in (out / "log.txt").read_text()


@pytest.mark.parametrize("datatype", DATATYPES)
def test_damage_is_an_error_or_a_stamp(sample_all, datatype, tmp_path, capsys):
    """One test video removed, one cut short, one overwritten with noise."""
    videos = tmp_path / "videos"
    links = mirrored(video_folder(sample_all, datatype), videos)
    gone, cut, noise = (links[path.name] for path in test_videos(sample_all, datatype)[:3])
    for path, content in ((gone, None), (cut, cut.read_bytes()[: cut.stat().st_size // 3]), (noise, os.urandom(4000))):
        path.unlink()
        if content is not None:
            path.write_bytes(content)
    flags = ["--do_eval", *run_flags(sample_all, datatype, tmp_path / "out", videos)]
    assert main(flags) == 1
    assert f"1 of 12 videos of {datatype} test are missing on disk" in capsys.readouterr().err
    assert main([*flags, "--allow_missing"]) == 0
    found = json.loads((tmp_path / "out" / "results.json").read_text())
    assert found["n_videos"] == 9
    assert len(found["missing_videos"]) == 3
    gone.symlink_to(test_videos(sample_all, datatype)[0])
    (tmp_path / "out" / "results.json").unlink()
    assert main(flags) == 1
    error = capsys.readouterr().err
    assert f"2 of 12 videos of {datatype} test cannot be read" in error
    assert cut.name in error
    assert noise.name in error
    assert not (tmp_path / "out" / "results.json").exists()
    check = [*annotation_flags(sample_all, datatype), "--features_path", str(videos), "--num_workers", "1"]
    assert check_dataset([*check, "--splits", "test"]) == 1
    assert "2 videos cannot be read" in capsys.readouterr().out


def test_an_msvd_shaped_evaluation_decodes_each_video_once(sample_all, tmp_path, monkeypatch):
    """670 videos with 41 captions each: 670 readings, not 27,470."""
    data, videos = tmp_path / "msvd", tmp_path / "videos"
    data.mkdir()
    videos.mkdir()
    clips = sorted(video_folder(sample_all, "msvd").glob("*.avi"), key=lambda path: path.stat().st_size)[:10]
    ids = [f"clip{n}_0_10" for n in range(670)]
    for n, video_id in enumerate(ids):
        (videos / f"{video_id}.avi").symlink_to(clips[n % len(clips)])
    (data / "test_list.txt").write_text("\n".join(ids) + "\n")
    captions = {video_id: [["clip", str(n), "told", str(k)] for k in range(41)] for n, video_id in enumerate(ids)}
    (data / "raw-captions.pkl").write_bytes(pickle.dumps(captions, protocol=2))
    (data / "expected.json").write_text(json.dumps({"test": {"videos": 670, "captions": 670 * 41}}))
    decoded = count_reads(monkeypatch)
    flags = run_flags(sample_all, "msvd", tmp_path / "out", videos)
    flags[flags.index("--data_path") + 1] = str(data)
    assert main(["--do_eval", *flags, "--max_frames", "1", "--batch_size_val", "256"]) == 0
    assert len(decoded) == len(set(decoded)) == 670
    found = json.loads((tmp_path / "out" / "results.json").read_text())
    assert (found["n_videos"], found["n_captions"]) == (670, 27_470)
