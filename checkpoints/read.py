"""Weight files: read any known one, recognise it by its keys, take sizes from it, load it whole, save ours.

No module is built here: tensors go from dict to dict, under CLIP4Clip's names (see names.py).
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from checkpoints.activation import ACTIVATIONS, GELU_MARK, find_activation, read_json
from checkpoints.files import CheckpointError, RawFile, read_raw
from checkpoints.names import CLIP_PREFIX, KnownEncoder, NamedTensors, canonical_names, owned, unwrap
from checkpoints.whole import write_whole

FOLDER_FILES = ("model.safetensors", "pytorch_model.bin", "open_clip_model.safetensors", "open_clip_pytorch_model.bin")
EXAMPLES = 4
NAMINGS = {
    "openai": "state dict under OpenAI's names (OpenAI or open_clip)",
    "open_clip": "open_clip state dict (CustomTextCLIP)",
    "hugging_face": "Hugging Face CLIPModel",
}


@dataclass(frozen=True)
class Checkpoint:
    """A weight file, read. `tensors`: canonical name -> tensor on the CPU, float32 or integer.

    `kind` says what was recognised; `activation` is "quick_gelu", "gelu" or None when nothing tells, and
    `activation_reason` says why; `sidecar` is what `<file>.json` holds, or None.
    `encoder` is the name of the encoder that the file holds.
    """

    path: Path
    tensors: dict[str, Tensor]
    kind: str
    activation: str | None
    activation_reason: str
    sidecar: dict | None
    encoder: str


def read_checkpoint(path: str | Path, encoders: Sequence[KnownEncoder] = ()) -> Checkpoint:
    """Read a CLIP or retrieval model from a file, or from a folder that holds one under its usual name.

    Known: OpenAI's TorchScript archives; state dicts of OpenAI, open_clip, CLIP4Clip and Hugging Face's CLIPModel, as
    .pt / .bin or .safetensors, also inside "state_dict", "model"... or behind "module."; and of each of `encoders`.
    Nothing in the file is run. CheckpointError for anything else, saying what it looks like and what to do.
    """
    path = weight_file(path)
    raw = read_raw(path)
    if isinstance(raw.content, Mapping) and {"optimizer", "progress", "options"} <= raw.content.keys():
        raise CheckpointError(
            f"{path} is the state of a training run: give it as --resume_model, or for weights the "
            "pytorch_model.bin beside it"
        )
    try:
        named = canonical_names(unwrap(raw.content), encoders)
    except CheckpointError as error:
        raise CheckpointError(f"{path} cannot be used: {error}") from error
    sidecar = read_sidecar(path)
    activation, reason = find_activation(path, raw, named, sidecar)
    return Checkpoint(path, named.tensors, _kind(raw, named), activation, reason, sidecar, named.encoder)


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
    problems = {
        "missing in the file": [f"{key} {shape}" for key, shape in own.items() if key not in given],
        "without a place in the model": [f"{key} {shape}" for key, shape in given.items() if key not in own],
        "of another shape": [
            f"{key}: file {given[key]}, model {shape}" for key, shape in own.items() if given.get(key, shape) != shape
        ],
    }
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


def save_checkpoint(path: str | Path, tensors: Mapping[str, Tensor], sidecar: dict) -> None:
    """Write a plain state dict to `path` and `sidecar` to `<path>.json`; each is there whole or not at all.

    CLIP4Clip's own code can load the file. The sidecar must hold "activation"; for gelu, which CLIP4Clip does not have,
    a mark among the tensors says so, too, as the file may be copied without its sidecar.
    """
    path = Path(path)
    if sidecar.get("activation") not in ACTIVATIONS:
        raise ValueError(f"sidecar['activation'] must be one of {ACTIVATIONS}, got {sidecar.get('activation')!r}")
    plain = {key: owned(value).cpu() for key, value in tensors.items()}
    text = json.dumps(sidecar, indent=2, sort_keys=True) + "\n"
    if sidecar["activation"] == "gelu":
        plain[GELU_MARK] = torch.ones((), dtype=torch.long)

    def write_sidecar() -> None:
        write_whole(Path(f"{path}.json"), lambda file: file.write(text.encode()))

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
    found = ", ".join(sorted(entry.name for entry in path.iterdir())[:8]) or "nothing"
    raise CheckpointError(
        f"the folder {path} holds none of {', '.join(FOLDER_FILES)}. Name the weight file itself; "
        f"the folder holds: {found}"
    )


def _kind(raw: RawFile, named: NamedTensors) -> str:
    n_heads = sum(not key.startswith(CLIP_PREFIX) for key in named.tensors)
    extra = f", {n_heads} tensors of heads" if n_heads else ""
    if raw.container == "torchscript":
        return f"TorchScript archive of a CLIP, as OpenAI releases them{extra}"
    return f"{'retrieval model with a CLIP' if named.prefixed else 'CLIP'}, {NAMINGS[named.naming]}{extra}"
