"""Weight files: read any known one, recognise it by its keys, take sizes from it, load it whole, save ours.

No module is built here: tensors go from dict to dict, under CLIP4Clip's names (see names.py).
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from checkpoints.beside import Beside, of_sidecar, read_beside
from checkpoints.files import CheckpointError, RawFile, read_json, read_raw
from checkpoints.names import CLIP_PREFIX, GELU_MARK, SPEC_MARK, NamedTensors, canonical_names, owned, unwrap
from checkpoints.whole import write_whole

FOLDER_FILES = ("model.safetensors", "pytorch_model.bin", "open_clip_model.safetensors", "open_clip_pytorch_model.bin")
SUFFIXES = (".pt", ".pth", ".bin", ".ckpt", ".safetensors")
EXAMPLES = 4
ACTIVATIONS = ("quick_gelu", "gelu")
HEAD_WIDTH = 64  # of every attention head of OpenAI's models
OPEN_CLIP_USUAL = (
    ("text_cfg", "pool_type", "argmax"),
    ("text_cfg", "no_causal_mask", False),
    ("vision_cfg", "pool_type", "tok"),
)
NAMINGS = {
    "openai": "state dict under OpenAI's names (OpenAI or open_clip)",
    "open_clip": "open_clip state dict (CustomTextCLIP)",
    "hugging_face": "Hugging Face CLIPModel",
}


@dataclass(frozen=True)
class Checkpoint:
    """A weight file, read."""

    path: Path
    tensors: dict[str, Tensor]  # canonical name -> tensor on the CPU, float32 or integer
    kind: str  # what was recognised
    activation: str | None  # "quick_gelu", "gelu", or None when nothing tells
    activation_reason: str
    encoder: str  # the name of the encoder that the file holds
    beside: Beside = Beside()  # what stands beside the file and it does not show
    told: dict[str, Any] = field(default_factory=dict)  # sizes of the encoder that stand beside the file


def read_checkpoint(
    path: str | Path, encoders: Sequence[Any] = (), sidecar: dict | None = None, alone: bool = False
) -> Checkpoint:
    """Read a CLIP or retrieval model from a file, or from a folder that holds one under its usual name.

    Known: OpenAI's TorchScript archives; state dicts of OpenAI, open_clip, CLIP4Clip and Hugging Face's CLIPModel, as
    .pt / .bin or .safetensors, also inside "state_dict", "model"... or behind "module."; and of each of `encoders`.
    Nothing in the file is run. CheckpointError for anything else, saying what it looks like and what to do, and for
    tensors that hold NaN or infinity. alone: nothing that stands beside the file is of it.
    """
    path = weight_file(path)
    raw = read_raw(path)
    if isinstance(raw.content, Mapping) and {"optimizer", "progress", "options"} <= raw.content.keys():
        remedy = "give it as --resume_model, or for weights the pytorch_model.bin beside it"
        raise CheckpointError(f"{path} is the state of a training run: {remedy}")
    try:
        sidecar = read_sidecar(path) if sidecar is None else sidecar
        spec = (sidecar or {}).get("encoder") or {}
        named = canonical_names(unwrap(raw.content), encoders, spec.get("name"))
    except CheckpointError as error:
        raise CheckpointError(f"{path} cannot be used: {error}") from error
    check_numbers(named.tensors, path)
    beside = Beside() if alone else _beside(path, raw, named, sidecar)
    activation, reason = _activation(path, raw, named, sidecar)
    naming = NAMINGS.get(named.naming, f"under the names of --encoder {named.naming}")
    kind = f"{'retrieval model with a CLIP' if named.prefixed else 'CLIP'}, {naming}"
    if raw.container == "torchscript":
        kind = "TorchScript archive of a CLIP, as OpenAI releases them"
    if n_heads := sum(not key.startswith(CLIP_PREFIX) for key in named.tensors):
        kind += f", {n_heads} tensors of heads"
    told = spec.get("sizes") or ({"vision_heads": beside.image_heads} if beside.image_heads else {})
    return Checkpoint(path, named.tensors, kind, activation, reason, named.encoder, beside, told)


def check_numbers(tensors: Mapping[str, Tensor], path: Path) -> None:
    """Raises CheckpointError for weights that are no numbers."""
    if broken := [name for name, value in tensors.items() if not value.isfinite().all()]:
        raise CheckpointError(f"{path}: {len(broken)} tensors hold NaN or infinity, such as {min(broken)}; give others")


def _beside(path: Path, raw: RawFile, named: NamedTensors, sidecar: dict | None) -> Beside:
    """Of a file of ours: what its sidecar says, or, where it was copied without, its mark. Else other programs' files.

    CheckpointError for what is not built here.
    """
    spec, source = (sidecar or {}).get("encoder"), Path(f"{path}.json")
    if not sidecar and isinstance(raw.content, dict) and SPEC_MARK in raw.content:
        source = path
        try:
            spec = json.loads(bytes(raw.content[SPEC_MARK].tolist()))
        except (AttributeError, TypeError, ValueError) as error:
            raise CheckpointError(f"{path}: {SPEC_MARK} in it is damaged ({error}); fetch or copy it again") from error
    if sidecar or spec is not None:
        return of_sidecar(spec if isinstance(spec, dict) else {}, source)
    return read_beside(path, named.naming)


def read_sidecar(path: str | Path) -> dict | None:
    """What :func:`save_checkpoint` wrote beside a weight file, also if `path` is a link to it or the folder it is in.

    None where there is nothing; CheckpointError where it is not an object.
    """
    file = weight_file(path)
    beside = read_json(Path(f"{file}.json"))
    return beside if beside is not None or not file.is_symlink() else read_json(Path(f"{file.resolve()}.json"))


def load_strict(module: nn.Module, tensors: Mapping[str, Tensor], source: str) -> None:
    """Copy `tensors` into `module`; names and shapes must agree entirely, else CheckpointError and nothing is copied.

    `source` names the file in the message, best with its `kind`.
    """
    own = {key: list(value.shape) for key, value in module.state_dict().items()}
    given = {key: list(value.shape) for key, value in tensors.items()}
    missing = [f"{key} {shape}" for key, shape in own.items() if key not in given]
    placeless = [f"{key} {shape}" for key, shape in given.items() if key not in own]
    other = [f"{key}: file {given[key]}, model {own[key]}" for key in own if given.get(key, own[key]) != own[key]]
    problems = {"missing in the file": missing, "without a place in the model": placeless, "of another shape": other}
    found = ""
    for what, entries in problems.items():
        if entries:
            more = f", and {len(entries) - EXAMPLES} more" if len(entries) > EXAMPLES else ""
            found += f"{len(entries)} {what}: {', '.join(entries[:EXAMPLES])}{more}. "
    if found:
        raise CheckpointError(
            f"the weights of {source} do not fit the model ({type(module).__name__}, {len(own)} tensors; the file has "
            f"{len(tensors)}). {found}Give the options that the file was trained with (--sim_header, --linear_patch, "
            "--interaction, --cross_num_hidden_layers, --max_frames, --pretrained_clip_name) or another file."
        )
    module.load_state_dict(tensors, strict=True)


def save_checkpoint(
    path: str | Path, tensors: Mapping[str, Tensor], sidecar: dict, unlike_openai: Mapping[str, Any] | None = None
) -> None:
    """Write a plain state dict to `path` and `sidecar` to `<path>.json`; each is there whole or not at all.

    CLIP4Clip's own code can load the file. The sidecar must hold "activation"; for gelu, which CLIP4Clip does not have,
    a mark among the tensors says so, too, as the file may be copied without its sidecar; for the same reason one holds
    `unlike_openai`: of the encoder's spec, how its pictures are prepared, where that is not as OpenAI has it.
    """
    path = Path(path)
    if sidecar.get("activation") not in ACTIVATIONS:
        raise ValueError(f"sidecar['activation'] must be one of {ACTIVATIONS}, got {sidecar.get('activation')!r}")
    plain = {key: owned(value).cpu() for key, value in tensors.items()}
    text = json.dumps(sidecar, indent=2, sort_keys=True) + "\n"
    if sidecar["activation"] == "gelu":
        plain[GELU_MARK] = torch.ones((), dtype=torch.long)
    if unlike_openai:
        plain[SPEC_MARK] = torch.tensor(list(json.dumps(dict(unlike_openai)).encode()), dtype=torch.uint8)
    write_sidecar = partial(write_whole, Path(f"{path}.json"), lambda file: file.write(text.encode()))
    # The sidecar moves when the weights are whole, just before them: a full disk leaves the former pair as it was.
    write_whole(path, lambda file: torch.save(plain, file), before_move=write_sidecar)


def weight_file(path: str | Path) -> Path:
    """`path`, or the weight file under a usual name in it if it is a folder; CheckpointError if that holds none."""
    path = Path(path).expanduser()
    if not path.is_dir():
        return path
    for name in FOLDER_FILES:
        if (path / name).is_file():
            return path / name
    entries = sorted(path.iterdir())
    alike = [entry for entry in entries if entry.suffix in SUFFIXES and entry.is_file()]
    found = ", ".join(entry.name for entry in (alike or entries)[:8]) or "nothing"
    kind = "these look like weights" if alike else "it holds no file that looks like weights, but"
    remedy = f"Name the weight file itself; {kind}: {found}"
    raise CheckpointError(f"the folder {path} holds none of {', '.join(FOLDER_FILES)}. {remedy}")


def _activation(path: Path, raw: RawFile, named: NamedTensors, sidecar: dict | None) -> tuple[str | None, str]:
    """Which activation the file was trained with, and the reason in words, from the surest source to the weakest.

    Nothing in the weights shows it, and the wrong one costs points: None where nothing tells, never a silent guess.
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
        config_file = path.with_name("config.json" if named.naming == "hugging_face" else "open_clip_config.json")
        config = read_json(config_file)
        try:
            if config is not None:
                return _activation_in_config(config, config_file)
        except (AttributeError, TypeError, ZeroDivisionError) as error:
            raise CheckpointError(f"{config_file} describes no CLIP ({error}); repair it or remove it") from error
    return None, "nothing in the file or beside it tells"


def _activation_in_config(config: dict, path: Path) -> tuple[str, str]:
    """As above, from transformers' CLIPConfig (config.json) or open_clip's model_cfg; both leave out their defaults."""
    if path.name == "config.json":
        if config.get("model_type", "clip") != "clip":
            raise CheckpointError(f"{path} describes a {config['model_type']!r} model, not a CLIP")
        key, text, vision = "hidden_act", config.get("text_config") or {}, config.get("vision_config") or {}
        found = {part.get(key, "quick_gelu") for part in (text, vision)}
        text_head = text.get("hidden_size", 512) / text.get("num_attention_heads", 8)
    else:
        config = config.get("model_cfg") or config
        key, text, vision = "quick_gelu", config.get("text_cfg") or {}, config.get("vision_cfg") or {}
        found = {"quick_gelu" if config.get(key, False) else "gelu"}
        text_head = text.get("width", 512) / text.get("heads", 8)
        for part, option, usual in OPEN_CLIP_USUAL:
            if (config.get(part) or {}).get(option, usual) != usual:
                raise CheckpointError(f"{path}: {part}.{option} differs from OpenAI's towers, the only ones built here")
    if text_head != HEAD_WIDTH:
        raise CheckpointError(f"{path}: the text tower's heads are {text_head:g} wide; {HEAD_WIDTH} is built here")
    if len(found) > 1 or not found <= set(ACTIVATIONS):
        shown = " and ".join(sorted(map(str, found)))
        raise CheckpointError(f"{path}: {key} is {shown}; built here is quick_gelu in both towers or gelu in both")
    return found.pop(), f"{key} in {path.name}"
