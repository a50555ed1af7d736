"""Which activation a weight file was trained with: nothing in the weights shows it, and the wrong one costs points.

Recognised from the file's own code, its keys, or what lies beside it, otherwise left open: never a silent guess.
The configurations beside a file are also checked for what cannot be seen in the weights and is not built here.
"""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from checkpoints.download import OPENAI_CLIP
from checkpoints.files import CheckpointError, RawFile
from checkpoints.names import CLIP_PREFIX, NamedTensors
from checkpoints.whole import file_sha256

ACTIVATIONS = ("quick_gelu", "gelu")
GELU_MARK = "clip.gelu_activation"  # among the tensors of our files that were trained with gelu
HEAD_WIDTH = 64  # of every attention head of OpenAI's models
OPEN_CLIP_USUAL = (
    ("text_cfg", "pool_type", "argmax"),
    ("text_cfg", "no_causal_mask", False),
    ("vision_cfg", "pool_type", "tok"),
)


def find_activation(path: Path, raw: RawFile, named: NamedTensors, sidecar: dict | None) -> tuple[str | None, str]:
    """("quick_gelu" | "gelu" | None, the reason in words), from the surest source to the weakest.

    CheckpointError when what lies beside the file is unreadable, unknown or describes a model that is not built here.
    """
    if sidecar and "activation" in sidecar:
        value = sidecar["activation"]
        if value not in ACTIVATIONS:
            raise CheckpointError(f"{path}.json: activation must be one of {', '.join(ACTIVATIONS)}, got {value!r}")
        return value, f"stated in {path.name}.json"
    if isinstance(raw.content, dict) and GELU_MARK in raw.content:
        return "gelu", "marked in the file"
    if raw.activation:
        return raw.activation, "read off the code in the TorchScript archive"
    if raw.container == "torchscript" and file_sha256(path) in {sha256 for _, sha256 in OPENAI_CLIP.values()}:
        return "quick_gelu", "the SHA-256 is that of OpenAI's release"
    if named.has_integers:
        return "quick_gelu", "it has the three integers that only OpenAI's release has"
    if named.activation:
        return named.activation, f"every model of --encoder {named.encoder} was trained with it"
    if named.prefixed:
        # CLIP4Clip saves plain state dicts, InternVideo's code reads "state_dict"; other wrappers are other programs'.
        state = raw.content.get("state_dict", raw.content)
        if named.naming == "openai" and any(str(k).removeprefix("module.").startswith(CLIP_PREFIX) for k in state):
            return "quick_gelu", "CLIP4Clip's form: it and InternVideo's code start from OpenAI's weights only"
    elif named.naming == "hugging_face" or raw.container != "torchscript":
        name, read = "open_clip_config.json", _from_open_clip
        if named.naming == "hugging_face":
            name, read = "config.json", _from_hugging_face
        config = read_json(path.with_name(name))
        if config is not None:
            return read(config, path.with_name(name))
    return None, "nothing in the file or beside it tells"


def read_json(path: Path) -> dict | None:
    """The JSON object in a file, None if there is no such file; CheckpointError if it is something else."""
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (FileNotFoundError, NotADirectoryError):
        return None
    except (OSError, ValueError) as error:
        raise CheckpointError(f"cannot read {path}: {error}. Repair it or remove it.") from error
    if not isinstance(value, dict):
        raise CheckpointError(f"{path} holds a JSON {type(value).__name__}, not an object. Repair it or remove it.")
    return value


def _from_hugging_face(config: dict, path: Path) -> tuple[str | None, str]:
    """transformers' CLIPConfig; what it leaves out has the default of CLIPTextConfig and CLIPVisionConfig."""
    if config.get("model_type", "clip") != "clip":
        raise CheckpointError(f"{path} describes a {config['model_type']!r} model, not a CLIP")
    text, vision = _part(config, "text_config"), _part(config, "vision_config")
    _check_heads(path, "text", text.get("hidden_size", 512), text.get("num_attention_heads", 8))
    _check_heads(path, "image", vision.get("hidden_size", 768), vision.get("num_attention_heads", 12))
    found = {part.get("hidden_act", "quick_gelu") for part in (text, vision)}
    if len(found) > 1 or not found <= set(ACTIVATIONS):
        raise CheckpointError(
            f"{path}: hidden_act is {' and '.join(sorted(map(str, found)))}; only quick_gelu in both "
            "towers or gelu in both is built here"
        )
    return found.pop(), f"hidden_act in {path.name}"


def _from_open_clip(config: dict, path: Path) -> tuple[str | None, str]:
    """open_clip's model_cfg; what it leaves out has the default of CLIPVisionCfg and CLIPTextCfg."""
    model = _part(config, "model_cfg") or config
    text, vision = _part(model, "text_cfg"), _part(model, "vision_cfg")
    _check_heads(path, "text", text.get("width", 512), text.get("heads", 8))
    _check_heads(path, "image", vision.get("head_width", HEAD_WIDTH), 1)
    for part, key, usual in OPEN_CLIP_USUAL:
        if _part(model, part).get(key, usual) != usual:
            raise CheckpointError(
                f"{path}: {part}.{key} differs from OpenAI's CLIP, whose towers are the only ones built here"
            )
    return ("quick_gelu" if model.get("quick_gelu", False) else "gelu"), f"quick_gelu in {path.name}"


def _part(config: Mapping[str, Any], key: str) -> dict:
    value = config.get(key)
    return value if isinstance(value, dict) else {}


def _check_heads(path: Path, tower: str, width: int, heads: int) -> None:
    if width != heads * HEAD_WIDTH:
        raise CheckpointError(
            f"{path}: the {tower} tower has heads {width / heads:g} wide; only {HEAD_WIDTH}, as in "
            "OpenAI's models, is built here"
        )
