"""The commands of InternVideo's 24 scripts and of CLIP4Clip's README, flags as they stand there, are understood."""

import json
import shlex

import pytest

from engine.options import parse_options
from inference import main as inference

# Scripts of InternVideo's Video-Text-Retrieval. "-" where the script does not give the flag. Columns:
COLUMNS = (
    "datatype",
    "pretrained_clip_name",
    "mergeclip",
    "mergeweight",
    "epochs",
    "lr",
    "coef_lr",
    "batch_size",
    "batch_size_val",
    "max_words",
    "max_frames",
    "freeze_layer_num",
    "interaction",
    "num_thread_reader",
)
SCRIPTS = """
eval_activitynet               activity ViT-L/14 True -    5  1e-3 5e-3   8   8   77 16 0  no 8
eval_didemo                    didemo   ViT-L/14 -    -    5  1e-3 5e-3   8   32  77 32 0  no 8
eval_lsmdc                     lsmdc    ViT-L/14 true -    5  1e-3 5e-3   8   32  77 6  0  no 8
eval_msrvtt                    msrvtt   ViT-L/14 True -    5  1e-4 1e-3   8   16  77 8  -1 -  4
eval_msvd                      msvd     ViT-L/14 true 0.25 5  1e-3 5e-3   8   32  77 12 0  no 8
eval_vatex                     vatex    ViT-L/14 true 0.5  5  1e-4 1e-3   128 128 77 8  0  no 8
ret_activity                   activity ViT-B/16 -    -    5  1e-4 1e-3   32  64  64 64 0  no 8
ret_didemo                     didemo   ViT-B/16 -    -    5  1e-3 1e-2   64  64  64 32 0  -  8
ret_lsmdc                      lsmdc    ViT-B/16 -    -    5  1e-4 1e-3   128 128 32 12 0  no 8
ret_msrvtt                     msrvtt   ViT-B/32 -    -    5  1e-3 5e-3   128 128 32 12 0  no 8
ret_msvd                       msvd     ViT-B/16 -    -    5  1e-4 1e-3   128 128 32 12 0  no 8
ret_vatex                      vatex    ViT-B/16 -    -    5  1e-4 1e-3   128 128 32 12 0  no 8
train_activitynet              activity ViT-L/14 -    -    30 1e-3 2e-3   64  16  77 64 0  -  8
train_didemo                   didemo   ViT-L/14 -    -    5  1e-3 2e-3   16  16  77 32 0  -  8
train_lsmdc                    lsmdc    ViT-L/14 True -    5  1e-3 2e-3   64  16  77 8  0  -  8
train_msrvtt                   msrvtt   ViT-L/14 -    -    5  1e-3 4e-3   128 16  77 12 0  -  4
train_msvd                     msvd     ViT-L/14 -    -    5  1e-3 0.0025 64  16  77 8  0  -  8
train_vatex                    vatex    ViT-L/14 -    -    5  1e-3 5e-3   128 16  77 8  0  -  8
run_kc4_activitynet_infer      activity ViT-L/14 True -    -  -    -      -   16  77 64 0  -  8
run_kc4_didemo_infer           didemo   ViT-L/14 True -    -  -    -      -   8   77 32 0  no 8
run_kc4_lsmdc_infer            lsmdc    ViT-L/14 -    -    -  -    -      -   16  77 8  0  -  8
run_kc4_msrvtt_infer           msrvtt   ViT-L/14 True -    -  1e-4 -      -   16  77 12 -  -  4
run_kc4_msvd_infer             msvd     ViT-L/14 True -    -  -    -      -   16  77 8  0  no 8
run_kc4_vatex_infer            vatex    ViT-L/14 True -    -  -    5e-3   -   16  77 8  0  no 8
"""
COMMON = "--sim_header meanP --loose_type --linear_patch 2d --slice_framepos 2 --feature_framerate 1 --n_display 50"
PATHS = "--data_path d --features_path f --output_dir o --train_csv t.csv --val_csv v.csv"
DATASETS = {  # datatype -> max_words, max_frames of CLIP4Clip's README
    "msrvtt": (32, 12),
    "msvd": (32, 12),
    "lsmdc": (32, 12),
    "activity": (64, 64),
    "didemo": (64, 64),
}


def commands() -> dict[str, tuple[list[str], dict[str, str]]]:
    """Script -> its arguments, and the values that its table row gives."""
    found = {}
    for line in SCRIPTS.strip().splitlines():
        name, *cells = line.split()
        given = {column: cell for column, cell in zip(COLUMNS, cells, strict=True) if cell != "-"}
        kind = name.split("_")[0]
        argv = f"--do_{'eval' if kind in ('eval', 'run') else 'train'} {PATHS} {COMMON}"
        argv += "".join(f" --{column} {cell}" for column, cell in given.items())
        if kind != "ret":
            argv += f" --clip_evl {'--finetuned_path' if kind == 'run' else '--pretrained_path'} w.bin"
        if given["datatype"] == "msrvtt":
            argv += " --expand_msrvtt_sentences"
        if name == "eval_activitynet":
            argv += " --zeroshot"
        found[name] = shlex.split(argv), given
    return found


COMMANDS = commands()


def test_all_are_here():
    assert len(COMMANDS) == 24


@pytest.mark.parametrize("name", COMMANDS)
def test_a_script_s_flags_mean_what_they_say(name):
    argv, given = COMMANDS[name]
    options = parse_options(argv).as_dict()
    for flag, text in given.items():
        value = options[flag]
        wanted = text.lower() == "true" if isinstance(value, bool) else type(value)(text)
        assert value == wanted, flag
    assert options["clip_evl"] is not name.startswith("ret_")
    assert options["do_train"] is name.startswith(("ret_", "train_"))


@pytest.mark.parametrize("datatype", DATASETS)
@pytest.mark.parametrize("clip", ["ViT-B/32", "ViT-B/16"])
@pytest.mark.parametrize("head", ["meanP", "seqLSTM", "seqTransf", "tightTransf"])
def test_clip4clip_commands(datatype, clip, head):
    """With torch.distributed.launch's own argument; tightTransf stands without --loose_type."""
    words, frames = DATASETS[datatype]
    argv = (
        f"--local_rank=0 --do_train --num_thread_reader=0 --epochs=5 --batch_size=128 --n_display=50 {PATHS} "
        f"--lr 1e-4 --max_words {words} --max_frames {frames} --batch_size_val 16 --datatype {datatype} "
        "--feature_framerate 1 --coef_lr 1e-3 --freeze_layer_num 0 --slice_framepos 2 "
        f"--linear_patch 2d --sim_header {head} --pretrained_clip_name {clip}"
    )
    argv += " --expand_msrvtt_sentences" if datatype == "msrvtt" else ""
    argv += " --loose_type" if head != "tightTransf" else ""
    options = parse_options(argv.split()).as_dict()
    assert (options["max_words"], options["max_frames"], options["sim_header"]) == (words, frames, head)
    assert (options["batch_size"], options["lr"], options["coef_lr"]) == (128, 1e-4, 1e-3)


def test_inference_evaluates(msrvtt_flags, tmp_path, capsys):
    """Without --do_eval, as older commands are; training is not its business."""
    assert inference([*msrvtt_flags, "--zeroshot"]) == 0
    found = json.loads((tmp_path / "out" / "results.json").read_text())
    assert (found["n_videos"], found["options"]["do_eval"], found["options"]["do_train"]) == (12, True, False)
    assert inference([*msrvtt_flags, "--do_train"]) == 2
    assert "give --do_train to main_task_retrieval.py" in capsys.readouterr().err
