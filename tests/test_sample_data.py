"""The sample datasets: layouts, counts, determinism, decoding, and captions checked by a reader of their words."""

import csv
import json
import pickle
import re
from collections import Counter
from random import Random

import av
import numpy as np
import pytest
import torch

from tools.sample_data.__main__ import main
from tools.sample_data.plan import LAYOUTS, Planner
from tools.sample_data.render import clip_frames
from tools.sample_data.scenes import Scene, Thing, backwards, caption, draw_scene, holds, order_pair

SMALL = [
    "--datatype",
    "all",
    "--seed",
    "5",
    "--n_train",
    "13",
    "--n_val",
    "4",
    "--n_test",
    "12",
    "--order_pairs",
    "3",
    "--resolution",
    "32",
]
SMALL += [
    "--min_seconds",
    "0.5",
    "--max_seconds",
    "1",
    "--clip_vision_width",
    "64",
    "--clip_text_width",
    "64",
    "--clip_text_layers",
    "2",
]


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    path = tmp_path_factory.mktemp("sample")
    assert main(["--output_dir", str(path), *SMALL, "--num_workers", "2"]) == 0
    return path


def read_json(path):
    return json.loads(path.read_text())


def tree(path):
    return {str(file.relative_to(path)): file.read_bytes() for file in sorted(path.rglob("*")) if file.is_file()}


# ---- an independent reader of captions ----

COLORS = "red|green|blue|yellow|orange|purple|violet|pink|cyan|turquoise"
SHAPES = "circle|disc|ball|square|box|triangle|star|cross|plus sign|ring|hoop"
SAME = {"violet": "purple", "turquoise": "cyan", "grey": "gray", "disc": "circle", "ball": "circle", "box": "square"}
SAME |= {"plus sign": "cross", "hoop": "ring", "little": "small", "big": "large"}
NOUN = re.compile(rf"an? (?:(small|little|large|big) )?({COLORS}) ({SHAPES})\b")
GROUND = re.compile(r"(black|white|gray|grey|brown) back(?:ground|drop)")
PLACE = re.compile(r"(?:on the (left|right)\b|(?:at|near) the (top|bottom)\b|in the (middle|center))")
ACTIONS = {
    "still": "stays still|does not move|rests",
    "left": "moves to the left|slides left|right to left",
    "right": "moves to the right|slides right|left to right",
    "up": "moves up|rises|bottom to top",
    "down": "moves down|sinks|top to bottom",
    "grow": r"\bgrows|bigger|expands",
    "shrink": "shrinks|smaller|contracts",
    "appear": r"\bappears|pops up|comes into view",
    "vanish": "disappears|vanishes|goes away",
}
# The first that matches says what comes before, by its place among the nouns.
ORDERS = (("comes after", (1, 0)), ("first|before|followed", (0, 1)))


def read_caption(text):
    """Background, stated things as tuples, and which of them comes before which or None, from the words alone."""
    text = text.lower().rstrip(".")
    ground = GROUND.search(text)
    nouns = list(NOUN.finditer(text))
    order = next((order for words, order in ORDERS if len(nouns) == 2 and re.search(words, text)), None)
    things = []
    for index, noun in enumerate(nouns):
        rest = text[noun.end() : nouns[index + 1].start() if index + 1 < len(nouns) else len(text)]
        action = next((name for name, words in ACTIONS.items() if re.search(words, rest)), "")
        place = PLACE.search(rest)
        place = (place[1] or place[2] or "middle") if place else ""
        words = [SAME.get(word, word) for word in (noun[3], noun[2], noun[1] or "")]
        things.append((*words, place, "" if order else action))  # "appears before" is about the order
    return SAME.get(ground[1], ground[1]) if ground else "", things, order


def may_be_true(text, scene):
    """Whether the words may be said of a scene (as in scenes.json); written apart from tools.sample_data.scenes."""
    ground, stated, order = read_caption(text)
    if ground and ground != scene["background"]:
        return False
    choices = [[i for i, thing in enumerate(scene["things"]) if fits(words, thing)] for words in stated]
    return any(order is None or in_order([scene["things"][pick[i]] for i in order]) for pick in distinct(choices))


def distinct(choices, taken=()):
    if not choices:
        return [taken]
    return [full for pick in choices[0] if pick not in taken for full in distinct(choices[1:], (*taken, pick))]


def fits(words, thing):
    shape, color, size, place, action = words
    moving = thing["action"] in ("left", "right", "up", "down")
    acts = {"": True, "still": not moving}.get(action, thing["action"] == action)
    turns = {("vanish", "first"), ("appear", "second")}
    return (
        shape == thing["shape"]
        and color == thing["color"]
        and (not size or thing["size"] in ("", size))
        and (not place or thing["place"] in ("", place))
        and (acts or (action, thing["action"]) in turns)
    )


def in_order(things):
    one, other = ({"first": 0, "vanish": 0, "appear": 2, "second": 2}.get(thing["action"], 1) for thing in things)
    return one < other


def assert_true_of_one_clip(queries, scenes):
    """`queries`: (video id, sentences) pairs, each true of its own clip and of no other among `scenes`."""
    for video_id, sentences in queries:
        true_of = {
            other
            for other, phases in scenes.items()
            if all(any(may_be_true(sentence, scene) for scene in phases) for sentence in sentences)
        }
        assert true_of == {video_id}, sentences


@pytest.mark.parametrize(
    ("text", "background", "things", "order"),
    [
        ("a small violet disc moves from right to left", "", [("circle", "purple", "small", "", "left")], None),
        (
            "in front of a grey background a red box near the top rests while a blue hoop gets smaller",
            "gray",
            [("square", "red", "", "top", "still"), ("ring", "blue", "", "", "shrink")],
            None,
        ),
        (
            "a red star comes after an orange cross",
            "",
            [("star", "red", "", "", ""), ("cross", "orange", "", "", "")],
            (1, 0),
        ),
    ],
)
def test_the_reader_of_this_test(text, background, things, order):
    assert read_caption(text) == (background, things, order)


# ---- scenes and captions ----


def test_a_statement_holds_of_what_it_may_be_said_of():
    scene = Scene("black", (Thing("ring", "red", "", "left", "grow"), Thing("star", "red", "large", "right", "up")))

    def said(background="black", **facts):
        return holds(Scene(background, (Thing("ring", "red", **facts),)), scene)

    assert said(place="left", action="grow")
    assert said(size="small", action="still")  # it is small for a while, and stays where it is
    assert not said("white", action="grow")
    assert not said(action="shrink")
    assert not said(place="right", action="grow")
    assert not holds(Scene("black", (Thing("star", "red"),)), scene)  # it moves


def test_words_say_what_the_statement_says_and_no_comma():
    rng = Random(0)
    for _ in range(2000):
        scene = draw_scene(rng)
        text, statement = caption(scene, rng)
        assert holds(statement, scene)
        background, things, order = read_caption(text)
        turns = statement.things[0].action == "first"
        stated = [(t.shape, t.color, t.size, t.place, "" if turns else t.action) for t in statement.things]
        assert (background, sorted(things), bool(order)) == (statement.background, sorted(stated), turns), text
        assert "," not in text
        if order:
            assert [things[i] for i in order] == stated


def test_backwards_twice_is_the_scene_itself():
    rng = Random(0)
    for _ in range(300):
        scene, reverse = order_pair(rng)
        assert backwards(reverse) == scene != reverse
        assert scene.look == reverse.look


@pytest.mark.parametrize("plain", [False, True])
def test_default_size_splits_are_disjoint_and_captions_unique(plain):
    planner = Planner(LAYOUTS["msrvtt"][0], 96, (2, 5), plain, Random(1))
    splits = planner.splits({"train": 800, "val": 0, "test": 100}, 10)
    assert {split: len(clips) for split, clips in splits.items()} == {"train": 960, "val": 0, "test": 120}
    train, test = ([clip.scenes for clip in splits[split]] for split in ("train", "test"))
    assert len(set(train)) == 960
    assert not set(train) & set(test)
    train_looks, test_looks = ([scene.look for (scene,) in scenes] for scenes in (train, test))
    assert not set(train_looks) & set(test_looks)
    # Order aside, every test clip looks like no other; the two of a pair look the same.
    assert len(set(test_looks)) == 110
    words = [{w for clip in splits[split] for text in clip.texts for w in text.split()} for split in ("train", "test")]
    assert words[1] <= words[0]
    scenes = {i: [as_json(scene) for scene in clip.scenes] for i, clip in enumerate(splits["test"])}
    assert_true_of_one_clip([(i, [text]) for i, clip in enumerate(splits["test"]) for text in clip.texts], scenes)


@pytest.mark.parametrize("name", LAYOUTS)
def test_plain_captions_are_one_a_scene(name):
    splits = Planner(LAYOUTS[name][0], 96, (2, 5), True, Random(1)).splits({"train": 6, "val": 3, "test": 4}, 0)
    for clip in [clip for clips in splits.values() for clip in clips]:
        assert clip.texts == [caption(scene)[0] for scene in clip.scenes[:6]]


def as_json(scene):
    return {"background": scene.background, "things": [vars(thing) for thing in scene.things]}


def test_too_many_clips_are_refused_by_flag(monkeypatch):
    only = Scene("black", (Thing("ring", "red", "small", "left", "still"),))
    monkeypatch.setattr("tools.sample_data.plan.draw_scene", lambda rng: only)
    planner = Planner(LAYOUTS["vatex"][0], 96, (2, 5), False, Random(1))
    with pytest.raises(ValueError, match="--n_test 3: only 1 distinct clips found; ask for fewer"):
        planner.splits({"train": 1, "val": 1, "test": 3}, 0)


# ---- files ----


def test_msrvtt_layout(root):
    path = root / "msrvtt"
    train = list(csv.DictReader((path / "MSRVTT_train.9k.csv").open()))
    test = list(csv.DictReader((path / "MSRVTT_JSFUSION_test.csv").open()))
    data = read_json(path / "MSRVTT_data.json")
    # 3 pairs among 12 test clips: round(3 * 13 / 12) = 3 pairs among 13 training clips.
    assert (len(train), len(test), len(data["videos"])) == (13 + 6, 12 + 6, 37)
    assert list(test[0]) == ["key", "vid_key", "video_id", "sentence"]
    assert [test[1][name] for name in ("key", "vid_key", "video_id")] == ["ret1", "msr7011", "video7011"]
    ids = [row["video_id"] for row in train + test]
    captions = Counter(sentence["video_id"] for sentence in data["sentences"])
    assert [captions[video_id] for video_id in ids] == [20] * 19 + [1] * 18
    assert [row["sentence"] for row in test] == [sentence["caption"] for sentence in data["sentences"][-18:]]
    assert [video["video_id"] for video in data["videos"]] == ids
    assert {file.name for file in (path / "videos/all").iterdir()} == {f"{video_id}.mp4" for video_id in ids}
    scenes = read_json(path / "scenes.json")
    gallery = {row["video_id"]: scenes[row["video_id"]] for row in test}
    assert_true_of_one_clip([(row["video_id"], [row["sentence"]]) for row in test], gallery)
    pairs = read_json(path / "order_pairs.json")
    assert {split: len(found) for split, found in pairs.items()} == {"train": 3, "val": 0, "test": 3}
    assert pairs["test"][0] == ["video7022", "video7023"]
    own = {"train": {"videos": 19, "captions": 380}, "test": {"videos": 18, "captions": 18}}
    assert read_json(path / "expected.json") == own


def test_order_pairs_are_the_same_frames_reversed():
    planner = Planner(LAYOUTS["msrvtt"][0], 48, (0.5, 1), False, Random(2))
    clips = planner.splits({"train": 1, "val": 0, "test": 1}, 8)["test"][1:]
    for one, other in zip(clips[::2], clips[1::2]):
        frames, reverse = (np.stack(list(clip_frames(clip))) for clip in (one, other))
        assert np.array_equal(frames, reverse[::-1])
        assert not np.array_equal(frames, reverse)


def test_msvd_layout(root):
    path = root / "msvd"
    captions = pickle.loads((path / "raw-captions.pkl").read_bytes())
    ids = {split: (path / f"{split}_list.txt").read_text().split("\n")[:-1] for split in ("train", "val", "test")}
    assert {split: len(names) for split, names in ids.items()} == {"train": 13, "val": 4, "test": 12}
    everything = sum(ids.values(), [])
    assert set(captions) == set(everything)
    assert len(set(everything)) == 29
    assert all(re.fullmatch(r"[\w-]{11}_\d+_\d+", name) for name in everything)
    assert {file.name for file in (path / "videos").iterdir()} == {f"{name}.avi" for name in everything}
    counts = {len(lists) for lists in captions.values()}
    assert counts <= set(range(5, 11))
    assert len(counts) > 2
    assert all(type(token) is str for lists in captions.values() for tokens in lists for token in tokens)
    scenes = read_json(path / "scenes.json")
    queries = [(name, [" ".join(tokens)]) for name in ids["test"] for tokens in captions[name]]
    assert_true_of_one_clip(queries, {name: scenes[name] for name in ids["test"]})


def test_lsmdc_layout(root):
    path = root / "lsmdc"
    names = ("LSMDC16_annos_training.csv", "LSMDC16_annos_val.csv", "LSMDC16_challenge_1000_publictect.csv")
    rows = [[line.split("\t") for line in (path / name).read_text().splitlines()] for name in names]
    assert {len(row) for table in rows for row in table} == {6}
    unique = [len({row[0] for row in table}) for table in rows]
    assert unique == [13, 4, 12]
    assert [len(table) - count for table, count in zip(rows, unique)][1:] == [0, 0]
    assert len(rows[0]) > 13  # clip ids repeat in train
    for clip_id, start, end, *_ in sum(rows, []):
        movie, _, times = clip_id.rpartition("_")
        assert times == f"{start}-{end}"
        assert re.fullmatch(r"\d\d\.\d\d\.\d\d\.\d{3}", start)
        assert (path / "videos" / movie / f"{clip_id}.avi").is_file()
    scenes = read_json(path / "scenes.json")
    assert_true_of_one_clip([(row[0], [row[5]]) for row in rows[2]], {row[0]: scenes[row[0]] for row in rows[2]})


def test_activity_layout(root):
    path = root / "activity"
    stems = set()
    for ids, table, count in (("train_ids.json", "train.json", 13), ("val_ids.json", "val_1.json", 12)):
        names, entries = read_json(path / ids), read_json(path / table)
        assert names == list(entries)
        assert len(names) == count
        assert all(name.startswith("v_") for name in names)
        for entry in entries.values():
            assert 2 <= len(entry["sentences"]) == len(entry["timestamps"]) <= 4
            assert entry["timestamps"][0][0] == 0
            assert entry["timestamps"][-1][1] == entry["duration"]
        stems |= {name.removeprefix("v_") for name in names}
    files = list((path / "videos").rglob("*.mp4"))
    assert {file.stem.removeprefix("v_") for file in files} == stems
    assert {file.parent.name for file in files} == {"videos", "train", "val"}
    assert {file.stem.startswith("v_") and len(file.stem) == 13 for file in files} == {True, False}
    scenes = read_json(path / "scenes.json")
    test = read_json(path / "val_1.json")
    assert_true_of_one_clip([(n, e["sentences"]) for n, e in test.items()], {name: scenes[name] for name in test})


def test_didemo_layout(root):
    path = root / "didemo"
    endings = Counter()
    for split, count in (("train", 13), ("val", 4), ("test", 12)):
        names = (path / f"{split}_list.txt").read_text().splitlines()
        moments = read_json(path / f"{split}_data.json")
        assert len(names) == len(set(names)) == count
        assert {moment["video"] for moment in moments} == set(names)
        assert len([moment for moment in moments if moment["video"] == names[0]]) == 6
        for name in names:
            stem, _, ending = name.rpartition(".")
            (found,) = (path / "videos").glob(f"{stem}*")
            assert found.name in (name, f"{stem}.mp4")
            endings[ending, found.name == name] += 1
    assert {ending for ending, _ in endings} == {"mov", "avi", "mp4", "", "mpg", "wmv", "m4v", "3gp", "mts"}
    assert endings["", True]
    assert endings["", False]
    assert endings["avi", False]
    longest = path / "videos" / (path / "test_list.txt").read_text().splitlines()[0]
    with av.open(str(longest)) as container:
        assert container.duration / av.time_base == pytest.approx(35, abs=0.5)
    queries = {}
    for moment in moments:
        queries.setdefault(moment["video"], []).append(moment["description"])
    scenes = read_json(path / "scenes.json")
    assert_true_of_one_clip(queries.items(), {name: scenes[name] for name in names})


def test_vatex_layout(root):
    path = root / "vatex"
    ids = {split: (path / f"{split}_list.txt").read_text().splitlines() for split in ("train", "val", "test")}
    training, validation = (read_json(path / f"vatex_{name}_v1.0.json") for name in ("training", "validation"))
    assert [entry["videoID"] for entry in training] == ids["train"]
    assert [entry["videoID"] for entry in validation] == ids["val"] + ids["test"]
    assert [len(ids[split]) for split in ids] == [13, 4, 12]
    assert {len(entry["enCap"]) for entry in training + validation} == {10}
    assert {"path" in entry for entry in training} == {True, False}
    names = sum(ids.values(), [])
    assert all(re.fullmatch(r"[\w-]{11}_\d{6}_\d{6}", name) for name in names)
    assert {file.name for file in (path / "videos").iterdir()} == {f"{name}.mp4" for name in names}
    scenes = read_json(path / "scenes.json")
    queries = [(e["videoID"], [text]) for e in validation if e["videoID"] in ids["test"] for text in e["enCap"]]
    assert len(queries) == 120
    assert_true_of_one_clip(queries, {name: scenes[name] for name in ids["test"]})


def test_every_video_decodes_and_has_the_promised_variety(root):
    seen, b_frames = Counter(), 0
    files = [file for file in sorted(root.glob("*/videos/**/*")) if file.is_file()]
    assert len(files) == 37 + 29 * 4 + 25
    for file in files:
        with av.open(str(file)) as container:
            stream = container.streams.video[0]
            frames = list(container.decode(stream))
            assert len(frames) >= 12, file
            assert min(stream.width, stream.height) in (32, 40, 48), file
            assert any(frame.to_ndarray(format="rgb24").std() > 1 for frame in frames), file
            if file.parts[-4:-2] == ("msrvtt", "videos"):
                seen[stream.codec.canonical_name, stream.codec_context.pix_fmt, str(stream.average_rate)] += 1
                b_frames += any(frame.pict_type == av.video.frame.PictureType.B for frame in frames)
    assert set(seen) == {("h264", "yuv420p", rate) for rate in ("25", "30000/1001", "30")}
    assert b_frames > 18


def test_same_options_same_bytes_whatever_the_workers(root, tmp_path):
    assert main(["--output_dir", str(tmp_path), *SMALL, "--num_workers", "0"]) == 0
    assert tree(tmp_path) == tree(root)


def test_tiny_clip_loads_with_openai_keys(root):
    state = torch.load(root / "clip/tiny_clip.pt", weights_only=True)
    assert {
        name: tuple(state[name].shape)
        for name in (
            "visual.conv1.weight",
            "visual.positional_embedding",
            "visual.proj",
            "token_embedding.weight",
            "positional_embedding",
            "text_projection",
            "logit_scale",
            "visual.transformer.resblocks.3.mlp.c_fc.weight",
            "transformer.resblocks.1.attn.in_proj_weight",
        )
    } == {
        "visual.conv1.weight": (64, 3, 16, 16),
        "visual.positional_embedding": (17, 64),
        "visual.proj": (64, 128),
        "token_embedding.weight": (49408, 64),
        "positional_embedding": (77, 64),
        "text_projection": (64, 128),
        "logit_scale": (),
        "visual.transformer.resblocks.3.mlp.c_fc.weight": (256, 64),
        "transformer.resblocks.1.attn.in_proj_weight": (192, 64),
    }
    # 4 + 2 blocks of 12 tensors, 3 LayerNorms of 2, 8 further weights, 3 integers.
    assert len(state) == 6 * 12 + 3 * 2 + 8 + 3
    assert [int(state[name]) for name in ("input_resolution", "context_length", "vocab_size")] == [64, 77, 49408]
    assert state["logit_scale"].exp().item() == pytest.approx(1 / 0.07)
    assert state["token_embedding.weight"].std().item() == pytest.approx(0.02, rel=0.01)
    assert {tensor.dtype for tensor in state.values()} == {torch.float32, torch.int64}
