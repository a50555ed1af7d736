"""Real files of every kind, written by the programs that write them, read back tensor by tensor."""

import io
import json
import os
import pickle
import warnings
import zipfile
from dataclasses import asdict
from pathlib import Path

import pytest
import torch
from open_clip.model import CLIP as OpenClip
from open_clip.model import CLIPTextCfg, CLIPVisionCfg, CustomTextCLIP
from safetensors.torch import save, save_file
from torch import nn
from transformers import CLIPConfig, CLIPModel

from checkpoints.files import describe_wrong_file
from checkpoints.names import split_towers
from checkpoints.read import CheckpointError, load_strict, read_checkpoint, save_checkpoint
from modules.encoders.clip import CLIP, ClipSizes

SIZES = ClipSizes(
    embed_dim=32,
    image_resolution=24,
    vision_layers=3,
    vision_width=128,
    patch_size=8,
    context_length=16,
    vocab_size=100,
    text_width=64,
    text_heads=1,
    text_layers=2,
    vision_heads=2,
)


class QuickGELU(nn.Module):
    def forward(self, x):
        return x * torch.sigmoid(1.702 * x)


class Attention(nn.Module):
    def __init__(self, width):
        super().__init__()
        self.in_proj_weight = nn.Parameter(torch.randn(3 * width, width))
        self.in_proj_bias = nn.Parameter(torch.randn(3 * width))
        self.out_proj = nn.Linear(width, width)

    def forward(self, x):
        q, k, v = nn.functional.linear(x, self.in_proj_weight, self.in_proj_bias).chunk(3, -1)
        return self.out_proj((q @ k.transpose(-1, -2)).softmax(-1) @ v)


class Block(nn.Module):
    def __init__(self, width, activation):
        super().__init__()
        self.attn = Attention(width)
        self.ln_1, self.ln_2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.mlp = nn.Sequential()
        self.mlp.add_module("c_fc", nn.Linear(width, 4 * width))
        self.mlp.add_module("gelu", activation())
        self.mlp.add_module("c_proj", nn.Linear(4 * width, width))

    def forward(self, x):
        x = x + self.attn(self.ln_1(x))
        return x + self.mlp(self.ln_2(x))


class Transformer(nn.Module):
    def __init__(self, width, layers, activation):
        super().__init__()
        self.resblocks = nn.Sequential(*(Block(width, activation) for _ in range(layers)))

    def forward(self, x):
        return self.resblocks(x)


class Visual(nn.Module):
    def __init__(self, activation):
        super().__init__()
        self.conv1 = nn.Conv2d(3, 128, 8, 8, bias=False)
        self.class_embedding = nn.Parameter(torch.randn(128))
        self.positional_embedding = nn.Parameter(torch.randn(10, 128))
        self.ln_pre, self.ln_post = nn.LayerNorm(128), nn.LayerNorm(128)
        self.transformer = Transformer(128, 3, activation)
        self.proj = nn.Parameter(torch.randn(128, 32))

    def forward(self, image):
        x = self.conv1(image).flatten(2).transpose(1, 2)
        x = torch.cat([self.class_embedding.expand(x.shape[0], 1, -1), x], 1) + self.positional_embedding
        return self.ln_post(self.transformer(self.ln_pre(x))[:, 0]) @ self.proj


class TinyClip(nn.Module):
    """Parameter names and shapes of OpenAI's CLIP."""

    def __init__(self, activation=QuickGELU, integers=True):
        super().__init__()
        self.visual = Visual(activation)
        self.transformer = Transformer(64, 2, activation)
        self.token_embedding = nn.Embedding(100, 64)
        self.positional_embedding = nn.Parameter(torch.randn(16, 64))
        self.ln_final = nn.LayerNorm(64)
        self.text_projection = nn.Parameter(torch.randn(64, 32))
        self.logit_scale = nn.Parameter(torch.tensor(2.6592))
        # As in open_clip: no state dict has it, but an archive keeps every buffer.
        self.register_buffer("attn_mask", torch.full((16, 16), -1.0).triu(1), persistent=False)
        if integers:
            for name, value in (("input_resolution", 24), ("context_length", 16), ("vocab_size", 100)):
                self.register_buffer(name, torch.tensor(value))

    def forward(self, image, ids):
        text = self.ln_final(self.transformer(self.token_embedding(ids) + self.positional_embedding))[:, -1]
        return self.logit_scale.exp() * (self.visual(image) @ (text @ self.text_projection).T)


def tiny(activation=QuickGELU, integers=False):
    torch.manual_seed(0)
    return TinyClip(activation, integers)


def canonical(state, prefix="clip."):
    integers = ("input_resolution", "context_length", "vocab_size")
    return {prefix + key: value.float() for key, value in state.items() if key not in integers}


def assert_equal(found, expected):
    assert set(found) == set(expected)
    for key, value in expected.items():
        assert found[key].dtype == value.dtype, key
        assert found[key].is_contiguous()
        assert torch.equal(found[key], value), key


def archive(tmp_path, model, how, dtype=torch.float16):
    model = model.to(dtype).eval()
    path = tmp_path / f"{how}.pt"
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # deprecated in torch, yet what OpenAI's files are
        inputs = torch.randn(1, 3, 24, 24, dtype=dtype), torch.zeros(1, 16, dtype=torch.int64)
        made = torch.jit.script(model) if how == "script" else torch.jit.trace(model, inputs, check_trace=False)
        torch.jit.save(made, path)
    return path


@pytest.mark.parametrize(
    ("how", "dtype"),
    [("script", torch.float16), ("trace", torch.float16), ("script", torch.bfloat16), ("trace", torch.float32)],
)
@pytest.mark.parametrize(("activation", "name"), [(QuickGELU, "quick_gelu"), (nn.GELU, "gelu"), (nn.ReLU, None)])
def test_torchscript_archive(tmp_path, how, activation, name, dtype):
    model = tiny(activation)
    checkpoint = read_checkpoint(archive(tmp_path, model, how, dtype))
    assert_equal(checkpoint.tensors, canonical(model.state_dict()))  # .to() changed the model in place: rounded alike
    assert checkpoint.activation == name
    assert "TorchScript" in checkpoint.kind
    assert CLIP.sizes_of(split_towers(checkpoint.tensors)[0]) == SIZES


def test_torchscript_archive_with_openais_integers(tmp_path):
    checkpoint = read_checkpoint(archive(tmp_path, tiny(integers=True), "trace"))
    assert not {"clip.vocab_size", "clip.input_resolution", "clip.context_length"} & set(checkpoint.tensors)
    assert split_towers(checkpoint.tensors)[1] == {}


def test_torchscript_views_and_shared_storage(tmp_path):
    model = tiny()
    shared = torch.randn(400, 64)
    model.token_embedding.weight = nn.Parameter(shared[100:200])  # offset
    model.text_projection = nn.Parameter(torch.randn(32, 64).T)  # stride
    model.positional_embedding = nn.Parameter(shared[:32:2])  # both tensors lie in one storage
    checkpoint = read_checkpoint(archive(tmp_path, model, "script", torch.float32))
    assert_equal(checkpoint.tensors, canonical(model.state_dict()))
    assert checkpoint.tensors["clip.positional_embedding"].untyped_storage().nbytes() == 16 * 64 * 4


@pytest.mark.parametrize(
    "wrap",
    [
        lambda state: state,
        lambda state: {"state_dict": state, "epoch": 3},
        lambda state: {"model": state, "optimizer": {"state": {}}},
        lambda state: {"model_state_dict": {f"module.{k}": v for k, v in state.items()}},
        lambda state: {f"module._orig_mod.{k}": v for k, v in state.items()},
        lambda state: {"state_dict": {"module": state}},
        lambda state: {"state_dict": {f"model.{k}": v for k, v in state.items()}, "epoch": 1},
        lambda state: {"state_dict": {f"net.module.clip.{k}": v for k, v in state.items()}},
    ],
    ids=["plain", "state_dict", "model", "model_state_dict", "prefixes", "nested", "lightning", "net"],
)
@pytest.mark.parametrize("legacy", [False, True])
def test_plain_state_dict(tmp_path, wrap, legacy):
    state = tiny().half().state_dict()
    torch.save(wrap(state), tmp_path / "x.pt", _use_new_zipfile_serialization=not legacy)
    checkpoint = read_checkpoint(tmp_path / "x.pt")
    assert_equal(checkpoint.tensors, canonical(state))
    assert checkpoint.activation is None


def test_parts_of_a_training_program_beside_a_clip(tmp_path):
    """Lightning keeps a loss with parameters beside the network; a second network is never taken for the first."""
    state = {f"model.{k}": v for k, v in tiny().state_dict().items()} | {"loss.weight": torch.ones(2)}
    torch.save({"state_dict": state}, tmp_path / "x.ckpt")
    towers, rest = split_towers(read_checkpoint(tmp_path / "x.ckpt").tensors)
    assert_equal(towers, canonical(tiny().state_dict(), ""))
    assert set(rest) == {"loss.weight"}
    torch.save(tiny().state_dict() | {k: v + 1 for k, v in state.items()}, tmp_path / "x.ckpt")
    towers, rest = split_towers(read_checkpoint(tmp_path / "x.ckpt").tensors)
    assert_equal(towers, canonical(tiny().state_dict(), ""))
    assert "model.visual.proj" in rest


def test_module_inside_a_name_stays(tmp_path):
    state = canonical(tiny().state_dict()) | {"head.module.weight": torch.ones(2), "my_clip.visual.x": torch.ones(1)}
    torch.save(state, tmp_path / "x.pt")
    rest = split_towers(read_checkpoint(tmp_path / "x.pt").tensors)[1]
    assert set(rest) == {
        "head.module.weight",
        "my_clip.visual.x",
    }


def test_openais_integers_tell_quick_gelu(tmp_path):
    torch.save(tiny(integers=True).state_dict(), tmp_path / "x.pt")
    checkpoint = read_checkpoint(tmp_path / "x.pt")
    assert_equal(checkpoint.tensors, canonical(tiny().state_dict()))
    assert (checkpoint.activation, "OpenAI" in checkpoint.activation_reason) == ("quick_gelu", True)


HEADS = {
    "transformerClip.resblocks.0.ln_1.weight": torch.ones(32),
    "frame_position_embeddings.weight": torch.ones(16, 32),
}


def test_clip4clip(tmp_path):
    state = canonical(tiny().state_dict()) | HEADS
    torch.save(state, tmp_path / "pytorch_model.bin.4")
    checkpoint = read_checkpoint(tmp_path / "pytorch_model.bin.4")
    assert_equal(checkpoint.tensors, state)
    towers, rest = split_towers(checkpoint.tensors)
    assert_equal(rest, HEADS)
    assert set(towers) == set(canonical(tiny().state_dict(), ""))
    assert checkpoint.activation == "quick_gelu"
    assert "2 tensors of heads" in checkpoint.kind


@pytest.mark.parametrize(
    "wrap",
    [
        lambda state: {f"module.{name}": value for name, value in state.items()},
        lambda state: {"state_dict": state, "epoch": 2, "optimizer_states": [{"state": {}, "param_groups": []}]},
        lambda state: {"state_dict": {f"module.{name}": value for name, value in state.items()}},
    ],
    ids=["parallel", "lightning", "both"],
)
def test_the_originals_forms_tell_quick_gelu(tmp_path, wrap):
    torch.save(wrap(canonical(tiny().state_dict()) | HEADS), tmp_path / "x.ckpt")
    assert read_checkpoint(tmp_path / "x.ckpt").activation == "quick_gelu"


def test_clip_prefix_in_another_programs_wrapper_leaves_the_activation_open(tmp_path):
    torch.save({"model": canonical(tiny().state_dict()), "epoch": 1}, tmp_path / "checkpoint_last.pt")
    assert read_checkpoint(tmp_path / "checkpoint_last.pt").activation is None


OPEN_CLIP_SIZES = {
    "embed_dim": 32,
    "vision_cfg": {"image_size": 24, "layers": 3, "width": 128, "patch_size": 8},
    "text_cfg": {"context_length": 16, "vocab_size": 100, "width": 64, "heads": 1, "layers": 2},
}


@pytest.mark.parametrize("kind", ["open_clip_model.safetensors", "open_clip_pytorch_model.bin"])
@pytest.mark.parametrize("model_class", [OpenClip, CustomTextCLIP])
@pytest.mark.parametrize("quick", [True, False, None])
def test_open_clip(tmp_path, kind, model_class, quick):
    torch.manual_seed(1)
    model = model_class(32, CLIPVisionCfg(**OPEN_CLIP_SIZES["vision_cfg"]), CLIPTextCfg(**OPEN_CLIP_SIZES["text_cfg"]))
    state = {key: value.contiguous() for key, value in model.state_dict().items()}
    save_file(state, tmp_path / kind) if kind.endswith("safetensors") else torch.save(state, tmp_path / kind)
    if quick is not None:
        config = OPEN_CLIP_SIZES | ({"quick_gelu": True} if quick else {})
        (tmp_path / "open_clip_config.json").write_text(json.dumps({"model_cfg": config, "preprocess_cfg": {}}))
    checkpoint = read_checkpoint(tmp_path)
    assert_equal(checkpoint.tensors, {"clip." + key.removeprefix("text."): value for key, value in state.items()})
    assert checkpoint.activation == {True: "quick_gelu", False: "gelu", None: None}[quick]
    assert CLIP.sizes_of(split_towers(checkpoint.tensors)[0]) == SIZES
    assert checkpoint.path == tmp_path / kind


@pytest.mark.parametrize(
    ("part", "change"),
    [("text_cfg", {"heads": 2}), ("text_cfg", {"no_causal_mask": True})],
)
def test_open_clip_with_what_is_not_built(tmp_path, part, change):
    torch.save(tiny().state_dict(), tmp_path / "open_clip_pytorch_model.bin")
    config = OPEN_CLIP_SIZES | {part: OPEN_CLIP_SIZES[part] | change}
    (tmp_path / "open_clip_config.json").write_text(json.dumps({"model_cfg": config}))
    with pytest.raises(CheckpointError, match=r"open_clip_config\.json.* built here"):
        read_checkpoint(tmp_path)


def hugging_face(folder, activation="gelu", safe=True):
    torch.manual_seed(2)
    text = {
        "hidden_size": 64,
        "intermediate_size": 256,
        "num_attention_heads": 1,
        "num_hidden_layers": 2,
        "vocab_size": 100,
        "max_position_embeddings": 16,
        "hidden_act": activation,
        "bos_token_id": 98,
        "eos_token_id": 99,
    }
    vision = {
        "hidden_size": 128,
        "intermediate_size": 512,
        "num_attention_heads": 2,
        "num_hidden_layers": 3,
        "image_size": 24,
        "patch_size": 8,
        "hidden_act": activation,
    }
    model = CLIPModel(CLIPConfig(text_config=text, vision_config=vision, projection_dim=32)).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.randn_like(parameter) * 0.1)
    model.save_pretrained(folder)
    if not safe:
        torch.save(model.state_dict(), folder / "pytorch_model.bin")
        (folder / "model.safetensors").unlink()
    return model


@pytest.mark.parametrize(("activation", "safe"), [("gelu", True), ("quick_gelu", False)])
def test_hugging_face(tmp_path, activation, safe):
    """The renamed weights in open_clip's model, an independent program, give transformers' features."""
    theirs = hugging_face(tmp_path, activation, safe)
    checkpoint = read_checkpoint(tmp_path)
    assert checkpoint.activation == activation
    assert checkpoint.kind == "CLIP, Hugging Face CLIPModel"
    assert split_towers(checkpoint.tensors)[1] == {}
    assert CLIP.sizes_of(split_towers(checkpoint.tensors)[0]) == SIZES
    ours = OpenClip(
        32,
        CLIPVisionCfg(**OPEN_CLIP_SIZES["vision_cfg"]),
        CLIPTextCfg(**OPEN_CLIP_SIZES["text_cfg"]),
        quick_gelu=activation == "quick_gelu",
    ).eval()
    load_strict(ours, {key.removeprefix("clip."): value for key, value in checkpoint.tensors.items()}, "tiny")
    images, ids = torch.randn(2, 3, 24, 24), torch.randint(1, 98, (2, 16))
    ids[:, -1] = 99
    with torch.no_grad():
        out = theirs(input_ids=ids, pixel_values=images)
        torch.testing.assert_close(ours.encode_image(images, normalize=True), out.image_embeds, atol=1e-5, rtol=1e-4)
        torch.testing.assert_close(ours.encode_text(ids, normalize=True), out.text_embeds, atol=1e-5, rtol=1e-4)


class Tree(nn.Module):
    """Modules that hold tensors under given names, for an archive whose code tells nothing."""

    def __init__(self, tensors):
        super().__init__()
        for name, value in tensors.items():
            *path, last = name.split(".")
            at = self
            for part in path:
                if part not in at._modules:
                    at.add_module(part, Tree({}))
                at = at._modules[part]
            at.register_buffer(last, value)

    def forward(self, x):
        return x


def test_an_archive_with_hugging_face_names_reads_its_config(tmp_path):
    state = hugging_face(tmp_path, "gelu").state_dict()
    torch.jit.script(Tree(state)).save(str(tmp_path / "clip.pt"))
    assert read_checkpoint(tmp_path / "clip.pt").activation == "gelu"


def test_hugging_face_without_its_config_and_with_a_part_missing(tmp_path):
    state = hugging_face(tmp_path, safe=False).state_dict()
    (tmp_path / "config.json").unlink()
    assert read_checkpoint(tmp_path).activation is None
    del state["text_model.encoder.layers.1.self_attn.k_proj.bias"]
    torch.save(state, tmp_path / "pytorch_model.bin")
    with pytest.raises(CheckpointError, match=r"lacks \['k'\] of transformer\.resblocks\.1\.attn\.in_proj_bias"):
        read_checkpoint(tmp_path)


def test_sidecar_wins_and_is_checked(tmp_path):
    path = tmp_path / "pytorch_model.bin"
    tensors = canonical(tiny().state_dict()) | HEADS
    save_checkpoint(path, tensors, {"activation": "gelu", "epoch": 2})
    assert sorted(os.listdir(tmp_path)) == ["pytorch_model.bin", "pytorch_model.bin.json"]
    checkpoint = read_checkpoint(path)
    assert_equal(checkpoint.tensors, tensors)
    assert checkpoint.activation == "gelu"
    (tmp_path / "pytorch_model.bin.json").write_text('{"activation": "relu"}')
    with pytest.raises(CheckpointError, match=r"activation must be one of quick_gelu, gelu, got 'relu'"):
        read_checkpoint(path)
    (tmp_path / "pytorch_model.bin.json").write_text("{")
    with pytest.raises(CheckpointError, match="Repair it or remove it"):
        read_checkpoint(path)


def test_saved_file_is_a_plain_state_dict_without_slack(tmp_path):
    whole = torch.randn(1000, 1000)
    save_checkpoint(tmp_path / "x.bin", {"clip.a": whole[:2], "clip.b": nn.Parameter(whole[0])}, {"activation": "gelu"})
    assert (tmp_path / "x.bin").stat().st_size < 20_000
    loaded = torch.load(tmp_path / "x.bin", weights_only=True)
    assert type(loaded) is dict
    assert torch.equal(loaded["clip.a"], whole[:2])
    assert type(loaded["clip.b"]) is torch.Tensor


def test_saving_where_it_cannot_be_leaves_what_was_there(tmp_path):
    path = tmp_path / "x.bin"
    path.mkdir()  # a folder in the way: the last step, moving into place, fails
    with pytest.raises(OSError, match="cannot write .*x.bin"):
        save_checkpoint(path, {"clip.a": torch.ones(1)}, {"activation": "gelu"})
    assert sorted(os.listdir(tmp_path)) == ["x.bin", "x.bin.json"]
    with pytest.raises(ValueError, match="activation"):
        save_checkpoint(tmp_path / "y.bin", {}, {})


def test_clip_sizes_at_the_real_shape():
    shapes = {
        "visual.conv1.weight": (768, 3, 32, 32),
        "visual.positional_embedding": (50, 768),
        "ln_final.weight": (512,),
        "text_projection": (512, 512),
        "positional_embedding": (77, 512),
        "token_embedding.weight": (49408, 512),
    }
    for i in range(12):
        shapes[f"visual.transformer.resblocks.{i}.attn.in_proj_weight"] = (2304, 768)
        shapes[f"transformer.resblocks.{i}.attn.in_proj_weight"] = (1536, 512)
    tensors = {key: torch.empty(shape, device="meta") for key, shape in shapes.items()}
    values = list(asdict(CLIP.sizes_of(tensors)).values())
    assert values == [512, 224, 12, 768, 32, 77, 49408, 512, 8, 12, 12, None, None]


def test_clip_sizes_of_the_recorded_models():
    """Fixtures A*.json state the sizes of CLIP4Clip models and the shape of every tensor of theirs."""
    golden = Path(os.environ.get("GOLDEN_DIR", Path(__file__).parent / "golden"))
    manifests = [json.loads(path.read_text(encoding="utf-8")) for path in sorted(golden.glob("A[1-7]_*.json"))]
    assert manifests, f"no A*.json in {golden}"
    for manifest in manifests:
        shapes = {key: spec[0] for key, spec in manifest["weights"]["tensors"].items()}
        towers = split_towers({key: torch.empty(shape, device="meta") for key, shape in shapes.items()})[0]
        sizes = asdict(CLIP.sizes_of(towers))
        config = manifest["config"]
        for key in ("embed_dim", "image_resolution", "vision_layers", "vision_width", "context_length", "vocab_size"):
            assert sizes[key] == config[key]
        assert [sizes["patch_size"], sizes["text_width"], sizes["text_layers"]] == [
            config["vision_patch_size"],
            config["transformer_width"],
            config["transformer_layers"],
        ]


@pytest.mark.parametrize(
    ("key", "shape", "message"),
    [
        ("visual.positional_embedding", (12, 128), "11 patch positions, not a square"),
        ("visual.conv1.weight", (128, 3, 8, 4), "not square image patches"),
        ("visual.conv1.weight", (100, 3, 8, 8), "not a multiple of 64"),
        ("visual.conv1.weight", (1280, 3, 14, 14), "do not show its attention heads: give --image_heads"),
    ],
)
def test_clip_sizes_refuses(key, shape, message):
    with pytest.raises(ValueError, match=message):
        CLIP.sizes_of(canonical(tiny().state_dict(), "") | {key: torch.empty(shape)})


def test_load_strict_lists_what_differs_and_copies_nothing():
    model = nn.Sequential(nn.Linear(2, 3), nn.Linear(3, 1))
    before = {key: value.clone() for key, value in model.state_dict().items()}
    tensors = {"0.weight": torch.zeros(3, 2), "0.bias": torch.zeros(4), "1.weight": torch.zeros(1, 3)}
    tensors |= {f"lstm.{i}": torch.zeros(5) for i in range(6)}
    with pytest.raises(CheckpointError) as caught:
        load_strict(model, tensors, "my.bin")
    for part in (
        "my.bin",
        "1 missing in the file: 1.bias [1].",
        "6 without a place in the model: lstm.0 [5]",
        "and 2 more",
        "1 of another shape: 0.bias: file [4], model [3].",
        "--sim_header",
    ):
        assert part in str(caught.value)
    assert_equal(model.state_dict(), before)
    load_strict(model, {key: value + 1 for key, value in before.items()}, "my.bin")
    assert torch.equal(model.state_dict()["1.bias"], before["1.bias"] + 1)


def saved(content):
    buffer = io.BytesIO()
    torch.save(content, buffer)
    return buffer.getvalue()


WRONG = {
    "web_page": (lambda: b"\n<!DOCTYPE html><html>Not found</html>", "web page"),
    "empty": (lambda: b"", "empty"),
    "lfs": (lambda: b"version https://git-lfs.github.com/spec/v1\noid sha256:00\n", "Git LFS pointer"),
    "noise": (lambda: bytes(range(255, 0, -1)) * 9, "no known weight format"),
    "cut": (lambda: saved(tiny().state_dict())[:50_000], "breaks off"),
    "cut_safetensors": (lambda: save({"x": torch.ones(9)})[:-4], r"\.safetensors file that breaks off"),
    "gzip": (lambda: b"\x1f\x8b\x08" + bytes(50), "Unpack"),
    "optimizer": (
        lambda: saved({"epoch": 1, "optimizer_state_dict": {"state": {}, "param_groups": []}, "loss": torch.ones(1)}),
        "state of an optimizer",
    ),
    "adam": (lambda: saved(torch.optim.Adam([nn.Parameter(torch.ones(1))]).state_dict()), "state of an optimizer"),
    "resnet": (lambda: saved({"visual.layer1.0.conv1.weight": torch.ones(1)}), "ResNet image tower"),
    "siglip": (lambda: saved({"visual.trunk.blocks.0.x": torch.ones(1)}), "timm image tower"),
    "logit_bias": (lambda: saved(tiny().state_dict() | {"logit_bias": torch.ones(1)}), "another loss.*logit_bias"),
    "layer_scale": (
        lambda: saved(tiny().state_dict() | {"visual.transformer.resblocks.1.ls_1.gamma": torch.ones(128)}),
        r"LayerScale, 1 factors such as visual\.transformer\.resblocks\.1\.ls_1",
    ),
    "nan": (
        lambda: saved(tiny().state_dict() | {"logit_scale": torch.tensor(float("nan"))}),
        "such as clip.logit_scale",
    ),
    "other": (lambda: saved({"encoder.weight": torch.ones(1)}), r"something other than a CLIP.*encoder\.weight"),
    "half": (
        lambda: saved({k: v for k, v in tiny().state_dict().items() if k != "text_projection"}),
        "without text_projection",
    ),
    "list": (lambda: saved([torch.ones(1)]), "holds a list"),
    "nothing": (lambda: saved({}), "no state dict"),
    "whole_module": (lambda: saved(nn.Linear(1, 1)), "save only its weights"),
}


@pytest.mark.parametrize("name", WRONG)
def test_wrong_files_are_named(tmp_path, name):
    make, message = WRONG[name]
    path = tmp_path / "weights.pt"
    path.write_bytes(make())
    with pytest.raises(CheckpointError, match=message) as caught:
        read_checkpoint(path)
    assert str(path) in str(caught.value)
    assert describe_wrong_file(path)


def test_a_missing_file_and_a_folder_without_weights(tmp_path):
    with pytest.raises(CheckpointError, match="No such file.*Check the path"):
        read_checkpoint(tmp_path / "none.pt")
    (tmp_path / "notes.txt").write_text("")
    with pytest.raises(CheckpointError, match=r"holds none of model\.safetensors.*looks like weights, but: notes\.txt"):
        read_checkpoint(tmp_path)
    (tmp_path / "best.ckpt").write_text("")
    with pytest.raises(CheckpointError, match=r"these look like weights: best\.ckpt$"):
        read_checkpoint(tmp_path)


class Evil:
    def __init__(self, target):
        self.target = target

    def __reduce__(self):
        return os.system, (f"touch {self.target}",)


def hostile_archive(path, data_pkl, constants=b"\x80\x02)."):  # an empty tuple
    with zipfile.ZipFile(path, "w") as made:
        made.writestr("x/data.pkl", data_pkl)
        made.writestr("x/constants.pkl", constants)
        made.writestr("x/code/__torch__.py", f"import os\nos.system('touch {path}.ran')\n")
        made.writestr("x/data/0", bytes(4))


@pytest.mark.parametrize("where", ["pickle", "torch_zip", "archive", "constants"])
def test_nothing_in_a_file_is_run(tmp_path, where):
    path, proof = tmp_path / "evil.pt", tmp_path / "ran"
    harmless = b"\x80\x02c__torch__\nM\n)\x81}b."
    if where == "pickle":
        path.write_bytes(pickle.dumps({"clip.x": Evil(proof)}, 2))
    elif where == "torch_zip":
        path.write_bytes(saved({"clip.x": Evil(proof)}))
    elif where == "archive":
        hostile_archive(path, pickle.dumps(Evil(proof), 2))
    else:
        hostile_archive(path, harmless, pickle.dumps(Evil(proof), 2))
    with pytest.raises(CheckpointError):
        read_checkpoint(path)
    assert sorted(os.listdir(tmp_path)) == ["evil.pt"]


TENSOR = (
    b"\x80\x02c__torch__\nM\n)\x81}X\x01\x00\x00\x00wctorch._utils\n_rebuild_tensor_v2\n("
    b"(X\x07\x00\x00\x00storagectorch\nFloatStorage\nX\x01\x00\x00\x000X\x03\x00\x00\x00cpuK\x01tQ%s\x89ccollections\nOrderedDict\n)RtRsb."
)


@pytest.mark.parametrize(
    ("data_pkl", "message"),
    [
        (TENSOR % b"K\x00K\x01\x85K\x01\x85", r"1 tensors of something other than a CLIP model \(such as w\)"),  # sound
        (TENSOR % b"K\x00K\x09\x85K\x00\x85", r"shape \(9,\) does not fit 1 stored"),  # stride 0
        (TENSOR % b"K\x05K\x01\x85K\x01\x85", "out of bounds"),  # offset beyond the storage
        (b"\x80\x02cbuiltins\neval\nX\x01\x00\x00\x001\x85R.", "asks for builtins.eval"),
        (b"\x80\x02ctorch.hub\nload\n.", r"asks for torch\.hub\.load"),
        (b"\x80\x02c__torch__\nM\n}X\x01\x00\x00\x00a}sb.", "damaged"),  # state given to a class, not an instance
        (b"\x80\x02c__torch__\nM\n)\x81q\x00}X\x01\x00\x00\x00ah\x00sb.", "without end"),  # a module inside itself
        (b"\x80\x02K\x01.", "without a module"),
    ],
    ids=["sound", "stride", "offset", "eval", "hub", "class_state", "cycle", "no_module"],
)
def test_hostile_archives(tmp_path, data_pkl, message):
    hostile_archive(tmp_path / "x.pt", data_pkl)
    with pytest.raises(CheckpointError, match=message):
        read_checkpoint(tmp_path / "x.pt")
