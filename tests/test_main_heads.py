"""Checkpoints of every head through ``main_task_retrieval.py`` on real video files: evaluate, train on, load back."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from golden_vectors import load, recipe
from launching import run_tasks
from test_main import replaced

import engine.train
from main_task_retrieval import main
from modules.metrics import retrieval_metrics
from tools.postprocess import main as postprocess

VOCAB = 49408  # of the real tokenizer; the vectors' own models are smaller
CLIP4CLIP = {  # fixture -> flags it was trained with
    "A1_meanP_2d": [],
    "A2_seqLSTM_2d": [],
    "A3_seqTransf_2d": [],
    "A4_tightTransf_2d": [],
    "A5_meanP_3d": [],
    "A6_seqTransf_3d": [],
}
OTHERS = {
    "C5_xpool": ["--sim_header", "xpool", "--num_mha_heads", "1"],
    "C2_wti2_seqTransf": ["--sim_header", "seqTransf", "--interaction", "wti", "--compat", "drl"],
    "B2_wti3_plainclip": ["--interaction", "wti", "--wti_arch", "3", "--compat", "internvideo"],
    "B2_ti_plainclip": ["--interaction", "ti"],
    "B1_evl_meanP": ["--clip_evl", "--compat", "internvideo"],
    "B2_wti2_evl": ["--clip_evl", "--interaction", "wti", "--compat", "internvideo"],
    "B2_ti_evl": ["--clip_evl", "--interaction", "ti"],
}
TRAIN = [
    "--do_train",
    "--epochs",
    "1",
    "--batch_size",
    "24",
    "--lr",
    "1e-3",
    "--coef_lr",
    "1e-2",
    "--freeze_layer_num",
    "0",
]


def source_weights(stem: str) -> dict[str, torch.Tensor]:
    """The vector's model with the real vocabulary, under the source's names."""
    spec = load(stem).manifest["weights"]
    tensors = {k: list(v) for k, v in spec["tensors"].items()}
    shape, *rest = tensors["clip.token_embedding.weight"]
    tensors["clip.token_embedding.weight"] = [[VOCAB, shape[1]], *rest]
    made = recipe.make_weights(spec | {"tensors": tensors})
    return {k: torch.from_numpy(np.array(v)) for k, v in made.items()}


def flags_of(stem: str) -> list[str]:
    config = load(stem).config
    more = OTHERS.get(stem) or ["--sim_header", config["sim_header"], "--linear_patch", config["linear_patch"]]
    return [
        *more,
        "--cross_num_hidden_layers",
        str(config.get("cross_num_hidden_layers", 4)),
        "--max_words",
        str(min(32, config["context_length"])),
    ]


def similarity_of(folder: Path) -> np.ndarray:
    with np.load(folder / "similarity.npz", allow_pickle=False) as saved:
        return saved["similarity"]


@pytest.mark.parametrize("stem", [*CLIP4CLIP, *OTHERS])
def test_checkpoint_evaluates_trains_and_loads_back(stem, msrvtt_flags, tmp_path):
    tensors = source_weights(stem)
    source = tmp_path / "pytorch_model.bin"
    torch.save(tensors, source)
    base = [*msrvtt_flags, *flags_of(stem), "--save_similarity"]
    matrices = []
    for batch_size, memory in ((12, 1024), (5, 1)):
        out = tmp_path / f"eval{batch_size}"
        flags = replaced(
            base, output_dir=out, finetuned_path=source, batch_size_val=batch_size, similarity_memory_mb=memory
        )
        assert main(["--do_eval", *flags]) == 0
        matrices.append(similarity_of(out))
    assert matrices[0].shape == (12, 12)
    assert np.isfinite(matrices[0]).all()
    assert matrices[0].std() > 1e-4
    np.testing.assert_allclose(matrices[1], matrices[0], rtol=1e-3, atol=1e-4)

    out = tmp_path / "trained"
    assert main([*TRAIN, *replaced(base, output_dir=out, init_model=source)]) == 0
    saved = torch.load(out / "pytorch_model.bin", weights_only=True)
    unused = {k for k in tensors if "_weight_fc" in k} if "ti" in flags_of(stem) else set()
    assert set(saved) == set(tensors) - unused
    assert {k: v.shape for k, v in saved.items()} == {k: tensors[k].shape for k in saved}
    assert any(not torch.equal(saved[k], tensors[k]) for k in saved)
    again = tmp_path / "again"
    flags = replaced(base, output_dir=again, finetuned_path=out / "pytorch_model.bin")
    assert main(["--do_eval", *flags]) == 0
    assert np.array_equal(similarity_of(again), similarity_of(out))


@pytest.mark.parametrize(
    ("stem", "flags", "message"),
    [
        ("A3_seqTransf_2d", ["--sim_header", "meanP"], "give --sim_header seqTransf"),
        ("A2_seqLSTM_2d", ["--sim_header", "meanP"], "give --sim_header seqLSTM"),
        ("A5_meanP_3d", ["--sim_header", "meanP"], "give --linear_patch 3d"),
        ("A1_meanP_2d", ["--linear_patch", "3d"], "it was not trained with --linear_patch 3d"),
        ("A1_meanP_2d", ["--interaction", "wti"], "holds no weights for --interaction wti"),
        ("B2_wti3_plainclip", [], "give --interaction wti"),
        ("B1_evl_meanP", [], "give --clip_evl"),
        ("A1_meanP_2d", ["--clip_evl"], "it was not trained with --clip_evl"),
    ],
)
def test_the_wrong_options_for_a_checkpoint_are_named(stem, flags, message, msrvtt_flags, tmp_path, capsys):
    source = tmp_path / "pytorch_model.bin"
    torch.save(source_weights(stem), source)
    flags = [*msrvtt_flags, *flags, "--cross_num_hidden_layers", "2", "--max_words", "16"]
    assert main(["--do_eval", *flags, "--finetuned_path", str(source)]) == 1
    assert message in capsys.readouterr().err


@pytest.mark.parametrize(
    "flags",
    [
        ["--interaction", "wti", "--cdcr", "3"],
        ["--interaction", "ti", "--cdcr", "1"],
        ["--sim_header", "xpool"],
        ["--clip_evl"],
        ["--clip_evl", "--interaction", "wti", "--cdcr", "2"],
    ],
    ids=" ".join,
)
def test_a_head_starts_from_plain_clip(flags, msrvtt_flags, tmp_path):
    assert main([*TRAIN, *msrvtt_flags, *flags]) == 0
    assert json.loads((tmp_path / "out" / "history.jsonl").read_text())["steps"] == 2


@pytest.mark.parametrize("flags", [["--sim_header", "xpool"], ["--interaction", "wti", "--cdcr", "1"]], ids=" ".join)
def test_chance_is_the_same_after_a_resume(flags, msrvtt_flags, tmp_path, monkeypatch):
    """Dropout (xpool) and drawn tokens (cdcr 1): the second epoch is that of a run without interruption."""
    kept, save = tmp_path / "after_epoch_1.pt", engine.train.save_last

    def save_and_keep(folder: Path, *arguments) -> None:
        save(folder, *arguments)
        if not kept.exists():
            shutil.copy(folder / "checkpoint_last.pt", kept)

    monkeypatch.setattr(engine.train, "save_last", save_and_keep)
    command = [*replaced(TRAIN, epochs=2), *flags]
    assert main([*command, *replaced(msrvtt_flags, output_dir=tmp_path / "whole")]) == 0
    again = replaced(msrvtt_flags, output_dir=tmp_path / "resumed", resume_model=kept)
    assert main([*command, *again]) == 0
    whole, resumed = (
        torch.load(tmp_path / name / "checkpoint_last.pt", weights_only=True)["model"] for name in ("whole", "resumed")
    )
    assert all(torch.equal(whole[name], resumed[name]) for name in whole)


def test_mergeclip_from_the_command_line(msrvtt_flags, tmp_path):
    """Half CLIP, half upstream: evaluated, it is neither."""
    upstream, clip = tmp_path / "upstream.bin", tmp_path / "clip.bin"
    tensors = source_weights("B1_evl_meanP")
    torch.save(tensors, upstream)
    plain = {
        k.replace("visual_", "visual."): v.squeeze(2) if v.ndim == 5 and "conv1" in k else v
        for k, v in tensors.items()
        if "transformer.d" not in k and "temporal" not in k
    }
    plain = {k: v.roll(1) for k, v in plain.items() if not k.endswith(("balance", "text_mask_embedding"))}
    torch.save(plain, clip)
    found = {}
    for name, more in (
        ("upstream", []),
        ("0", ["--mergeclip=True", "--mergeweight", "0"]),
        ("half", ["--mergeclip=True"]),
    ):
        flags = replaced(msrvtt_flags, output_dir=tmp_path / name, pretrained_clip_name=clip, pretrained_path=upstream)
        assert (
            main(
                [
                    "--do_eval",
                    "--save_similarity",
                    "--clip_evl",
                    "--max_words",
                    "16",
                    "--activation",
                    "quick_gelu",
                    *flags,
                    *more,
                ]
            )
            == 0
        )
        found[name] = similarity_of(tmp_path / name)
    np.testing.assert_allclose(found["0"], found["upstream"], rtol=1e-5, atol=1e-5)
    assert np.abs(found["half"] - found["upstream"]).max() > 1e-2


def test_four_processes_share_the_pairs(msrvtt_flags, tmp_path):
    """12 videos and 12 captions in batches of 2 and 8: two ranks have no caption at all."""
    heads = {"xpool": ["--sim_header", "xpool"], "ti": ["--sim_header", "seqTransf", "--interaction", "ti"]}
    command = ["--do_eval", "--save_similarity", *replaced(msrvtt_flags, batch_size_val=2)]
    together = run_tasks(tmp_path, {name: {"tasks": 4, "flags": flags} for name, flags in heads.items()}, command)
    for name, flags in heads.items():
        out, tasks = together[name]
        assert all(status == 0 for status, _ in tasks), tasks
        assert main([*command, *flags, "--output_dir", str(tmp_path / "alone")]) == 0
        assert json.loads((out / "results.json").read_text())["processes"] == 4
        np.testing.assert_allclose(similarity_of(out), similarity_of(tmp_path / "alone"), rtol=1e-5, atol=1e-5)


def test_query_bank_of_the_training_captions(msrvtt_flags, tmp_path, capsys):
    out = tmp_path / "out"
    assert main(["--do_eval", "--save_similarity", "--qb_norm", "--qb_size", "50", *msrvtt_flags]) == 0
    found = json.loads((out / "results.json").read_text())
    assert set(found["metrics"]) == {"raw", "dsl", "qb_norm"}
    assert "(transductive)" in found["postprocessing"]["dsl"]
    with np.load(out / "similarity.npz", allow_pickle=False) as saved:
        assert saved["bank_similarity"].shape == (50, 12)
        metrics = retrieval_metrics(
            saved["similarity"],
            saved["caption_to_video"],
            bank=saved["bank_similarity"],
            scale=float(saved["logit_scale"]),
        )
    assert metrics == found["metrics"]
    capsys.readouterr()
    assert postprocess([str(out / "similarity.npz")]) == 0
    table = capsys.readouterr().out
    assert f"{metrics['qb_norm']['t2v']['R@1']:8.1f}" in table.split("text-to-video qb_norm")[1]
    assert postprocess([str(out / "results.json")]) == 1
    assert "results.json is not a similarity.npz" in capsys.readouterr().err
