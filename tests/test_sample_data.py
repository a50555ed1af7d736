"""The sample datasets: layouts, counts, determinism, decoding, and captions checked by a reader of their words."""

import csv
import json
import pickle
import re
from collections import Counter

import av
import numpy as np
import pytest
import torch

from preprocess.make_sample_data import main
from preprocess.sample.captions import full_caption, plain_caption
from preprocess.sample.facts import Gallery, Mention, Statement, holds
from preprocess.sample.layouts import LAYOUTS
from preprocess.sample.plan import Counts, Planner
from preprocess.sample.render import film_frames
from preprocess.sample.scenes import Scene, Thing, backwards, draw_scene, order_pairs

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
RECOLOR = re.compile(rf"(?:turns|becomes|changes color to) ({COLORS})")
ACTIONS = {
    "still": "stays still|does not move|rests|stands still",
    "up-left": "diagonally (?:up and left|to the upper left)",
    "up-right": "diagonally (?:up and|to the upper) right",
    "down-left": "diagonally (?:down and|to the lower) left",
    "down-right": "diagonally (?:down and|to the lower) right",
    "counterclockwise": r"\bcounterclockwise",
    "clockwise": r"\bclockwise",
    "left": "moves to the left|slides left|right to left|leftwards",
    "right": "moves to the right|slides right|left to right|rightwards",
    "up": "moves up|rises|bottom to top",
    "down": "moves down|sinks|top to bottom",
    "grow": r"\bgrows|bigger|expands|larger",
    "shrink": "shrinks|smaller|contracts",
    "recolor": RECOLOR.pattern,
    "appear": r"\bappears|pops up|comes into view",
    "vanish": "disappears|vanishes|goes away",
}
# The first that matches: what comes earlier, lies further left or higher, by its place among the nouns.
RELATIONS = (
    ("shows up after|comes after", ("before", 1, 0)),
    ("first|before|followed|replaced|after", ("before", 0, 1)),
    ("is to the left of", ("side", 0, 1)),
    ("is to the right of|to the left of", ("side", 1, 0)),
    ("is above", ("height", 0, 1)),
    ("is below|above", ("height", 1, 0)),
)


def read_caption(text):
    """Background, stated things as tuples, and a relation or None, from the words alone."""
    text = text.lower().rstrip(".")
    ground = GROUND.search(text)
    nouns = list(NOUN.finditer(text))
    relations = (relation for words, relation in RELATIONS if len(nouns) == 2 and re.search(words, text))
    relation = next(relations, None)
    things = []
    for index, noun in enumerate(nouns):
        rest = text[noun.end() : nouns[index + 1].start() if index + 1 < len(nouns) else len(text)]
        action = next((name for name, words in ACTIONS.items() if re.search(words, rest)), "")
        if relation and relation[0] == "before":
            action = ""  # "appears before" is about the order
        place = PLACE.search(rest)
        place = (place[1] or place[2] or "middle") if place else ""
        to = RECOLOR.search(rest)
        words = [SAME.get(word, word) for word in (noun[3], noun[2], noun[1] or "")]
        things.append((*words, place, action, SAME.get(to[1], to[1]) if to and action == "recolor" else ""))
    return SAME.get(ground[1], ground[1]) if ground else "", things, relation


def may_be_true(text, scene):
    """Whether the words may be said of a scene (as in scenes.json); written apart from preprocess.sample.facts."""
    ground, stated, relation = read_caption(text)
    if ground and ground != scene["background"]:
        return False
    choices = [[i for i, thing in enumerate(scene["things"]) if fits(words, thing)] for words in stated]
    return any(in_relation(relation, pick, scene) for pick in distinct(choices))


def distinct(choices, taken=()):
    if not choices:
        return [taken]
    return [full for pick in choices[0] if pick not in taken for full in distinct(choices[1:], (*taken, pick))]


def fits(words, thing):
    shape, color, size, place, action, color_to = words
    moving = thing["action"] not in ("still", "grow", "shrink", "recolor", "appear", "vanish", "first", "second")
    acts = {"": True, "still": not moving}.get(action, thing["action"] == action)
    turns = {("vanish", "first"), ("appear", "second")}
    colors = {thing["color"]} if action == "recolor" else {thing["color"], thing["color_to"]}
    return (
        shape == thing["shape"]
        and color in colors
        and (not size or thing["size"] in ("", size))
        and (not place or thing["place"] in ("", place))
        and (acts or (action, thing["action"]) in turns)
        and color_to in ("", thing["color_to"])
    )


def in_relation(relation, pick, scene):
    if relation is None:
        return True
    kind, one, other = relation
    one, other = scene["things"][pick[one]], scene["things"][pick[other]]
    if kind == "before":
        when = {"first": 0, "vanish": 0, "appear": 2, "second": 2}
        return when.get(one["action"], 1) < when.get(other["action"], 1)
    order = ["left", "middle", "right"] if kind == "side" else ["top", "middle", "bottom"]
    return all(t["place"] in order for t in (one, other)) and order.index(one["place"]) < order.index(other["place"])


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
    ("text", "background", "things", "relation"),
    [
        ("a small violet disc moves from right to left", "", [("circle", "purple", "small", "", "left", "")], None),
        (
            "above a red box near the top there is a blue hoop on a grey backdrop",
            "gray",
            [("square", "red", "", "top", "", ""), ("ring", "blue", "", "", "", "")],
            ("height", 1, 0),
        ),
        (
            "a red star comes after an orange cross",
            "",
            [("star", "red", "", "", "", ""), ("cross", "orange", "", "", "", "")],
            ("before", 1, 0),
        ),
    ],
)
def test_the_reader_of_this_test(text, background, things, relation):
    assert read_caption(text) == (background, things, relation)


# ---- scenes and facts ----


def test_a_statement_holds_of_what_it_may_be_said_of():
    turning = Thing("ring", "red", "small", "left", "recolor", "blue")
    scene = Scene("black", "left_right", (turning, Thing("star", "red", "large", "right", "still")))
    assert holds(Statement((Mention("ring", "red"),)), scene)
    assert holds(Statement((Mention("ring", "blue"),), "black"), scene)  # it becomes blue
    assert not holds(Statement((Mention("ring", "blue", action="recolor"),)), scene)  # it does not begin blue
    assert not holds(Statement((Mention("ring", "red"), Mention("ring", "red"))), scene)  # there is one ring only
    assert not holds(Statement((Mention("ring", "red"),), "white"), scene)
    assert holds(Statement((Mention("ring", "red"), Mention("star", "red")), relation="left_of"), scene)
    assert not holds(Statement((Mention("star", "red"), Mention("ring", "red")), relation="left_of"), scene)


def test_a_gallery_with_an_ambiguous_caption_is_refused():
    scene = Scene("black", "single", (Thing("ring", "red", "small", "", "left"),))
    other = Scene("white", "single", (Thing("ring", "red", "large", "", "left"),))
    gallery = Gallery()
    gallery.admit((scene,), [(Statement((Mention("ring", "red", action="left"),)),)])
    assert not gallery.is_new((other,))
    gallery.admit((other,), [(Statement((Mention("ring", "red"),), "white"),)])
    with pytest.raises(RuntimeError, match="clip 0 is true of clips"):
        gallery.check()


def test_words_say_what_the_statement_says():
    rng = np.random.default_rng(0)
    for _ in range(2000):
        scene = draw_scene(rng)
        caption = full_caption(scene, rng)
        background, things, relation = read_caption(caption.text)
        statement = caption.statement
        stated = [(m.shape, m.color, m.size, m.place, m.action, m.color_to) for m in statement.mentions]
        assert (background, sorted(things)) == (statement.background, sorted(stated)), caption
        assert bool(relation) == bool(statement.relation), caption
        assert holds(statement, scene)


def test_backwards_twice_is_the_scene_itself():
    rng = np.random.default_rng(0)
    for _ in range(300):
        scene, reverse = order_pairs(rng)
        assert backwards(reverse) == scene != reverse
        assert scene.look == reverse.look


@pytest.mark.parametrize("plain", [False, True])
def test_default_size_splits_are_disjoint_and_captions_unique(plain):
    recipe = LAYOUTS["msrvtt"].recipe
    planner = Planner(recipe.in_plain_words() if plain else recipe, 96, (2, 5), np.random.default_rng(1))
    splits = planner.splits(Counts(800, 0, 100, order_pairs=10))
    assert {split: len(clips) for split, clips in splits.items()} == {"train": 960, "val": 0, "test": 120}
    train, test = ([clip.scenes for clip in splits[split]] for split in ("train", "test"))
    assert len(set(train)) == 960
    assert not set(train) & set(test)
    assert not {scene.look for (scene,) in train} & {scene.look for (scene,) in test}
    # Order aside, every test clip looks like no other; the two of a pair look the same.
    assert len({scene.look for (scene,) in test}) == 110
    words = [{w.strip(",") for clip in splits[s] for c in clip.captions for w in c.text.split()} for s in splits]
    assert words[2] <= words[0]
    scenes = {i: [as_json(scene) for scene in clip.scenes] for i, clip in enumerate(splits["test"])}
    assert_true_of_one_clip([(i, [clip.captions[0].text]) for i, clip in enumerate(splits["test"])], scenes)


@pytest.mark.parametrize("name", LAYOUTS)
def test_plain_captions_are_one_a_scene(name):
    planner = Planner(LAYOUTS[name].recipe.in_plain_words(), 96, (2, 5), np.random.default_rng(1))
    for clip in [c for clips in planner.splits(Counts(6, 3, 4)).values() for c in clips]:
        assert clip.captions == tuple(plain_caption(scene) for scene in clip.scenes[:6])


def as_json(scene):
    return {"background": scene.background, "things": [vars(thing) for thing in scene.things]}


def test_too_many_clips_are_refused_by_flag(monkeypatch):
    only = Scene("black", "single", (Thing("ring", "red", "small", "left", "still"),))
    monkeypatch.setattr("preprocess.sample.plan.draw_scene", lambda rng: only)
    planner = Planner(LAYOUTS["vatex"].recipe, 96, (2, 5), np.random.default_rng(1))
    with pytest.raises(ValueError, match="--n_test 3: only 1 distinct clips found; ask for fewer"):
        planner.splits(Counts(1, 1, 3))


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
    assert list(data["videos"][0]) == ["category", "url", "video_id", "start time", "end time", "split", "id"]
    assert [sentence["sen_id"] for sentence in data["sentences"]] == list(range(37 * 20))
    assert set(Counter(sentence["video_id"] for sentence in data["sentences"]).values()) == {20}
    ids = [row["video_id"] for row in train + test]
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
    planner = Planner(LAYOUTS["msrvtt"].recipe, 48, (0.5, 1), np.random.default_rng(2))
    clips = planner.splits(Counts(1, 0, 1, order_pairs=8))["test"][1:]
    for one, other in zip(clips[::2], clips[1::2]):
        assert one.pair == other.pair
        frames, reverse = (np.stack(list(film_frames(clip.film))) for clip in (one, other))
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
        assert set(moments[0]) == {"num_segments", "description", "dl_link", "times", "video", "annotation_id"}
        assert moments[0]["num_segments"] == 6
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
            assert frames[len(frames) // 2].to_ndarray(format="rgb24").std() > 1, file
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
