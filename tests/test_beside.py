"""What stands beside weights: pictures prepared as open_clip and transformers prepare them, in training and after."""

import json
import shutil
from dataclasses import asdict
from pathlib import Path

import numpy as np
import pytest
import torch
from open_clip.transform import PreprocessCfg, image_transform_v2
from PIL import Image
from test_checkpoints import hugging_face
from transformers import CLIPConfig, CLIPImageProcessor, CLIPModel

from checkpoints.beside import Beside, of_clip_config, of_open_clip, of_processor, of_sidecar, read_beside
from checkpoints.names import split_towers
from checkpoints.read import CheckpointError, read_checkpoint, save_checkpoint
from dataloaders.video import FrameTransform
from engine.build import take_over
from main_task_retrieval import main
from modules.encoders.base import CLIP_MEAN, CLIP_STD, ImageInput
from modules.encoders.clip import CLIP
from tests.video_files import picture

FILE = Path("some_config.json")
OTHER = {"mean": [0.5, 0.5, 0.5], "std": [0.25, 0.5, 0.75]}
SHAPES = [(48, 64), (64, 48), (31, 90), (24, 24), (100, 7)]
PROCESSOR = {"crop_size": 24, "size": 24, "image_mean": [0.5, 0.4, 0.3], "image_std": [0.2, 0.3, 0.4], "resample": 3}
TRAIN = ["--do_train", "--epochs", "1", "--batch_size", "12", "--lr", "1e-3", "--coef_lr", "1"]


def prepared(beside: Beside, size: int, frame: np.ndarray) -> np.ndarray:
    """A frame as this project gives it to the image tower: float [3, S, S]."""
    image = ImageInput(size, **beside.image)
    resize = FrameTransform(size, image.resize_mode, image.interpolation, image.fill_color)
    pixels = resize(frame[None])[0].float() / 255
    mean, std = (torch.tensor(values).view(3, 1, 1) for values in (image.mean, image.std))
    return ((pixels - mean) / std).numpy()


def assert_two_levels(ours: np.ndarray, theirs: np.ndarray, std) -> None:
    """Within 2 of 255 in every pixel, 0.1 in the mean: as near as the resize is to PIL's."""
    levels = np.abs(ours - theirs) * np.asarray(std).reshape(3, 1, 1) * 255
    assert levels.max() <= 2.01
    assert levels.mean() < 0.15


@pytest.mark.parametrize("mode", ["shortest", "longest", "squash"])
@pytest.mark.parametrize("interpolation", ["bicubic", "bilinear", "random"])
def test_pictures_as_open_clip_prepares_them(mode, interpolation):
    config = {"size": 24, "resize_mode": mode, "interpolation": interpolation, "fill_color": 90, "mode": "RGB", **OTHER}
    theirs = image_transform_v2(PreprocessCfg(**config), is_train=False)
    beside = of_open_clip({"preprocess_cfg": config}, FILE)
    assert beside.sides == ((f"{FILE}: preprocess_cfg.size", 24),)
    for height, width in SHAPES:
        frame = picture(3, width, height)
        ours = prepared(beside, 24, frame)
        assert_two_levels(ours, theirs(Image.fromarray(frame)).numpy(), OTHER["std"])


@pytest.mark.parametrize(
    "more",
    [
        {},
        {"resample": 2},
        {"size": {"shortest_edge": 24}, "crop_size": {"height": 24, "width": 24}},
        {"size": {"height": 24, "width": 24}, "do_center_crop": False},
        {"do_convert_rgb": False, "rescale_factor": 0.00392156862745098, "do_pad": False, "do_resize": True},
    ],
)
def test_pictures_as_transformers_prepares_them(more):
    config = PROCESSOR | more
    theirs, beside = CLIPImageProcessor(**config), of_processor(config, FILE)
    for height, width in SHAPES:
        frame = picture(4, width, height)
        pixels = theirs(Image.fromarray(frame), return_tensors="pt")["pixel_values"][0].numpy()
        assert_two_levels(prepared(beside, 24, frame), pixels, config["image_std"])


def test_what_transformers_writes_is_read(tmp_path):
    CLIPImageProcessor(**PROCESSOR).save_pretrained(tmp_path)
    hugging_face(tmp_path)
    beside = read_checkpoint(tmp_path).beside
    assert beside.image == {
        "mean": (0.5, 0.4, 0.3),
        "std": (0.2, 0.3, 0.4),
        "resize_mode": "shortest",
        "interpolation": "bicubic",
    }
    assert {side for _, side in beside.sides} == {24}
    nested = {"image_processor": json.loads((tmp_path / "preprocessor_config.json").read_text())}
    (tmp_path / "preprocessor_config.json").unlink()
    (tmp_path / "processor_config.json").write_text(json.dumps(nested))
    assert read_checkpoint(tmp_path).beside.image == beside.image


def test_keys_that_change_no_picture_are_ignored():
    names = {"feature_extractor_type": "a", "image_processor_type": "b", "processor_class": "c", "auto_map": {"d": "e"}}
    rest = {
        "_valid_processor_keys": ["size"],
        "data_format": "channels_first",
        "return_tensors": None,
        "pad_size": None,
    }
    assert of_processor(PROCESSOR | names | rest, FILE) == of_processor(PROCESSOR, FILE)
    model = {"vision_cfg": {"patch_dropout": 0.5, "image_size": 24}, "text_cfg": {"context_length": 16}}
    told = of_open_clip({"model_cfg": model, "preprocess_cfg": {"mean": 0.5, "std": None}}, FILE)
    assert told.image == {"mean": (0.5, 0.5, 0.5)}
    assert told.norm_eps == (1e-5, 1e-5)
    assert of_sidecar({"name": "clip"}, FILE) == Beside()  # one that this project wrote before it noted any of it


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"do_flip_channel_order": True}, "do_flip_channel_order is true: this step is not built here"),
        ({"do_pad": True}, "do_pad is true"),
        ({"do_something_new": True}, "do_something_new is true"),
        ({"do_resize": False}, "do_resize is false: this step is always taken here"),
        ({"do_rescale": False}, "do_rescale is false"),
        ({"do_normalize": False}, "do_normalize is false"),
        ({"do_center_crop": False}, "do_center_crop is false"),
        ({"rescale_factor": 1 / 127.5}, "rescale_factor is 0.0078.*1/255"),
        ({"rescale_offset": True}, "rescale_offset is true"),
        ({"crop_pct": 0.9}, "crop_pct is 0.9"),
        ({"size": {"longest_edge": 24}}, 'size is {"longest_edge": 24}'),
        ({"size": {"shortest_edge": 24, "longest_edge": 48}}, "size is .*built are shortest_edge"),
        ({"size": {"height": 24, "width": 32}}, "size is .*square"),
        ({"size": "24"}, 'size is "24"'),
        ({"crop_size": {"height": 24, "width": 20}}, "crop_size is .*square"),
        ({"resample": 0}, "resample is 0: that is nearest; built are bicubic, bilinear"),
        ({"resample": 9}, "resample is 9: that is unknown"),
        ({"image_mean": [0.5, 0.5]}, "image_mean is .*three numbers in 0..1"),
        ({"image_mean": [123.7, 116.3, 103.5]}, "image_mean is .*three numbers in 0..1"),
        ({"image_std": [0.5, 0.0, 0.5]}, "image_std is"),
        ({"image_std": [float("nan")] * 3}, "image_std is"),
    ],
)
def test_what_of_a_processor_is_not_built_is_refused(change, message):
    with pytest.raises(CheckpointError, match=rf"some_config.json: {message}.*\. Give weights whose pictures"):
        of_processor(PROCESSOR | change, FILE)


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"preprocess_cfg": {"resize_mode": "shrink"}}, 'preprocess_cfg.resize_mode is "shrink": built are shortest'),
        ({"preprocess_cfg": {"interpolation": "nearest"}}, 'preprocess_cfg.interpolation is "nearest"'),
        ({"preprocess_cfg": {"mode": "BGR"}}, 'preprocess_cfg.mode is "BGR"'),
        ({"preprocess_cfg": {"size": [24, 32]}}, "preprocess_cfg.size is .24, 32.: pictures are square"),
        ({"preprocess_cfg": {"fill_color": 300}}, "preprocess_cfg.fill_color is 300: .*0..255"),
        ({"preprocess_cfg": {"crop_pct": 0.875}}, "preprocess_cfg.crop_pct is 0.875"),
        ({"preprocess_cfg": [1]}, "preprocess_cfg is .1., not an object"),
        ({"model_cfg": {"vision_cfg": {"ls_init_value": 0.1}}}, "vision_cfg.ls_init_value is 0.1"),
        ({"model_cfg": {"vision_cfg": {"norm_kwargs": {"bias": False}}}}, "vision_cfg.norm_kwargs.bias is false"),
        ({"model_cfg": {"text_cfg": {"norm_kwargs": {"eps": 0}}}}, "text_cfg.norm_kwargs.eps is 0"),
        ({"model_cfg": {"text_cfg": {"hf_tokenizer_name": "bert"}}}, 'text_cfg.hf_tokenizer_name is "bert"'),
    ],
)
def test_what_of_open_clips_configuration_is_not_built_is_refused(config, message):
    with pytest.raises(CheckpointError, match=rf"some_config.json: {message}"):
        of_open_clip(config, FILE)


def test_each_programs_own_file_counts_first(tmp_path):
    """open_clip's for its names, transformers' for its own; beside a link comes before beside the file."""
    weights = tmp_path / "there" / "weights.bin"
    weights.parent.mkdir()
    (weights.parent / "open_clip_config.json").write_text(json.dumps({"preprocess_cfg": {"mean": 0.3}}))
    (weights.parent / "preprocessor_config.json").write_text(json.dumps({"image_mean": 0.6}))
    assert read_beside(weights, "openai").mean == (0.3,) * 3
    assert read_beside(weights, "hugging_face").mean == (0.6,) * 3
    (weights.parent / "preprocessor_config.json").unlink()
    assert read_beside(weights, "hugging_face").mean == (0.3,) * 3
    (tmp_path / "link.bin").symlink_to(weights)
    assert read_beside(tmp_path / "link.bin", "openai").mean == (0.3,) * 3
    (tmp_path / "preprocessor_config.json").write_text(json.dumps({"image_mean": 0.6}))
    assert read_beside(tmp_path / "link.bin", "openai").mean == (0.6,) * 3


@pytest.mark.parametrize(
    ("name", "config", "key"),
    [
        ("open_clip_config.json", {"preprocess_cfg": {"size": 32}}, "preprocess_cfg.size is 32"),
        ("open_clip_config.json", {"vision_cfg": {"image_size": 48}}, "vision_cfg.image_size is 48"),
        ("preprocessor_config.json", {"size": 32, "crop_size": 24}, "size is 32"),
        ("preprocessor_config.json", {"size": 24, "crop_size": 32}, "crop_size is 32"),
    ],
)
def test_the_weights_decide_the_size(tmp_path, name, config, key):
    hugging_face(tmp_path)
    tensors = split_towers(read_checkpoint(tmp_path).tensors)[0]
    torch.save(tensors, tmp_path / "weights.pt")
    (tmp_path / name).write_text(json.dumps(config))
    found, encoder = read_checkpoint(tmp_path / "weights.pt"), CLIP(CLIP.sizes_of(tensors), "gelu")
    with pytest.raises(CheckpointError, match=rf"{name}: {key}, but .*weights.pt has positions for 24 x 24 pixels"):
        take_over(encoder, encoder.image.size, found, None)


def test_the_eps_of_layernorms_is_that_of_the_configuration(tmp_path):
    """Features equal transformers' at 1e-5; with the usual eps they are 100 times further away."""
    model = hugging_face(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    config["text_config"]["layer_norm_eps"], config["vision_config"]["layer_norm_eps"] = 0.05, 0.2
    (tmp_path / "config.json").write_text(json.dumps(config))
    theirs = CLIPModel(CLIPConfig.from_pretrained(tmp_path)).eval()
    theirs.load_state_dict(model.state_dict())
    found = read_checkpoint(tmp_path)
    assert found.beside.norm_eps == (0.2, 0.05)
    tensors = split_towers(found.tensors)[0]
    encoder = CLIP(CLIP.sizes_of(tensors), "gelu").eval()
    encoder.load_state_dict(tensors)
    ids, images = torch.randint(1, 98, (2, 16)), torch.randn(2, 1, 3, 24, 24)
    ids[:, -1] = 99

    def distance() -> float:
        with torch.no_grad():
            out = theirs(input_ids=ids, pixel_values=images[:, 0])
            text, frames = encoder.encode_text(ids)[0], encoder.encode_frames(images, torch.ones(2, 1) > 0)[0][:, 0]
        pairs = ((text, out.text_embeds), (frames, out.image_embeds))
        return max((ours / ours.norm(dim=-1, keepdim=True) - features).abs().max().item() for ours, features in pairs)

    usual = distance()
    take_over(encoder, encoder.image.size, found, None)
    assert distance() < 1e-5
    assert usual > 1e-3
    assert encoder.spec["norm_eps"] == [0.2, 0.05]


@pytest.fixture(scope="module")
def laion(sample, tmp_path_factory) -> Path:
    """The sample's weights with a configuration that is not OpenAI's."""
    folder = tmp_path_factory.mktemp("laion")
    torch.save(split_towers(read_checkpoint(sample / "clip/tiny_clip.pt").tensors)[0], folder / "weights.pt")
    preprocess = {**OTHER, "size": 32, "resize_mode": "squash", "interpolation": "bilinear"}
    model = {"quick_gelu": True, "vision_cfg": {"norm_kwargs": {"eps": 1e-4}}}
    config = {"model_cfg": model, "preprocess_cfg": preprocess}
    (folder / "open_clip_config.json").write_text(json.dumps(config))
    return folder


def replaced(flags: list[str], **values: object) -> list[str]:
    return [*flags, *(str(part) for name, value in values.items() for part in (f"--{name}", value))]


def test_a_whole_run_and_its_checkpoint_use_it(laion, msrvtt_flags, tmp_path, capsys):
    flags = replaced(msrvtt_flags, pretrained_clip_name=laion / "weights.pt")
    assert main([*TRAIN, *flags, "--save_similarity"]) == 0
    told = "not OpenAI's preprocessing, by open_clip_config.json: size 32, mean 0.5 0.5 0.5, std 0.25 0.5 0.75"
    assert told in capsys.readouterr().out
    out = tmp_path / "out"
    image = {**OTHER, "size": 32, "resize_mode": "squash", "interpolation": "bilinear", "fill_color": [0, 0, 0]}
    assert json.loads((out / "pytorch_model.bin.json").read_text())["encoder"]["image"] == image
    assert json.loads((out / "results.json").read_text())["image"] == image
    trained = np.load(out / "similarity.npz")["similarity"]
    (tmp_path / "alone").mkdir()
    shutil.copy(out / "pytorch_model.bin", tmp_path / "alone")  # without its sidecar
    for weights in (out / "pytorch_model.bin", tmp_path / "alone" / "pytorch_model.bin"):
        again = replaced(flags, finetuned_path=weights, output_dir=tmp_path / "again")
        assert main(["--do_eval", "--save_similarity", *again]) == 0
        assert "std 0.25 0.5 0.75, resize_mode squash, interpolation bilinear" in capsys.readouterr().out
        np.testing.assert_array_equal(np.load(tmp_path / "again" / "similarity.npz")["similarity"], trained)
    other = tmp_path / "other"
    shutil.copytree(laion, other)
    (other / "open_clip_config.json").write_text(json.dumps({"quick_gelu": True}))
    resumed = replaced(flags, pretrained_clip_name=other / "weights.pt", resume_model="auto")
    for more in ([], ["--dry_run"]):
        assert main([*TRAIN, *resumed, *more]) == 1
        error = capsys.readouterr().err
        assert "preprocessing size 32, mean 0.5 0.5 0.5" in error
        assert "-> OpenAI's" in error


def test_the_size_beside_is_that_of_the_weights_also_where_another_is_asked_for(laion, msrvtt_flags, tmp_path):
    flags = replaced(msrvtt_flags, pretrained_clip_name=laion / "weights.pt", image_size=48)
    assert main(["--do_eval", *flags]) == 0
    image = {**OTHER, "size": 48, "resize_mode": "squash", "interpolation": "bilinear", "fill_color": [0, 0, 0]}
    assert json.loads((tmp_path / "out" / "results.json").read_text())["image"] == image


def test_image_heads_are_those_of_the_configuration(tmp_path):
    """128 channels in heads of 32, by open_clip and by transformers; where neither says, nothing is told."""
    for config, heads in (({"width": 128, "head_width": 32}, 4), ({"head_width": 96}, 8), ({"width": 1280}, 20)):
        assert of_open_clip({"model_cfg": {"vision_cfg": config}}, FILE).image_heads == heads
    assert of_clip_config({"vision_config": {"num_attention_heads": 4}}, FILE).image_heads == 4
    assert of_clip_config({"vision_config": {}}, FILE).image_heads is None
    with pytest.raises(CheckpointError, match="vision_cfg.head_width is 0: expected is a whole number above 0"):
        of_open_clip({"vision_cfg": {"head_width": 0}}, FILE)


def test_weights_alone_are_prepared_as_openai_does(sample, msrvtt_flags, tmp_path, capsys):
    """Nothing beside, or no file of these names: CLIP's mean and deviation, short side, bicubic, and no word of it."""
    assert main(["--do_eval", *msrvtt_flags]) == 0
    assert "not OpenAI's" not in capsys.readouterr().out
    image = json.loads((tmp_path / "out" / "results.json").read_text())["image"]
    assert image == json.loads(json.dumps(asdict(ImageInput(32, CLIP_MEAN, CLIP_STD, "shortest", "bicubic"))))


def test_mergeclip_refuses_weights_that_see_other_pictures(laion, sample, msrvtt_flags, capsys):
    own = sample / "clip" / "tiny_clip.pt"
    flags = replaced(msrvtt_flags, clip_evl="true", mergeclip="true", activation="quick_gelu")
    assert main(["--do_eval", "--dry_run", *replaced(flags, pretrained_path=own)]) == 0
    for ours, clip in ((laion / "weights.pt", own), (own, laion / "weights.pt")):
        assert main(["--do_eval", "--dry_run", *replaced(flags, pretrained_path=ours, pretrained_clip_name=clip)]) == 1
        error = capsys.readouterr().err
        assert "--mergeclip averages weights whose pictures are prepared alike" in error
        assert "weights.pt: size 32, mean 0.5 0.5 0.5" in error
        assert "tiny_clip.pt: size 32, mean 0.48145466" in error


def test_a_mark_is_written_only_where_it_is_needed(tmp_path):
    tensors = {"clip.a": torch.zeros(3)}
    save_checkpoint(tmp_path / "a.bin", tensors, {"activation": "quick_gelu"}, {})
    assert set(torch.load(tmp_path / "a.bin", weights_only=True)) == {"clip.a"}
