"""Each dataset's files, in their own layouts and damaged, and the real id lists against the published counts."""

from __future__ import annotations

import collections
import hashlib
import json
import logging
import os
import pickle
import pickletools
import re
import subprocess
from pathlib import Path

import numpy as np
import pytest

from dataloaders import activitynet, didemo, lsmdc, msrvtt, msvd, vatex
from dataloaders.annotation_files import READ, AnnotationFiles
from dataloaders.plain_pickle import read_plain_pickle
from dataloaders.registry import DATASETS, load_split
from dataloaders.split import AnnotationError, Expected, RetrievalSplit

DATA = Path(__file__).parent / "data"
UNPUBLISHED = Expected(None, None)


def write(path: Path, content: object) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(content if isinstance(content, str) else json.dumps(content), encoding="utf-8")
    return path


def captions_of(split: RetrievalSplit) -> dict[str, list[str]]:
    found: dict[str, list[str]] = {clip.video_id: [] for clip in split.videos}
    for caption, video in zip(split.captions, split.caption_to_video):
        found[split.videos[video].video_id].append(caption)
    return found


def msrvtt_json(path: Path, captions: dict[str, list[str]]) -> Path:
    sentences = [{"video_id": i, "caption": text, "sen_id": 0} for i, texts in captions.items() for text in texts]
    return write(path, {"videos": [{"video_id": i, "url": ""} for i in captions], "sentences": sentences})


def test_every_dataset_declares_the_same_things():
    assert sorted(DATASETS) == ["activity", "didemo", "lsmdc", "msrvtt", "msvd", "vatex"]
    for datatype, dataset in DATASETS.items():
        assert dataset.name == datatype
        assert (dataset.frame_rule == "second") == (datatype in ("msvd", "activity"))
        assert dataset.frame_rule in ("second", "stride")
        assert ("val" in dataset.splits) == (datatype not in ("msrvtt", "activity"))
        assert all(extension.startswith(".") for extension in dataset.extensions)
        assert dataset.draws_captions(dataset.Options()) == (datatype == "msrvtt")
    assert not DATASETS["msrvtt"].draws_captions(msrvtt.Options(expand_msrvtt_sentences=True))


@pytest.mark.parametrize("dataset", DATASETS.values(), ids=list(DATASETS))
def test_an_unknown_split_lists_those_there_are(dataset):
    with pytest.raises(AnnotationError, match=f"{dataset.name} has no split 'dev'; it has train, "):
        dataset.load("dev", AnnotationFiles())


# MSR-VTT ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("name", "count"), [("9k", 9_000), ("7k", 7_010)])
def test_msrvtt_real_training_lists(tmp_path, name, count):
    train_csv = DATA / f"MSRVTT_train.{name}.csv"
    ids = train_csv.read_text().split()[1:]
    data = msrvtt_json(tmp_path / "MSRVTT_data.json", {i: [f"{i} {n}" for n in range(20)] for i in ids})
    split = msrvtt.load("train", AnnotationFiles(data, msrvtt.Options(train_csv=train_csv)))
    assert (len(split.videos), len(split.captions)) == (count, 20 * count)
    assert split.expected == Expected(count, 20 * count)


def test_msrvtt_real_1k_a():
    split = msrvtt.load("test", AnnotationFiles(options=msrvtt.Options(val_csv=DATA / "MSRVTT_JSFUSION_test.csv")))
    assert split.expected == Expected(1_000, 1_000)
    assert np.array_equal(split.caption_to_video, np.arange(1_000))
    assert len(set(split.captions)) == 995
    assert captions_of(split)["video9770"] == ["a person is connecting something to system"]


def test_msrvtt_lists_without_sentences_take_all_captions(tmp_path):
    ids = [f"video{n}" for n in range(2_990)]
    full = write(tmp_path / "full_test.csv", "video_id\n" + "\n".join(ids))
    data = msrvtt_json(tmp_path / "data.json", {i: [f"{i} {n}" for n in range(20)] for i in ids})
    split = msrvtt.load("test", AnnotationFiles(data, msrvtt.Options(val_csv=full)))
    assert len(split.captions) == split.expected.captions == 59_800
    b_list = write(tmp_path / "1k_b.csv", "video_id\n" + "\n".join(ids[:1_000]))
    assert msrvtt.load("test", AnnotationFiles(data, msrvtt.Options(val_csv=b_list))).expected == Expected(
        1_000, 20_000
    )
    val = write(tmp_path / "val.csv", "video_id\n" + "\n".join(ids[:497]))
    assert msrvtt.load("test", AnnotationFiles(data, msrvtt.Options(val_csv=val))).expected.videos == 497


def test_msrvtt_lists_of_another_length_are_held_to_the_nearest(tmp_path):
    text = 'key,vid_key,video_id,sentence\nret0,msr1,video1,"one, two"\n\nret1,msr2,video2,"say ""hi"""\n'
    val_csv = write(tmp_path / "val.csv", "\ufeff" + text.replace("\n", "\r\n"))
    split = msrvtt.load("test", AnnotationFiles(options=msrvtt.Options(val_csv=val_csv)))
    assert captions_of(split) == {"video1": ["one, two"], "video2": ['say "hi"']}
    assert split.expected == Expected(1_000, 1_000, published=(1_000,))
    ids = [f"video{n}" for n in range(7_009)]
    train_csv = write(tmp_path / "train.csv", "video_id\n" + "\n".join(ids))
    data = msrvtt_json(tmp_path / "data.json", {i: [i] for i in ids})
    split = msrvtt.load("train", AnnotationFiles(data, msrvtt.Options(train_csv=train_csv)))
    assert split.expected == Expected(7_010, 140_200, published=(9_000, 7_010, 6_513))


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("key,sentence\nret0,hello\n", r"val\.csv: line 1: no column 'video_id'; it has 'key', 'sentence'"),
        ("video_id,sentence\nvideo1,one, two\n", r"val\.csv: line 2: 3 cells where the header has 2"),
        ("video_id,sentence\nvideo1,a\nvideo1,b\n", r"val\.csv: line 3: id 'video1' already stands at line 2"),
        ("video_id,sentence\nvideo1,a\nvideo2, \n", r"val\.csv: line 3: column 'sentence' is empty"),
        ("video_id,sentence\n,a\n", r"val\.csv: line 2: the id is empty"),
        ('video_id,sentence\nvideo1,"a\n', r"val\.csv: line 2: unexpected end of data"),
        ("video_id,video_id\nvideo1,a\n", r"val\.csv: line 1: column 'video_id' occurs twice"),
        ("video_id,sentence\n", r"val\.csv: no row in the file"),
        ("", r"val\.csv: no row in the file"),
        ("\n \n", r"val\.csv: no row in the file"),
        ("\nvideo_id,sentence\n\nvideo1\n", r"val\.csv: line 4: 1 cells where the header has 2"),
        ("video_id,sentence\nvideo1,a,b,c,d\n", r"val\.csv: line 2: 5 cells where the header has 2"),
        ('video_id,sentence\nvideo1,"a"b\nvideo2,c\n', r"val\.csv: line 2: ',' expected after '\"'"),
        ('video_id,sentence\nvideo1,"a\nb"\nvideo2\n', r"val\.csv: line 4: 1 cells where the header has 2"),
        ('video_id,sentence\n"\n",a,"b\n",c,d,e\n', r"val\.csv: line 4: 6 cells where the header has 2"),
    ],
)
def test_msrvtt_malformed_csv(tmp_path, content, message):
    val_csv = write(tmp_path / "val.csv", content)
    with pytest.raises(AnnotationError, match=message):
        msrvtt.load("test", AnnotationFiles(options=msrvtt.Options(val_csv=val_csv)))


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ('{"sentences": [\n{"video_id": }]}', r"data\.json: line 2, column 14: Expecting value"),
        ("[]", r"data\.json: must hold an object {…}, holds a list"),
        ({"videos": []}, r"data\.json: top level: no key 'sentences'; it has 'videos'"),
        ({"sentences": [{"video_id": "video1"}]}, r"data\.json: sentences\[0\]: no key 'caption'"),
        ({"sentences": [{"video_id": "video1", "caption": 3}]}, r"sentences\[0\]\.caption: must be a str, is int 3"),
        ({"sentences": [{"video_id": "video1", "caption": " "}]}, r"sentences\[0\]\.caption: is empty"),
        ({"sentences": ["hello"]}, r"sentences\[0\]: must be an object {…}, is a str"),
        ({"sentences": []}, r"train\.csv: 1 ids have no caption in .*data\.json: 'video1'"),
        ("[" * 100_000, r"data\.json: nested too deeply"),
    ],
)
def test_msrvtt_malformed_json(tmp_path, content, message):
    files = AnnotationFiles(
        write(tmp_path / "data.json", content),
        msrvtt.Options(train_csv=write(tmp_path / "train.csv", "video_id\nvideo1\n")),
    )
    with pytest.raises(AnnotationError, match=message):
        msrvtt.load("train", files)


def test_text_that_is_not_utf8_names_line_and_column(tmp_path):
    path = tmp_path / "val.csv"
    path.write_bytes(b"video_id,sentence\nvideo1,caf\xe9\n")
    with pytest.raises(AnnotationError, match=r"val\.csv: line 2, column 11: not UTF-8"):
        msrvtt.load("test", AnnotationFiles(options=msrvtt.Options(val_csv=path)))


def test_absent_files_name_the_flag(tmp_path):
    with pytest.raises(AnnotationError, match="--train_csv is needed"):
        msrvtt.load("train", AnnotationFiles())
    with pytest.raises(AnnotationError, match=r"gone\.csv: cannot be read: No such file"):
        msrvtt.load("train", AnnotationFiles(options=msrvtt.Options(train_csv=tmp_path / "gone.csv")))
    with pytest.raises(AnnotationError, match="--data_path is needed: the folder that holds test_list.txt"):
        msvd.load("test", AnnotationFiles())
    with pytest.raises(AnnotationError, match="put test_list.txt into --data_path"):
        msvd.load("test", AnnotationFiles(data_path=tmp_path))
    with pytest.raises(AnnotationError, match="is not a folder"):
        msvd.load("test", AnnotationFiles(data_path=write(tmp_path / "f", "x")))


# How people's files differ --------------------------------------------------------------------------------------------


@pytest.fixture
def heard(caplog, monkeypatch):
    """What the readers log, also after a run in this process has taken the log for itself."""
    monkeypatch.setattr(logging.getLogger("retrieval"), "propagate", True)
    caplog.set_level("INFO", "retrieval")
    return caplog


@pytest.mark.parametrize("split", ["train", "test"])
@pytest.mark.parametrize(
    "name", ["text", "query", "Description", "caption_text", "captions", "Sentence", "words_in_row"]
)
def test_msrvtt_captions_under_another_name_are_refused(tmp_path, split, name):
    path = write(tmp_path / "list.csv", f"video_id,{name},category\nvideo1,a red cat,3\nvideo2,the dog barks,7\n")
    data = msrvtt_json(tmp_path / "data.json", {"video1": ["x"], "video2": ["y"]})
    options = msrvtt.Options(train_csv=path, val_csv=path)
    known = f"known are 'video_id', 'sentence', 'key', 'vid_key', the file has 'video_id', '{name}', 'category'"
    with pytest.raises(AnnotationError, match=rf"list\.csv: line 1: column '{name}' looks like captions; .*{known}"):
        msrvtt.load(split, AnnotationFiles(data, options))


def test_columns_that_are_no_captions_are_let_be_and_further_captions_told(tmp_path, heard):
    header, row = "video_id,category,url,sen_id,text_length,split", "video1,tv shows,https://a.b/c,12,40,test"
    other = "video2,people,https://a.b/d,13,38,test"
    path = write(tmp_path / "list.csv", f"{header}\n{row}\n{other}\nvideo3,music,https://a.b/e,14,30,test\n")
    data = msrvtt_json(tmp_path / "data.json", {f"video{n}": ["x", "y"] for n in (1, 2, 3)})
    assert len(msrvtt.load("test", AnnotationFiles(data, msrvtt.Options(val_csv=path))).captions) == 6
    assert not heard.text
    path = write(tmp_path / "two.csv", "video_id,sentence,caption2\nvideo1,a cat,the cat sits\n")
    assert msrvtt.load("test", AnnotationFiles(options=msrvtt.Options(val_csv=path))).captions == ("a cat",)
    assert "two.csv: columns 'caption2' are not read; known are 'video_id', 'sentence'" in heard.text


def test_msrvtt_training_list_with_sentences_brings_its_own_captions(tmp_path, heard):
    rows = "video1,a cat\nvideo2,\"['a dog', 'a wet dog']\"\nvideo1,the cat sits\n"
    path = write(tmp_path / "train.csv", "video_id,sentence\n" + rows)
    data = msrvtt_json(tmp_path / "data.json", {"video1": ["of the json"] * 20, "video2": ["of the json"] * 20})
    split = msrvtt.load("train", AnnotationFiles(data, msrvtt.Options(train_csv=path)))
    assert captions_of(split) == {"video1": ["a cat", "the cat sits"], "video2": ["a dog", "a wet dog"]}
    assert split.expected == Expected(6_513, None, published=(9_000, 7_010, 6_513))
    assert "train.csv: captions come from its column 'sentence', not from MSRVTT_data.json" in heard.text
    path = write(tmp_path / "train.csv", "video_id,sentence\nvideo1,\nvideo2, \n")
    split = msrvtt.load("train", AnnotationFiles(data, msrvtt.Options(train_csv=path)))
    assert set(split.captions) == {"of the json"}
    assert "column 'sentence' is empty throughout" in heard.text
    path = write(tmp_path / "train.csv", "video_id,sentence\nvideo1,a\nvideo2, \n")
    with pytest.raises(AnnotationError, match=r"train\.csv: line 3: column 'sentence' is empty"):
        msrvtt.load("train", AnnotationFiles(data, msrvtt.Options(train_csv=path)))


@pytest.mark.parametrize(
    ("cell", "captions"),
    [
        ("['a man', 'a dog']", ["a man", "a dog"]),
        ('["a"]', ["a"]),
        ("('it\\'s red',)", ["it's red"]),
        ('["caf\\u00e9", "a \\"b\\""]', ["café", 'a "b"']),
        ("(a man, aside)", ["(a man, aside)"]),
        ("a man [music] waves", ["a man [music] waves"]),
        ("array(['a'], dtype=object)", None),
        ("['a man' 'a dog']", None),  # as numpy prints it; Python would read one string "a mana dog"
        ("{'caption': 'x'}", None),
        ("[{'caption': 'x'}]", None),
        ("[a man, b]", None),
        ("{a man}", None),
        ("['a man', None]", None),
        ("['a man', 'a d", None),
        ("[]", None),
        ("['']", None),
        ("['a', 'man', 'walks']", None),
        ("b'a man walks'", None),
        ("np.str_('a man')", None),
        ("\"['a man', 'a dog']\"", None),
    ],
)
def test_a_cell_is_one_caption_or_those_of_a_list_or_refused(tmp_path, cell, captions):
    quoted = cell.replace('"', '""')
    path = write(tmp_path / "val.csv", f'video_id,sentence\nvideo1,"{quoted}"\n')
    files = AnnotationFiles(options=msrvtt.Options(val_csv=path))
    if captions is None:
        with pytest.raises(AnnotationError, match=r"val\.csv: line 2: column 'sentence': (it looks like a|the list)"):
            msrvtt.load("test", files)
    else:
        split = msrvtt.load("test", files)
        assert list(split.captions) == captions
        assert split.expected.captions == (1_000 if len(captions) == 1 else None)


def test_the_text_of_a_list_elsewhere_is_several_captions_too(tmp_path):
    files = didemo_files(tmp_path, ["a.mov"], [("a.mov", "['a cat', 'it sits']"), ("a.mov", "[music]")])
    assert didemo.load("test", files).captions == ("a cat it sits [music]",)
    data = msrvtt_json(tmp_path / "data.json", {"video1": ["['a cat', 'it sits']", "[music]"]})
    options = msrvtt.Options(train_csv=write(tmp_path / "train.csv", "video_id\nvideo1\n"))
    assert msrvtt.load("train", AnnotationFiles(data, options)).captions == ("a cat", "it sits", "[music]")
    data = msrvtt_json(tmp_path / "data.json", {"video1": ["{'caption': 'a cat'}"]})
    with pytest.raises(AnnotationError, match="msrvtt train: a caption of video 'video1': it looks like a value"):
        msrvtt.load("train", AnnotationFiles(data, options))


def test_only_what_was_read_is_recorded_with_the_hash_of_what_was_read(tmp_path):
    files = didemo_files(tmp_path, ["a.mov"], [("a.mov", "a cat")])
    write(tmp_path / "notes.json", "somebody's")
    paths = [tmp_path / "test_list.txt", tmp_path / "test_data.json"]
    hashes = {str(path): hashlib.sha256(path.read_bytes()).hexdigest() for path in paths}
    READ.clear()
    didemo.load("test", files)
    paths[0].write_text("another")
    paths[1].unlink()
    assert hashes == READ


def test_a_paragraph_with_a_sentence_that_is_none_is_told(tmp_path, heard):
    files = didemo_files(tmp_path, ["a.mov"], [("a.mov", "a cat"), ("a.mov", "NaN")])
    assert didemo.load("test", files).captions == ("a cat NaN",)
    assert "test_data.json: video 'a.mov': a sentence of the paragraph is 'NaN'" in heard.text


SENTENCES = {
    "cp1252": "un café à la crème près de l’été",
    "latin-1": "ein Mädchen läuft über die Straße",
    "cp1251": "девочка играет на пианино рядом сидит собака",
    "koi8-r": "девочка играет на пианино рядом сидит собака",
    "gbk": "一个男人在厨房里做饭。女孩正在弹钢琴",
    "big5": "一個男人在廚房裡做飯。女孩正在彈鋼琴",
    "shift_jis": "男の人が台所で料理をしている。犬がいる",
    "euc_jp": "男の人が台所で料理をしている。犬がいる",
    "euc_kr": "한 남자가 부엌에서 요리를 하고 있다",
    "cp1250": "mężczyzna gotuje w kuchni życie jest piękne",
    "utf-16": "a man plays in a café",
    "utf-16-le": "a man plays in a cafe",
    "utf-16-be": "一个男人 plays in a café",
    "utf-32": "a man",
}
SHOWN = {"latin-1": "latin-1", "gbk": "GBK", "big5": "Big5", "shift_jis": "Shift-JIS", "euc_jp": "EUC-JP"}
SHOWN |= {"euc_kr": "EUC-KR", "koi8-r": "KOI8-R", "utf-16-le": "UTF-16LE", "utf-16-be": "UTF-16BE"}
SHOWN |= {"utf-16": "UTF-16", "utf-32": "UTF-32"}


@pytest.mark.parametrize("encoding", SENTENCES)
def test_other_encodings_are_named_and_the_command_given_converts_them(tmp_path, encoding):
    path = tmp_path / "my list.csv"
    path.write_bytes(f"video_id,sentence\nvideo1,{SENTENCES[encoding]}\n".encode(encoding))
    files = AnnotationFiles(options=msrvtt.Options(val_csv=path))
    with pytest.raises(AnnotationError) as caught:
        msrvtt.load("test", files)
    told = str(caught.value)
    assert told.startswith(f"{path}: line ")
    assert f"not UTF-8 ({'' if 'utf' in encoding else 'i'}" in told
    looks, command = re.search(r"it looks like (.*); convert it: (iconv .*), then put that in its place", told).groups()
    assert SHOWN.get(encoding, encoding) in looks
    subprocess.run(command, shell=True, check=True)
    os.replace(f"{path}.utf8", path)
    assert msrvtt.load("test", files).captions == (SENTENCES[encoding],)


def test_the_encoding_of_one_long_line_is_told_by_what_is_not_ascii(tmp_path):
    captions = ["a man cooks"] * 10_000 + [
        SENTENCES["gbk"]
    ] * 10_000  # more ASCII, and more after it, than is looked at
    path = msrvtt_json(tmp_path / "data.json", {"video1": captions})
    path.write_bytes(json.dumps(json.loads(path.read_text()), ensure_ascii=False).encode("gbk"))
    options = msrvtt.Options(train_csv=write(tmp_path / "train.csv", "video_id\nvideo1\n"))
    with pytest.raises(AnnotationError, match=r"data\.json: line 1, column \d+: not UTF-8 .* it looks like GBK; "):
        msrvtt.load("train", AnnotationFiles(path, options))


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (
            "видео,тест\n".encode() * 20 + b"caf\xe9\n",
            r"it looks like UTF-8 but for 1 places that are damaged or were pasted",
        ),
        (
            "video_id\nвидео".encode()[:-1],
            r"it looks like UTF-8 that is cut off within its last character; copy it again",
        ),
        (b"PK\x03\x04\x14\0\x06\0\x08\0\0\0!\0\xdf", r"it is a zip archive or an Excel workbook, no text"),
        (b"video_id\n" + b"video1\n" * 30 + b"vid\0\n", r"it has bytes of value 0, as no text has"),
    ],
)
def test_text_that_is_damaged_is_not_converted(tmp_path, content, message):
    path = tmp_path / "val.csv"
    path.write_bytes(content)
    with pytest.raises(AnnotationError, match=rf"val\.csv: line \d+, column \d+: not UTF-8 \(.*\); {message}"):
        msrvtt.load("test", AnnotationFiles(options=msrvtt.Options(val_csv=path)))


# MSVD ---------------------------------------------------------------------------------------------------------------


def msvd_folder(folder: Path, split: str, ids: list[str], raw: object, protocol: int = 2) -> AnnotationFiles:
    write(folder / f"{split}_list.txt", "\n".join(ids) + "\n\n")
    (folder / "raw-captions.pkl").write_bytes(raw if isinstance(raw, bytes) else pickle.dumps(raw, protocol))
    return AnnotationFiles(data_path=folder)


@pytest.mark.parametrize(("split", "count"), [("train", 1_200), ("val", 100), ("test", 670)])
def test_msvd_real_lists(tmp_path, split, count):
    ids = (DATA / "msvd" / f"{split}_list.txt").read_text().split()
    files = msvd_folder(tmp_path, split, ids, {i: [["a", i], ["two", "words"]] for i in ids})
    loaded = msvd.load(split, files)
    assert len(loaded.videos) == loaded.expected.videos == count
    assert captions_of(loaded)[ids[0]] == [f"a {ids[0]}", "two words"]


def test_msvd_reads_python_2_pickles(tmp_path):
    # What Python 2 wrote for {'v': [['caf\xe9'], [u'b']]} with protocol 0: quoted byte strings and unicode.
    old = b"(dp0\nS'v'\np1\n(lp2\n(lp3\nS'caf\\xe9'\np4\naa(lp5\nVb\np6\naas."
    split = msvd.load("test", msvd_folder(tmp_path, "test", ["v"], old))
    assert split.captions == ("caf\xe9", "b")


WORDS = {
    "bytes": {b"v": [[b"a", "café".encode()]]},
    "text": {"v": [["a", "café"]]},
    "numpy text": {np.str_("v"): [[np.str_("a"), np.str_("café")]]},
    "numpy bytes": {np.bytes_(b"v"): [[np.bytes_(b"a"), np.bytes_("café".encode())]]},
    "numpy array": {"v": np.array([["a", "café"]])},
    "other byte order": {"v": [np.array(["a", "café"]).astype(">U4")]},
    "numpy objects": {"v": [np.array(["a", "café"], dtype=object)]},
    "ordered dict": collections.OrderedDict(v=(("a", "café"),)),
    "default dict": collections.defaultdict(list, v=[["a", "café"]]),
}


@pytest.mark.parametrize("protocol", range(pickle.HIGHEST_PROTOCOL + 1))
@pytest.mark.parametrize("kind", WORDS)
def test_msvd_reads_words_of_every_kind_and_protocol(tmp_path, kind, protocol):
    assert msvd.load("test", msvd_folder(tmp_path, "test", ["v"], WORDS[kind], protocol)).captions == ("a café",)


def test_msvd_words_that_are_not_utf8_are_told(tmp_path, heard):
    split = msvd.load("test", msvd_folder(tmp_path, "test", ["v"], {b"v": [[b"caf\xe9", "thé".encode()]]}))
    assert split.captions == ("café thé",)
    assert "raw-captions.pkl: 1 words are not UTF-8 and are read as latin-1, such as 'café'" in heard.text


def test_a_pickle_that_makes_more_than_values_says_how_to_write_it_anew(tmp_path):
    path = tmp_path / "p.pkl"
    bomb = b"cbuiltins\nbytes\n(I10000000000\ntR."  # would be 10 GB of zeros
    for raw in (pickle.dumps(np.zeros(2)), pickle.dumps({"v": Path("x")}), bomb):
        path.write_bytes(raw)
        with pytest.raises(
            AnnotationError, match=r"p\.pkl: not a plain pickle .*; if you trust the file, write it anew"
        ):
            read_plain_pickle(path)
    path.write_bytes(pickle.dumps({"v": [["a"]] * 50})[:60])
    with pytest.raises(AnnotationError, match="cut off or no pickle: copy it again"):
        read_plain_pickle(path)


class Attack:
    """Unpickled the usual way, this makes a folder."""

    def __init__(self, mark: Path) -> None:
        self.mark = str(mark)

    def __reduce__(self):
        return os.mkdir, (self.mark,)


@pytest.mark.parametrize("protocol", range(pickle.HIGHEST_PROTOCOL + 1))
def test_msvd_pickle_runs_nothing(tmp_path, protocol):
    mark = tmp_path / "mark"
    raw = pickle.dumps({"v": [["a"]], "w": Attack(mark)}, protocol)
    assert any(code.name in ("GLOBAL", "STACK_GLOBAL") for code, _, _ in pickletools.genops(raw))
    with pytest.raises(AnnotationError, match=r"raw-captions\.pkl: not a plain pickle .*names posix\.mkdir"):
        msvd.load("test", msvd_folder(tmp_path, "test", ["v"], raw))
    assert not mark.exists()
    pickle.loads(raw)
    assert mark.is_dir()  # so the pickle was a real attack


def test_plain_pickle_admits_containers_and_refuses_the_rest(tmp_path):
    path = tmp_path / "p.pkl"
    plain = {"a": [1, 2.5, None, True, 10**30], "b": ("x", b"y", {"z"})}
    path.write_bytes(pickle.dumps(plain, 4))
    assert read_plain_pickle(path) == plain
    for refused in (np.zeros(2), Path("x"), np.float64(1), b"\x80\x04PidQ."):
        path.write_bytes(refused if isinstance(refused, bytes) else pickle.dumps(refused))
        with pytest.raises(AnnotationError, match=r"p\.pkl: not a plain pickle"):
            read_plain_pickle(path)
    with pytest.raises(AnnotationError, match=r"gone\.pkl: cannot be read"):
        read_plain_pickle(tmp_path / "gone.pkl")


@pytest.mark.parametrize(
    ("raw", "message"),
    [
        (pickle.dumps({"v": [["a", "b"]] * 50})[:60], r"raw-captions\.pkl: not a plain pickle"),
        (b"", r"raw-captions\.pkl: not a plain pickle"),
        (["v"], r"raw-captions\.pkl: must hold {id: \[\[token, …\], …\]}, holds a list"),
        ({"w": [["a"]]}, r"test_list\.txt: 1 ids have no caption in .*raw-captions\.pkl: 'v'"),
        ({"v": []}, r"raw-captions\.pkl: key 'v': must be a non-empty list of captions"),
        ({"v": [["a"], "abc"]}, r"raw-captions\.pkl: key 'v'\[1\]: must be a list of tokens"),
        ({"v": [["a"], [1]]}, r"raw-captions\.pkl: key 'v'\[1\]: must be a list of tokens"),
        ({"v": [["a"], []]}, r"raw-captions\.pkl: key 'v'\[1\]: the caption is empty"),
    ],
)
def test_msvd_malformed_pickle(tmp_path, raw, message):
    with pytest.raises(AnnotationError, match=message):
        msvd.load("test", msvd_folder(tmp_path, "test", ["v"], raw))


def test_id_lists(tmp_path):
    with pytest.raises(AnnotationError, match=r"test_list\.txt: line 3: id 'v' already stands at line 1"):
        msvd.load("test", msvd_folder(tmp_path, "test", ["v", "", "v"], {"v": [["a"]]}))
    with pytest.raises(AnnotationError, match=r"test_list\.txt: no id in the file"):
        msvd.load("test", msvd_folder(tmp_path, "test", [""], {"v": [["a"]]}))


# LSMDC --------------------------------------------------------------------------------------------------------------


def lsmdc_row(clip_id: str, sentence: str) -> str:
    return "\t".join([clip_id, "00:00:51.926", "00:00:54.129", "00:00:51.926", "00:00:54.129", sentence])


def test_lsmdc_merges_rows_of_one_clip_and_finds_it_in_any_folder(tmp_path):
    clip, other = "0001_American_Beauty_00.00.51.926-00.00.54.129", "1010_TITANIC_00.41.32.072-00.41.40.196"
    rows = [lsmdc_row(clip, 'SOMEONE says "hi'), lsmdc_row(other, "It sinks."), lsmdc_row(clip, "He waves.")]
    write(tmp_path / "a" / "LSMDC16_annos_training.csv", "\n".join(rows) + "\n")
    write(tmp_path / "v" / "0001_American_Beauty" / f"{clip}.avi", "x")
    write(tmp_path / "v" / "any name" / f"{other}.mp4", "x")
    split = load_split("lsmdc", "train", AnnotationFiles(data_path=tmp_path / "a"), tmp_path / "v")
    assert captions_of(split) == {clip: ['SOMEONE says "hi', "He waves."], other: ["It sinks."]}
    assert split.videos[0].path.parent.name == "0001_American_Beauty"
    assert split.expected == Expected(None, 101_079)


def test_lsmdc_reads_the_whole_training_file_and_can_leave_the_gap(tmp_path):
    rows = [lsmdc_row(f"m_{n // 2 if n < 2_000 else n}", f"sentence {n}") for n in range(101_079)]
    write(tmp_path / "LSMDC16_annos_training.csv", "\n".join(rows))
    split = lsmdc.load("train", AnnotationFiles(data_path=tmp_path))
    assert (len(split.captions), len(split.videos)) == (101_079, 100_079)
    cut = lsmdc.load("train", AnnotationFiles(tmp_path, lsmdc.Options(lsmdc_source_gap=True)))
    gone = {clip.video_id for clip in split.videos} - {clip.video_id for clip in cut.videos}
    assert gone == {f"m_{n}" for n in range(59_200, 59_300)}  # 1,000 unique ids stand for the first 2,000 rows
    assert cut.expected == UNPUBLISHED


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (lsmdc_row("a_0-1", "x") + "\n" + "a_1-2\tx", r"publictect\.csv: line 2: 2 columns, must be 6, tab-separated"),
        (lsmdc_row("a_0-1", " "), r"publictect\.csv: line 1: column SENTENCE is empty"),
        (lsmdc_row("", "x"), r"publictect\.csv: line 1: column CLIP_ID is empty"),
        ("\n", r"publictect\.csv: no row in the file"),
    ],
)
def test_lsmdc_malformed(tmp_path, content, message):
    write(tmp_path / "LSMDC16_challenge_1000_publictect.csv", content)
    with pytest.raises(AnnotationError, match=message):
        lsmdc.load("test", AnnotationFiles(data_path=tmp_path))


# ActivityNet --------------------------------------------------------------------------------------------------------


def test_activitynet_joins_sentences_and_finds_either_name(tmp_path):
    record = {"duration": 82.73, "timestamps": [[0, 1], [1, 2]], "sentences": ["A man runs.", " He stops. "]}
    write(tmp_path / "val_ids.json", ["v_b", "v_a", "v_b"])
    write(tmp_path / "val_1.json", {"v_a": record, "v_b": {"sentences": ["B."]}, "v_other": record})
    write(tmp_path / "v" / "val" / "v_a.mp4", "x")
    write(tmp_path / "v" / "b.mp4", "x")
    split = load_split("activity", "test", AnnotationFiles(data_path=tmp_path), tmp_path / "v")
    assert captions_of(split) == {"v_b": ["B."], "v_a": ["A man runs. He stops."]}
    assert [clip.path.name for clip in split.videos] == ["b.mp4", "v_a.mp4"]
    assert [(clip.start, clip.end) for clip in split.videos] == [(None, None), (0.0, 83.0)]
    assert split.expected == Expected(4_917, 4_917)


@pytest.mark.parametrize(
    ("ids", "record", "message"),
    [
        (["v_z"], {}, r"train_ids\.json: 1 ids have no caption in .*train\.json: 'v_z'"),
        ([3], {}, r"train_ids\.json: top level\[0\]: must be a non-empty string, is 3"),
        (["v_a"], {"duration": 3}, r"train\.json: key 'v_a': no key 'sentences'"),
        (["v_a"], {"sentences": ["", " "]}, r"train\.json: key 'v_a'\.sentences: no text in any of 2"),
        (["v_a"], {"sentences": ["a", None]}, r"train\.json: key 'v_a'\.sentences: must be strings"),
        (["v_a"], {"sentences": ["a"], "duration": -1}, r"key 'v_a'\.duration: must be seconds > 0, is -1"),
    ],
)
def test_activitynet_malformed(tmp_path, ids, record, message):
    write(tmp_path / "train_ids.json", ids)
    write(tmp_path / "train.json", {"v_a": record})
    with pytest.raises(AnnotationError, match=message):
        activitynet.load("train", AnnotationFiles(data_path=tmp_path))


# DiDeMo -------------------------------------------------------------------------------------------------------------


def didemo_files(folder: Path, ids: list[str], descriptions: list[tuple[str, str]]) -> AnnotationFiles:
    write(folder / "test_list.txt", "\n".join(ids))
    records = [{"video": video, "description": text, "times": [[0, 0]]} for video, text in descriptions]
    write(folder / "test_data.json", records)
    return AnnotationFiles(data_path=folder)


def test_didemo_real_list_with_original_and_reencoded_files(tmp_path):
    ids = (DATA / "didemo" / "test_list.txt").read_text().split()
    assert sum(video_id.endswith(".") for video_id in ids) == 27
    files = didemo_files(tmp_path, ids, [(i, f"{i} {n}") for n in range(2) for i in ids])
    for n, video_id in enumerate(ids):
        stem = video_id.rpartition(".")[0]
        write(tmp_path / "videos" / (video_id, f"{stem}.mp4", f"{video_id}.mp4")[n % 3], "x")
    split = load_split("didemo", "test", files, tmp_path / "videos")
    assert len(split.videos) == len(split.captions) == split.expected.videos == 1_004
    assert split.missing_videos == ()
    assert {(clip.start, clip.end) for clip in split.videos} == {(0.0, 30.0)}
    assert split.captions[0] == f"{ids[0]} 0 {ids[0]} 1"


def test_didemo_exact_names_come_first_and_stems_second(tmp_path, caplog):
    caplog.set_level("INFO")
    told = [("a.mov", "one "), ("a.mp4", "elsewhere"), ("a.mov", " two"), ("b.avi", "three"), ("b.mp4", "four")]
    split = didemo.load("test", didemo_files(tmp_path, ["a.mov", "b."], told))
    assert captions_of(split) == {"a.mov": ["one two"], "b.": ["three four"]}
    assert "1 descriptions name a listed video with another extension" in caplog.text
    longer = AnnotationFiles(tmp_path, didemo.Options(didemo_clip_seconds=31))
    assert didemo.load("test", longer).videos[0].end == 31.0


@pytest.mark.parametrize(
    ("ids", "told", "message"),
    [
        (["a.mov", "a.mp4"], [("a.mov", "x")], r"test_list\.txt: id 'a\.mp4': id 'a' already stands at id 'a\.mov'"),
        (["a.mov", "b."], [("a.mov", "x")], r"test_list\.txt: 1 ids have no caption in .*test_data\.json: 'b'"),
        (["a.mov"], [("a.mov", " ")], r"test_data\.json: video 'a\.mov': no text in any of 1 sentences"),
        (["a.mov"], [("a.mov", 3)], r"test_data\.json: \[0\]\.description: must be a str"),
    ],
)
def test_didemo_malformed(tmp_path, ids, told, message):
    with pytest.raises(AnnotationError, match=message):
        didemo.load("test", didemo_files(tmp_path, ids, told))


# VATEX --------------------------------------------------------------------------------------------------------------


def test_vatex_reads_val_and_test_from_one_file_and_honours_paths(tmp_path):
    write(tmp_path / "val_list.txt", "a_0_10\n")
    write(tmp_path / "test_list.txt", "c_1_11\nb_0_10\n")
    write(
        tmp_path / "vatex_validation_v1.0.json",
        [
            {"videoID": "a_0_10", "enCap": ["a1", "a2"], "chCap": []},
            {"videoID": "b_0_10", "enCap": ["b1"], "path": "deep/other_name.mp4"},
            {"videoID": "c_1_11", "enCap": ["c1", "c2"]},
        ],
    )
    write(tmp_path / "v" / "deep" / "other_name.mp4", "x")
    write(tmp_path / "v" / "c_1_11.mp4", "x")
    files = AnnotationFiles(data_path=tmp_path)
    split = load_split("vatex", "test", files, tmp_path / "v")
    assert captions_of(split) == {"c_1_11": ["c1", "c2"], "b_0_10": ["b1"]}
    assert split.videos[1].path == tmp_path / "v" / "deep" / "other_name.mp4"
    assert captions_of(vatex.load("val", files)) == {"a_0_10": ["a1", "a2"]}
    assert split.expected == Expected(1_500, 15_000)


@pytest.mark.parametrize(
    ("entries", "message"),
    [
        ([{"videoID": "b", "enCap": ["x"]}], r"train_list\.txt: 1 ids have no caption in .*training_v1\.0\.json: 'a'"),
        ([{"videoID": "a", "enCap": ["x"]}] * 2, r"training_v1\.0\.json: \[1\]: id 'a' already stands at \[0\]"),
        ([{"videoID": "a", "enCap": ["x", ""]}], r"training_v1\.0\.json: \[0\]\.enCap\[1\]: must be a non-empty"),
        ([{"videoID": "a", "enCap": []}], r"training_v1\.0\.json: \[0\]\.enCap: video 'a' has no caption"),
        ([{"videoID": "a", "chCap": []}], r"training_v1\.0\.json: \[0\]: no key 'enCap'"),
        ([{"videoID": "a", "enCap": ["x"], "path": 1}], r"training_v1\.0\.json: \[0\]\.path: must be a str"),
        ({"a": 1}, r"training_v1\.0\.json: must hold a list"),
    ],
)
def test_vatex_malformed(tmp_path, entries, message):
    write(tmp_path / "train_list.txt", "a\n")
    write(tmp_path / "vatex_training_v1.0.json", entries)
    with pytest.raises(AnnotationError, match=message):
        vatex.load("train", AnnotationFiles(data_path=tmp_path))


def test_load_split_names_datatype_and_missing_videos(tmp_path):
    with pytest.raises(KeyError, match="--datatype must be one of activity, didemo, .*, got msr"):
        load_split("msr", "test", AnnotationFiles(), tmp_path)
    val_csv = write(tmp_path / "val.csv", "video_id,sentence\nvideo1,a\nvideo2,b\n")
    write(tmp_path / "videos" / "video2.webm", "x")
    split = load_split("msrvtt", "test", AnnotationFiles(options=msrvtt.Options(val_csv=val_csv)), tmp_path / "videos")
    assert split.missing_videos == ("video1",)
    assert captions_of(split) == {"video2": ["b"]}
