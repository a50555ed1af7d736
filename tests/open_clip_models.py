"""Small models of open_clip's architectures with random weights, as folders that the library itself loads.

True widths where that is cheap, one block a tower, and a few hundred tokens: depth is what a test can do without.
"""

import json
import re
from collections.abc import Sequence
from functools import partial
from pathlib import Path

import open_clip
import timm
import torch
from safetensors.torch import save_file
from timm.models import register_model
from tokenizers import Tokenizer, models, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast, XLMRobertaConfig

from engine.build import build_model, find_weights
from engine.options import parse_options
from modules.model import VideoTextModel

# An architecture of timm -> what makes it shallow. open_clip passes nothing but a name, so each gets one.
SHALLOW = {
    "vit_base_patch16_siglip_224": {"depth": 1},
    "vit_base_patch32_siglip_256": {"depth": 1},
    "eva02_base_patch16_clip_224": {"depth": 1},
    "vit_pe_core_base_patch16_224": {"depth": 1},
    "convnext_base": {"depths": (1, 1, 1, 1)},
    "fastvit_mci1": {"layers": (1, 1, 1, 1)},
}


# The same with small widths and pictures, to be trained within seconds.
TINY = {
    "vit_base_patch16_siglip_224": {"depth": 2, "embed_dim": 64, "num_heads": 2, "img_size": 32, "patch_size": 8},
    "convnext_base": {"depths": (1, 1, 1, 1), "dims": (32, 32, 64, 64)},
}
TINY_TOWER = {
    "ViT-B-32": {"layers": 2, "width": 64, "patch_size": 8, "image_size": 32},
    "ViT-B-16-SigLIP": {"timm_model_name": "tiny_vit_base_patch16_siglip_224", "image_size": 32},
    "convnext_base": {"timm_model_name": "tiny_convnext_base", "image_size": 64},
}


def named(kind: str, name: str, settings: dict) -> str:
    entry = partial(timm.create_model, name, **settings)

    def make(pretrained: bool = False, **settings):
        return entry(pretrained=False, **settings)

    make.__name__ = f"{kind}_{name}"
    register_model(make)
    return make.__name__


SHALLOW_NAMES = {name: named("shallow", name, settings) for name, settings in SHALLOW.items()}
for _name, _settings in TINY.items():
    named("tiny", _name, _settings)
# Models of open_clip's list: what they are an example of.
ARCHITECTURES = {
    "ViT-B-32": "plain",
    "ViT-B-16-quickgelu": "QuickGELU",
    "ViT-H-14": "heads 80 wide",
    "ViT-bigG-14": "heads 104 wide, other MLPs",
    "ViT-L-14-CLIPA": "pooling of patches and of the last token, attention both ways",
    "coca_ViT-B-32": "CoCa: attentional pooling, a class token in the text",
    "RN50": "a ResNet with BatchNorm",
    "ViT-B-16-SigLIP": "SigLIP",
    "ViT-B-32-SigLIP2-256": "SigLIP 2",
    "EVA02-B-16": "EVA",
    "convnext_base": "ConvNeXt",
    "MobileCLIP-S1": "MobileCLIP: FastViT with BatchNorm, attention both ways",
    "PE-Core-B-16": "Perception Encoder",
    "xlm-roberta-base-ViT-B-32": "a text tower of Hugging Face",
}
WORDS = Path(__file__).parent.parent / "tools" / "sample_data" / "words.json"
CAPTIONS = (
    "a red square moves to the left",
    "two people, dancing!",
    "",
    "a very long caption " * 9,
    "the blue circle and the green circle go up",
)


def configuration(name: str, folder: Path, vocabulary: int = 400, **vision) -> dict:
    """The model's own configuration, made small; `vision` changes its image tower."""
    config = open_clip.get_model_config(name)
    tower, text = config["vision_cfg"], config["text_cfg"]
    if architecture := tower.get("timm_model_name"):
        tower |= {"timm_model_name": SHALLOW_NAMES[architecture], "timm_drop_path": 0.0}
    elif isinstance(tower["layers"], list):
        tower |= {"layers": [1, 1, 1, 1], "image_size": 64}
    else:
        tower |= {"layers": 1, "image_size": 3 * tower["patch_size"]}
    tower |= vision
    if text.get("hf_model_name"):
        small = {"hidden_size": 64, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 128}
        XLMRobertaConfig(vocab_size=vocabulary, max_position_embeddings=80, **small).save_pretrained(folder / "roberta")
        text |= {"hf_model_name": str(folder / "roberta")}
    else:
        text |= {"layers": 1, "vocab_size": vocabulary}
    return config


def save_tokenizer(folder: Path, padding: str, ends: str = "</s>") -> None:
    """A word tokenizer that knows the captions and the sample data.

    SigLIP's pads with the token that ends a text, others with one of their own.
    """
    inner = Tokenizer(models.WordLevel(unk_token="<unk>"))
    inner.pre_tokenizer = pre_tokenizers.Whitespace()
    special = ["<s>", "<pad>", "</s>", "<unk>"]  # as XLM-R numbers them
    words = re.findall(r"\w+", WORDS.read_text(encoding="utf-8"))
    inner.train_from_iterator([*CAPTIONS, *words], trainers.WordLevelTrainer(special_tokens=special))
    inner.post_processor = processors.TemplateProcessing(
        single=f"$A {ends}", special_tokens=[(ends, special.index(ends))]
    )
    PreTrainedTokenizerFast(
        tokenizer_object=inner,
        unk_token="<unk>",
        bos_token="<s>",
        eos_token="</s>",
        sep_token="</s>",
        pad_token=padding,
    ).save_pretrained(folder)


def save_tiny(name: str, folder: Path, **top) -> torch.nn.Module:
    """A model that learns within seconds: 64 wide, reading captions of the sample data."""
    text = {"width": 64, "heads": 2, "layers": 1, "context_length": 32}
    vocabulary = 400 if "SigLIP" in name else 49408
    return save_model(
        name, folder, vocabulary=vocabulary, text=text, timm_scale=3.0, top={"embed_dim": 64} | top, **TINY_TOWER[name]
    )


def save_model(
    name: str,
    folder: Path,
    vocabulary: int = 400,
    text: dict | None = None,
    top: dict | None = None,
    timm_scale: float = 1.0,
    **vision,
) -> torch.nn.Module:
    """A folder with configuration, weights and tokenizer; the library's model of it, in evaluation mode."""
    folder.mkdir(parents=True, exist_ok=True)
    config = configuration(name, folder, vocabulary, **vision)
    config |= top or {}
    config["text_cfg"] |= text or {}
    tags = open_clip.list_pretrained_tags_by_model(name)
    pictures = open_clip.get_pretrained_cfg(name, tags[0]) if tags else {}
    pictures = {key: pictures[key] for key in ("mean", "std", "interpolation", "resize_mode") if key in pictures}
    (folder / "open_clip_config.json").write_text(json.dumps({"model_cfg": config, "preprocess_cfg": pictures}))
    if config["text_cfg"].get("hf_tokenizer_name"):
        save_tokenizer(folder, "</s>" if "SigLIP" in name else "<pad>")
    torch.manual_seed(0)
    model = open_clip.create_model(f"local-dir:{folder}", pretrained_text=False).eval()
    with torch.no_grad():  # norms start as the identity and biases as zero: make them count
        for key, parameter in model.named_parameters():
            if parameter.ndim == 1:
                parameter.add_(0.1 * torch.randn_like(parameter))
            elif key.startswith("visual.trunk.") and "pos_embed" not in key:
                parameter.mul_(timm_scale)  # timm starts with weights too small to learn from within seconds
        for buffer_name, buffer in model.named_buffers():
            if buffer_name.endswith(("running_mean", "running_var")):
                buffer.add_(0.1 * torch.rand_like(buffer))
    state = {key: value.contiguous().clone() for key, value in model.state_dict().items()}
    save_file(state, folder / "open_clip_model.safetensors")
    return model


def flags_for(folder: Path, *more: str) -> list[str]:
    run = [
        "--do_eval",
        "--datatype",
        "msvd",
        "--output_dir",
        str(folder / "out"),
        "--data_path",
        str(folder),
        "--features_path",
        str(folder),
    ]
    return [*run, "--encoder", "open_clip", "--pretrained_clip_name", str(folder), "--device", "cpu", *more]


def our_model(folder: Path, *more: str) -> VideoTextModel:
    """The model of a run with these flags, in evaluation mode."""
    options = parse_options(flags_for(folder, *more))
    return build_model(options, find_weights(options)).eval()


def ids_of(model: torch.nn.Module, captions: Sequence[str] = CAPTIONS, words: int = 32):
    return model.clip.tokenizer(captions, words)
