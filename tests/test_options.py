"""Flags: kept names, truthful booleans, and refusals that name the flag and the value."""

import pytest
import torch
from tiny_models import SIZES, make_encoder

from engine.build import build_head
from engine.options import build_parser, parse_options
from modules.heads import HEADS, Head

BASE = [
    "--do_eval",
    "--output_dir",
    "out",
    "--data_path",
    "data.json",
    "--features_path",
    "videos",
    "--val_csv",
    "v.csv",
]

KEPT = """
batch_size batch_size_val coef_lr data_path datatype do_eval do_train epochs expand_msrvtt_sentences
feature_framerate features_path finetuned_path freeze_layer_num interaction linear_patch loose_type lr max_frames
max_words n_display num_thread_reader output_dir pretrained_clip_name sim_header slice_framepos train_csv val_csv
init_model resume_model seed warmup_proportion gradient_accumulation_steps cross_num_hidden_layers train_frame_order
eval_frame_order cache_dir fp16 local_rank local-rank clip_evl mergeclip mergeweight pretrained_path wti_arch cdcr
zeroshot
"""


def refusal(capsys, argv: list[str]) -> str:
    with pytest.raises(SystemExit) as stop:
        parse_options(argv)
    assert stop.value.code == 2
    return capsys.readouterr().err


@pytest.mark.parametrize("name", KEPT.split())
def test_flags_of_the_source_projects_are_kept(name):
    assert f"--{name}" in build_parser()._option_string_actions


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("--loose_type", True),
        ("--loose_type=True", True),
        ("--loose_type=true", True),
        ("--allow_missing=False", False),
        ("--allow_missing=no", False),
        ("--allow_missing=0", False),
    ],
)
def test_booleans_mean_what_they_say(text, value):
    options = parse_options([*BASE, text])
    name = text[2:].split("=")[0]
    assert options.as_dict()[name] is value


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--max_frames", "0"], "--max_frames must be >= 1, got 0"),
        (["--max_words", "1"], "--max_words must be >= 2, got 1"),
        (
            ["--decoder", "opencv"],
            "--decoder must be pyav (opencv gave memory rubbish for interlaced video with OpenCV 5",
        ),
        (["--lr", "0"], "--lr must be > 0, got 0.0"),
        (["--lr", "nan"], "--lr must be > 0, got nan"),
        (["--warmup_proportion", "1"], "--warmup_proportion must be in [0, 1), or -1 for none, got 1.0"),
        (
            ["--sim_header", "meanPP"],
            "--sim_header must be one of meanP, seqLSTM, seqTransf, tightTransf, xpool, got meanPP",
        ),
        (["--sim_header", "tightTransf", "--loose_type"], "--sim_header tightTransf is not of --loose_type"),
        (["--loose_type=false"], "--loose_type=false belongs to --sim_header tightTransf, got --sim_header meanP"),
        (
            ["--sim_header", "xpool", "--interaction", "wti"],
            "--interaction wti takes the place of --sim_header xpool's",
        ),
        (
            ["--sim_header", "tightTransf", "--cdcr", "1"],
            "--cdcr 1 works on features or tokens that --sim_header tight",
        ),
        (["--wti_arch", "3"], "--wti_arch 3 belongs to --interaction wti, got --interaction no"),
        (
            ["--linear_patch", "3d", "--clip_evl"],
            "--linear_patch 3d belongs to --encoder clip, got --encoder internvideo",
        ),
        (["--mergeclip=True"], "--mergeclip True belongs to --clip_evl, got --encoder clip"),
        (["--pretrained_path", "a"], "--pretrained_path a belongs to --clip_evl, got --encoder clip"),
        (["--clip_evl", "--mergeclip"], "--mergeclip averages the file of --pretrained_path with a CLIP"),
        (["--mergeweight", "1.5"], "--mergeweight must be in [0, 1], got 1.5"),
        (["--similarity_memory_mb", "0"], "--similarity_memory_mb must be >= 1, got 0"),
        (["--qb_norm"], "--qb_norm takes its query bank from the training captions; add --train_csv"),
        (["--margin", "0.1"], "--margin had no effect in the source projects"),
        (["--allow_missing=perhaps"], "expected true or false, got 'perhaps'"),
        (["--max_frame", "3"], "unrecognized arguments: --max_frame"),
        (["--init_model", "a", "--finetuned_path", "b"], "--init_model and --finetuned_path both name the weights"),
        (["--zeroshot", "--finetuned_path", "b"], "--zeroshot evaluates weights as they were pre-trained; leave it"),
        (["--use_dsl"], "--use_dsl is not needed: DSL is always reported beside the raw metrics"),
        (["--resume_model", "a"], "--resume_model continues a training run; add --do_train"),
        (["--gradient_accumulation_steps", "0"], "--gradient_accumulation_steps must be >= 1, got 0"),
        (
            ["--gradient_accumulation_steps", "9", "--batch_size", "8"],
            "--gradient_accumulation_steps 9 exceeds --batch_size 8",
        ),
        (
            ["--do_train", "--train_csv", "t", "--resume_model", "auto", "--overwrite"],
            "--overwrite starts anew, --resume_model goes on",
        ),
        (["--save_steps", "-1"], "--save_steps must be >= 0, got -1"),
        (["--do_train", "--train_csv", "t", "--resume_model", "a", "--init_model", "b"], "leave --init_model out"),
        (["--do_train"], "--datatype msrvtt with --do_train needs --train_csv"),
        (["--do_train", "--train_csv", "t", "--finetuned_path", "b"], "--finetuned_path is for evaluation"),
        (["--fp16", "--precision", "bf16"], "--fp16 means --precision fp16, but --precision bf16 was given"),
        (
            ["--frame_rule", "stride", "--slice_framepos", "0"],
            "--slice_framepos 0 belongs to --frame_rule second, got --frame_rule stride",
        ),
    ],
)
def test_bad_options_are_refused_by_name(capsys, more, message):
    assert message in refusal(capsys, [*BASE, *more])


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        ([], "nothing to do: give --do_train, --do_eval or both"),
        (["--do_eval"], "--output_dir is required"),
        (BASE[:-2], "--datatype msrvtt needs --val_csv"),
    ],
)
def test_what_is_missing_is_named(capsys, argv, message):
    assert message in refusal(capsys, argv)


def test_a_tilde_that_the_shell_left_is_the_home_folder(monkeypatch):
    """Of every flag that is a path, a dataset's own included: --output_dir='~/x' makes no folder called ~."""
    monkeypatch.setenv("HOME", "/home/somebody")
    given = {"output_dir": "~/x", "data_path": "~/d.json", "features_path": "~", "val_csv": "~/a:b/v.csv"}
    options = parse_options(["--do_eval", *(f"--{name}={path}" for name, path in given.items())])
    found = {name: str(options.values[name]) for name in given}
    assert found == {name: path.replace("~", "/home/somebody") for name, path in given.items()}
    assert str(parse_options([*BASE, "--output_dir", "a~/~b"]).run.output_dir) == "a~/~b"


def test_fp16_is_an_alias():
    assert parse_options([*BASE, "--fp16"]).run.precision == "fp16"


def test_auto_resume_goes_with_the_start_weights():
    """The same command starts a run and continues it."""
    more = ["--do_train", "--train_csv", "t", "--resume_model", "auto", "--init_model", "b"]
    assert str(parse_options([*BASE, *more]).train.resume_model) == "auto"


def test_every_flag_has_a_help_text():
    for action in build_parser()._actions:
        assert action.help, action.option_strings


def test_an_interaction_never_takes_the_place_of_a_heads_own_video_part(monkeypatch, capsys):
    """It would be left out without a word: interactions compare words with the frames of the head, not with that."""

    class Pooled(Head):
        name = "pooled"

        def video(self, features, mask):
            return features[:, 0]

    monkeypatch.setitem(HEADS, "pooled", Pooled)
    error = refusal(capsys, [*BASE, "--sim_header", "pooled", "--interaction", "wti"])
    assert "takes the place of --sim_header pooled's similarity; use it with meanP or seqLSTM or seqTransf" in error


@pytest.mark.parametrize(
    ("sidecar", "given", "heads"),
    [
        ({}, [], None),
        ({"activation": "quick_gelu"}, [], None),  # written by hand
        ({"activation": "quick_gelu"}, ["--num_mha_heads", "2"], 2),
        ({"sim_header": "xpool", "head_options": {"num_mha_heads": 2}}, [], 2),
        ({"sim_header": "xpool"}, [], 1),  # of ours, from before the option
    ],
)
def test_what_weights_do_not_show_is_asked_for(sidecar, given, heads):
    options = parse_options([*BASE, "--sim_header", "xpool", *given])
    tensors, encoder = {"pool_frames.q_proj.weight": torch.zeros(1)}, make_encoder("clip", SIZES)
    if heads is None:
        with pytest.raises(ValueError, match="weights do not show --num_mha_heads: give the number"):
            build_head(options, encoder.head_sizes, encoder.conventions, sidecar, tensors)
    else:
        assert (
            build_head(options, encoder.head_sizes, encoder.conventions, sidecar, tensors).options.num_mha_heads
            == heads
        )
