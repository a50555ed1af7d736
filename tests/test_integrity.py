"""Nothing is measured on data that are not what they should be: counts, missing files, leaks, duplicates."""

import json
import shutil

import numpy as np
import pytest
import torch

from checkpoints.read import CheckpointError, save_checkpoint
from dataloaders.annotation_files import AnnotationFiles
from dataloaders.integrity import IntegrityError, caption_doubts, check_complete, check_overlap, with_own_counts
from dataloaders.msrvtt import Options
from dataloaders.registry import load_annotations, short_id
from dataloaders.split import AnnotationError, Expected, RetrievalSplit, VideoClip, build_split
from engine.data import trained_videos
from main_task_retrieval import main
from modules.metrics import duplicates, retrieval_metrics, retrieval_ranks
from modules.tokenizer import Tokenizer


def split_of(n: int, expected: Expected, missing: tuple[str, ...] = ()) -> RetrievalSplit:
    videos = tuple(VideoClip(f"v{i}") for i in range(n))
    captions = tuple(f"caption {i}" for i in range(n))
    return RetrievalSplit("msvd", "test", videos, captions, np.arange(n), expected, missing)


def test_a_complete_split_passes():
    check_complete(split_of(3, Expected(3, 3)), allow_missing=False)
    check_complete(split_of(3, Expected(None, None)), allow_missing=False)


@pytest.mark.parametrize(
    ("split", "message"),
    [
        (split_of(3, Expected(5, 5)), "msvd test lists 3 videos where 5 are expected; is it the right list?"),
        (split_of(3, Expected(3, 4)), "msvd test holds 3 captions where 4 are expected"),
        (split_of(3, Expected(4, 4), ("gone",)), "1 of 4 videos of msvd test are missing on disk: 'gone'"),
    ],
)
def test_an_incomplete_split_is_refused_or_logged(split, message):
    with pytest.raises(IntegrityError, match=message.replace("?", r"\?")):
        check_complete(split, allow_missing=False)
    check_complete(split, allow_missing=True)


def test_counts_of_ones_own(sample_all, tmp_path):
    data = tmp_path / "msvd"
    shutil.copytree(sample_all / "msvd", data, ignore=shutil.ignore_patterns("videos"))
    files = AnnotationFiles(data_path=data)
    own = json.loads((data / "expected.json").read_text())["test"]
    assert load_annotations("msvd", "test", files).expected == Expected(own["videos"], own["captions"])
    (data / "expected.json").unlink()
    assert load_annotations("msvd", "test", files).expected == Expected(670, 27_763)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ('{"test": 3}', "key 'test' must hold videos and captions"),
        ('{"test": {"videos": 12}}', "key 'test' must hold videos and captions"),
        ('{"test": {"videos": "12", "captions": 60}}', "test.videos must be a whole number >= 1, is '12'"),
        ('{"test": {"videos": 12, "captions": 0}}', "test.captions must be a whole number >= 1, is 0"),
        ('{"test": {"videos": true, "captions": 60}}', "test.videos must be a whole number >= 1, is True"),
        ('{"train": {"videos": 1.5, "captions": 60}}', "train.videos must be a whole number >= 1, is 1.5"),
        ('{"tset": {"videos": 12, "captions": 60}}', "key 'tset' is no split; .* with splits train, val, test"),
        ("[]", "must hold an object {…}, holds a list"),
        ("{", "line 1, column 2: Expecting property name"),
    ],
)
def test_counts_of_ones_own_that_are_none(tmp_path, content, message):
    (tmp_path / "expected.json").write_text(content)
    with pytest.raises(AnnotationError, match=f"{tmp_path}/expected.json: {message}"):
        with_own_counts(split_of(3, Expected(3, 3)), tmp_path)


def test_msrvtt_counts_stand_beside_the_list_where_there_is_no_json(tmp_path):
    (tmp_path / "test.csv").write_text("video_id,sentence\nvideo1,a\n")
    files = AnnotationFiles(options=Options(val_csv=tmp_path / "test.csv"))
    with pytest.raises(IntegrityError, match=r"msrvtt test lists 1 videos, which is none of the published lists \(1,0"):
        check_complete(load_annotations("msrvtt", "test", files), allow_missing=False)
    check_complete(load_annotations("msrvtt", "test", files), allow_missing=True)
    (tmp_path / "expected.json").write_text('{"test": {"videos": 1, "captions": 1}}')
    check_complete(load_annotations("msrvtt", "test", files), allow_missing=False)


def test_counts_are_checked_whatever_is_missing_on_disk():
    split = split_of(4, Expected(4, 4)).drop(["v1"])
    check_complete(split, allow_missing=False, training=True)  # training goes on without a video
    with pytest.raises(IntegrityError, match="1 of 4 videos"):
        check_complete(split, allow_missing=False)
    for expected, message in ((Expected(5, 4), "lists 4 videos where 5"), (Expected(4, 9), "holds 4 captions where 9")):
        split = split_of(4, expected).drop(["v1"])
        with pytest.raises(IntegrityError, match=f"{message} .*give --allow_missing"):
            check_complete(split, allow_missing=False, training=True)
        check_complete(split, allow_missing=True, training=True)


def test_a_training_list_that_lost_rows_stops_the_run(sample, msrvtt_flags, tmp_path, capsys):
    short = tmp_path / "train.csv"
    rows = (sample / "msrvtt" / "MSRVTT_train.9k.csv").read_text().splitlines(keepends=True)
    short.write_text("".join(rows[:-1]))
    flags = list(msrvtt_flags)
    flags[flags.index("--train_csv") + 1] = str(short)
    flags += ["--do_train", "--epochs", "1", "--batch_size", "8", "--expand_msrvtt_sentences"]
    assert main(flags) == 1
    assert "msrvtt train lists 47 videos where 48 are expected" in capsys.readouterr().err
    assert main([*flags, "--allow_missing", "--batch_size_val", "6"]) == 0


def test_overlap_is_refused_and_captions_only_counted():
    split = split_of(3, Expected(None, None))
    found = check_overlap(split, ["w0", "w1"], ["caption 0", "caption 9"], "x", allow=False)
    assert (found.videos, found.captions) == ((), 1)
    with pytest.raises(IntegrityError, match="2 of the 3 videos of msvd test are among the training videos of x: 'v0'"):
        check_overlap(split, ["v0", "v2", "w"], None, "x", allow=False)
    assert check_overlap(split, ["v0", "v2", "w"], None, "x", allow=True).videos == ("v0", "v2")


def test_a_checkpoint_is_not_scored_on_its_training_videos(sample, msrvtt_flags, tmp_path, capsys):
    """As an MSR-VTT 9k model on Full test would be."""
    weights = tmp_path / "pytorch_model.bin"
    clip = torch.load(sample / "clip" / "tiny_clip.pt", weights_only=True)
    tensors = {f"clip.{k}": v for k, v in clip.items() if v.is_floating_point()}
    record = {"activation": "quick_gelu", "trained_on": {"msvd": ["video7013"], "msrvtt": ["video0", "video7012"]}}
    save_checkpoint(weights, tensors, record)
    flags = ["--do_eval", *msrvtt_flags, "--finetuned_path", str(weights)]
    assert main(flags) == 1
    error = capsys.readouterr().err
    assert "1 of the 12 videos of msrvtt test are among the training videos of" in error
    assert "video7012" in error
    assert "--allow_overlap" in error
    link = tmp_path / "best.bin"
    link.symlink_to(weights)
    for other in (tmp_path, link):  # the folder that holds the file; a link to it
        assert main(["--do_eval", *msrvtt_flags, "--finetuned_path", str(other)]) == 1
        assert "among the training videos" in capsys.readouterr().err
    assert main([*flags, "--allow_overlap"]) == 0
    found = json.loads((tmp_path / "out" / "results.json").read_text())
    assert found["overlap_with_training"] == {"videos": ["video7012"], "captions": None}


def test_training_videos_in_the_test_list_stop_the_training(sample, msrvtt_flags, tmp_path, capsys):
    leaky = tmp_path / "train.csv"
    leaky.write_text((sample / "msrvtt" / "MSRVTT_train.9k.csv").read_text() + "video7015\n")
    flags = list(msrvtt_flags)
    flags[flags.index("--train_csv") + 1] = str(leaky)
    assert main(["--do_train", "--epochs", "1", "--batch_size", "8", "--allow_missing", *flags]) == 1
    assert "among the training videos of the training split: 'video7015'" in capsys.readouterr().err
    assert not (tmp_path / "out" / "pytorch_model.bin").exists()


def test_duplicate_aware_ranks_by_hand():
    """Captions 0 and 2 are the same text of videos 0 and 1; caption 0 prefers video 1, which then counts as right."""
    captions, owner = ["a cat", "a dog", "a cat", "a bird"], torch.tensor([0, 0, 1, 2])
    sim = torch.tensor([[0.5, 0.9, 0.7], [0.9, 0.1, 0.2], [0.5, 0.9, 0.7], [0.1, 0.2, 0.3]])
    by_caption, by_video = duplicates(captions, owner)
    assert by_caption == {0: [1], 2: [0]}
    assert by_video == {0: [1], 1: [0]}
    assert retrieval_ranks(sim, owner)[0].tolist() == [2, 0, 0, 0]
    assert retrieval_ranks(sim, owner, (by_caption, by_video))[0].tolist() == [0, 0, 0, 0]
    # Video 2: its own caption 0.3 lies behind group 0 (0.7) and group 1 (0.7); nothing changes for it.
    assert retrieval_ranks(sim, owner, (by_caption, by_video))[1].tolist() == [0, 0, 2]
    metrics = retrieval_metrics(sim, owner, captions=captions)
    assert metrics["raw"]["t2v"]["R@1"] == 75.0
    assert metrics["duplicate_aware"]["t2v"]["R@1"] == 100.0
    assert "duplicate_aware" not in retrieval_metrics(sim, owner, captions=["a", "b", "c", "d"])


def test_captions_that_differ_in_case_and_white_space_are_duplicates():
    """As their tokens are: cleaned by ftfy, HTML unescaped, lower-cased, split into words."""
    captions = ["A  red Cat sits.", "a red\tcat sits .", "a red cat &amp; dog", "a red cat & dog", "a red cats its."]
    by_caption, _ = duplicates(captions, torch.arange(5))
    assert by_caption == {0: [1], 1: [0], 2: [3], 3: [2]}
    tokenizer = Tokenizer()
    assert tokenizer.encode(captions[0]) == tokenizer.encode(captions[1]) != tokenizer.encode(captions[4])
    metrics = retrieval_metrics(torch.eye(2), torch.arange(2), captions=captions[:2])
    assert metrics["duplicate_aware"]["t2v"]["R@1"] == 100.0


def test_captions_that_may_be_none_are_told():
    texts = ["nan", "NaN ", "None", "null", "[music]", "{a}", "a nan bread", "[a] and [b", "none of them"]
    split = build_split("toy", "test", {VideoClip(f"v{n}"): [t] for n, t in enumerate(texts)}, Expected(None, None))
    none, brackets = caption_doubts(split)
    assert none.startswith("4 captions of toy test are texts which programs write where there is none: 'v0: nan', ")
    assert brackets == "2 captions of toy test are texts in brackets: 'v4: [music]', 'v5: {a}'"
    assert caption_doubts(split_of(3, Expected(3, 3))) == []


def test_doubtful_and_cut_captions_and_the_captions_of_a_training_list_stand_in_log_and_results(
    sample, msrvtt_flags, tmp_path, capsys
):
    own = tmp_path / "own"
    own.mkdir()
    ids = (sample / "msrvtt" / "MSRVTT_train.9k.csv").read_text().split()[1:]
    assert len(ids) == 48
    rows = [f"{i},a clip of number {n}\n" for n, i in enumerate(ids)] + [f"{ids[0]},{'word ' * 40}\n"] * 3
    (own / "train.csv").write_text("video_id,sentence\n" + "".join(rows))
    test = (sample / "msrvtt" / "MSRVTT_JSFUSION_test.csv").read_text().splitlines()
    fields = [line.split(",")[:3] for line in test[1:]]
    (own / "test.csv").write_text(
        "\n".join([test[0], *(",".join([*f, "nan" if n == 2 else f"clip {n}"]) for n, f in enumerate(fields))])
    )
    flags = list(msrvtt_flags)
    for name in ("train", "val"):
        flags[flags.index(f"--{name}_csv") + 1] = str(own / ("test.csv" if name == "val" else "train.csv"))
    more = ["--do_train", "--epochs", "1", "--batch_size", "51", "--expand_msrvtt_sentences", "--allow_missing"]
    assert main([*flags, *more]) == 0
    out = capsys.readouterr().out
    assert "training: 48 videos, 51 items" in out
    assert f"{own}/train.csv: captions come from its column 'sentence'" in out
    assert (
        "3 of the 51 captions of msrvtt train are longer than --max_words 32 and are cut; the longest needs 42" in out
    )
    assert f"1 captions of msrvtt test are texts which programs write where there is none: '{fields[2][2]}: nan'" in out
    found = json.loads((tmp_path / "out" / "results.json").read_text())
    expected = {"train": {"captions": 3, "longest": 42}, "test": {"captions": 0, "longest": 0}}
    assert found["captions_cut"] == expected


def test_duplicate_aware_ties_with_wrong_candidates_are_still_lost():
    captions, owner = ["x", "x", "y"], torch.tensor([0, 1, 2])
    assert retrieval_ranks(torch.ones(3, 3), owner, duplicates(captions, owner))[0].tolist() == [1, 1, 2]


def test_one_video_under_two_names_is_one_video(tmp_path):
    """ActivityNet's `v_abc` and `abc`; and two names of one file."""
    film = tmp_path / "film.mp4"
    film.write_bytes(b"")
    (tmp_path / "copy.mp4").symlink_to(film)

    def split(name: str, *ids: str, path=None) -> RetrievalSplit:
        videos = tuple(VideoClip(i, path or tmp_path / f"{i}.mp4") for i in ids)
        return RetrievalSplit("activity", name, videos, ids, np.arange(len(ids)), Expected(None, None))

    train = split("train", "abc", "x")
    trained = trained_videos(None, tmp_path, train)
    assert trained == {"activity": ["abc", "x"]}
    with pytest.raises(IntegrityError, match="'v_abc'"):
        check_overlap(
            split("test", "v_abc", "y"),
            trained["activity"],
            None,
            "x",
            False,
            spelling=lambda i: short_id("activity", i),
        )
    one, other = split("train", "p", path=film), split("test", "q", path=tmp_path / "copy.mp4")
    with pytest.raises(IntegrityError, match="'q'"):
        check_overlap(other, ["p"], None, "x", False, one)


def test_training_again_keeps_the_record_of_all_training_videos(tmp_path):
    train = split_of(2, Expected(None, None))
    known = trained_videos({"msrvtt": ["video1"], "msvd": ["v9"]}, tmp_path, train)
    assert known == {"msrvtt": ["video1"], "msvd": ["v0", "v1", "v9"]}
    with pytest.raises(CheckpointError, match="trained_on must be"):
        trained_videos(["video1"], tmp_path, None)
