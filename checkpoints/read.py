"""Weight files: read any known one, recognise it by its keys, take sizes from it, load it whole, save ours.

No module is built here: tensors go from dict to dict, under CLIP4Clip's names (see checkpoint_names.py).
"""

import json
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from checkpoints.activation import ACTIVATIONS, GELU_MARK, HEAD_WIDTH, find_activation, read_json
from checkpoints.files import CheckpointError, RawFile, describe_wrong_file, read_raw
from checkpoints.names import CLIP_PREFIX, NamedTensors, canonical_names, unwrap
from checkpoints.whole import write_whole

__all__ = [
    "ACTIVATIONS",
    "Checkpoint",
    "CheckpointError",
    "ClipSizes",
    "clip_sizes",
    "describe_wrong_file",
    "load_strict",
    "read_checkpoint",
    "save_checkpoint",
]

WIDEST_IMAGE_TOWER = 1024  # of ViT-L: the wider open_clip towers have other head widths
FOLDER_FILES = ("model.safetensors", "pytorch_model.bin", "open_clip_model.safetensors", "open_clip_pytorch_model.bin")
EXAMPLES = 4


@dataclass(frozen=True)
class Checkpoint:
    """A weight file, read. `tensors`: canonical name -> tensor on the CPU, float32 or integer.

    `kind` says what was recognised; `activation` is "quick_gelu", "gelu" or None when nothing tells, and
    `activation_reason` says why; `sidecar` is what `<file>.json` holds, or None.
    """

    path: Path
    tensors: dict[str, Tensor]
    kind: str
    activation: str | None
    activation_reason: str
    sidecar: dict | None

    @property
    def clip_tensors(self) -> dict[str, Tensor]:
        """The two towers and logit_scale, still under `clip.`"""
        return {key: value for key, value in self.tensors.items() if key.startswith(CLIP_PREFIX)}

    @property
    def head_tensors(self) -> dict[str, Tensor]:
        """Whatever is not CLIP."""
        return {key: value for key, value in self.tensors.items() if not key.startswith(CLIP_PREFIX)}


@dataclass(frozen=True)
class ClipSizes:
    """Shape of a ViT CLIP. `image_resolution` is the image side in pixels."""

    embed_dim: int
    image_resolution: int
    vision_layers: int
    vision_width: int
    patch_size: int
    context_length: int
    vocab_size: int
    text_width: int
    text_heads: int
    text_layers: int
    vision_heads: int


def read_checkpoint(path: str | Path) -> Checkpoint:
    """Read a CLIP or retrieval model from a file, or from a folder that holds one under its usual name.

    Known: OpenAI's TorchScript archives; state dicts of OpenAI, open_clip, CLIP4Clip and Hugging Face's CLIPModel, as
    .pt / .bin or .safetensors, also inside "state_dict", "model"... or behind "module.". Nothing in the file is run.
    CheckpointError for anything else, saying what it looks like and what to do.
    """
    path = weight_file(path)
    raw = read_raw(path)
    if isinstance(raw.content, Mapping) and {"optimizer", "progress", "options"} <= raw.content.keys():
        raise CheckpointError(
            f"{path} is the state of a training run: give it as --resume_model, or for weights the "
            "pytorch_model.bin beside it"
        )
    try:
        named = canonical_names(unwrap(raw.content))
    except CheckpointError as error:
        raise CheckpointError(f"{path} cannot be used: {error}") from error
    sidecar = read_sidecar(path)
    activation, reason = find_activation(path, raw, named, sidecar)
    return Checkpoint(path, named.tensors, _kind(raw, named), activation, reason, sidecar)


def read_sidecar(path: str | Path) -> dict | None:
    """What :func:`save_checkpoint` wrote beside a weight file, also if `path` is a link to it or the folder it is in.

    None where there is nothing; CheckpointError where it is not an object.
    """
    file = weight_file(path)
    beside = read_json(Path(f"{file}.json"))
    return beside if beside is not None or not file.is_symlink() else read_json(Path(f"{file.resolve()}.json"))


def clip_sizes(tensors: Mapping[str, Tensor]) -> ClipSizes:
    """Sizes of the CLIP in `tensors` (canonical names). CheckpointError if its shapes are not those of a ViT CLIP.

    Heads are not visible in the weights: OpenAI's models have one per 64 channels.
    """
    conv = _named(tensors, "visual.conv1.weight")
    if conv.ndim != 4 or conv.shape[2] != conv.shape[3]:
        raise CheckpointError(f"clip.visual.conv1.weight has shape {list(conv.shape)}: not square image patches")
    width, patch = conv.shape[0], conv.shape[-1]
    rows = _named(tensors, "visual.positional_embedding").shape[0] - 1
    side = math.isqrt(rows)
    if side * side != rows:
        raise CheckpointError(
            f"clip.visual.positional_embedding has {rows} patch positions, not a square number: only "
            "square images are supported"
        )
    text_width = _named(tensors, "ln_final.weight").shape[0]
    for tower, size in (("image", width), ("text", text_width)):
        if size % HEAD_WIDTH:
            raise CheckpointError(f"the {tower} tower is {size} wide, not a multiple of {HEAD_WIDTH} (one head)")
    if width > WIDEST_IMAGE_TOWER:
        raise CheckpointError(
            f"the image tower is {width} wide. Models wider than ViT-L ({WIDEST_IMAGE_TOWER}) have heads of other "
            f"widths than {HEAD_WIDTH}, which weights do not show, and are not built here."
        )
    return ClipSizes(
        embed_dim=_named(tensors, "text_projection").shape[1],
        image_resolution=patch * side,
        vision_layers=_count_blocks(tensors, "visual.transformer"),
        vision_width=width,
        patch_size=patch,
        context_length=_named(tensors, "positional_embedding").shape[0],
        vocab_size=_named(tensors, "token_embedding.weight").shape[0],
        text_width=text_width,
        text_heads=text_width // HEAD_WIDTH,
        text_layers=_count_blocks(tensors, "transformer"),
        vision_heads=width // HEAD_WIDTH,
    )


def load_strict(module: nn.Module, tensors: Mapping[str, Tensor], source: str) -> None:
    """Copy `tensors` into `module`; names and shapes must agree entirely, else CheckpointError and nothing is copied.

    `source` names the file in the message, best with its `kind`.
    """
    own = module.state_dict()
    missing = [key for key in own if key not in tensors]
    unexpected = [key for key in tensors if key not in own]
    different = [key for key in own if key in tensors and own[key].shape != tensors[key].shape]
    if missing or unexpected or different:
        parts = [
            _listing("missing in the file", [f"{key} {list(own[key].shape)}" for key in missing]),
            _listing("without a place in the model", [f"{key} {list(tensors[key].shape)}" for key in unexpected]),
            _listing(
                "of another shape",
                [f"{key}: file {list(tensors[key].shape)}, model {list(own[key].shape)}" for key in different],
            ),
        ]
        raise CheckpointError(
            f"the weights of {source} do not fit the model ({type(module).__name__}, {len(own)} tensors; the file has "
            f"{len(tensors)}). {' '.join(part for part in parts if part)} Give the options that the file was trained "
            "with (--sim_header, --linear_patch, --interaction, --cross_num_hidden_layers, --max_frames, "
            "--pretrained_clip_name) or another file."
        )
    module.load_state_dict(tensors, strict=True)


def save_checkpoint(path: str | Path, tensors: Mapping[str, Tensor], sidecar: dict) -> None:
    """Write a plain state dict to `path` and `sidecar` to `<path>.json`; each is there whole or not at all.

    CLIP4Clip's own code can load the file. The sidecar must hold "activation"; for gelu, which CLIP4Clip does not have,
    a mark among the tensors says so, too, lest the file be taken for quick_gelu when it is copied without its sidecar.
    """
    path = Path(path)
    if sidecar.get("activation") not in ACTIVATIONS:
        raise ValueError(f"sidecar['activation'] must be one of {ACTIVATIONS}, got {sidecar.get('activation')!r}")
    plain = {}
    for key, value in tensors.items():
        value = value.detach().cpu()
        whole = value.untyped_storage().nbytes() == value.numel() * value.element_size()
        plain[key] = value if whole else value.clone()  # torch.save would write all that a view's storage holds
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
    naming = {
        "openai": "state dict under OpenAI's names (OpenAI or open_clip)",
        "open_clip": "open_clip state dict (CustomTextCLIP)",
        "hugging_face": "Hugging Face CLIPModel",
    }[named.naming]
    if named.prefixed:
        return f"retrieval model of CLIP4Clip's kind{extra or ', no head tensors'}; CLIP as {naming}"
    return f"CLIP, {naming}{extra}"


def _named(tensors: Mapping[str, Tensor], key: str) -> Tensor:
    if CLIP_PREFIX + key not in tensors:
        raise CheckpointError(f"{CLIP_PREFIX}{key} is missing: this is not a whole ViT CLIP under canonical names")
    return tensors[CLIP_PREFIX + key]


def _count_blocks(tensors: Mapping[str, Tensor], tower: str) -> int:
    block = re.compile(re.escape(f"{CLIP_PREFIX}{tower}.resblocks.") + r"\d+\.attn\.in_proj_weight")
    return sum(block.fullmatch(key) is not None for key in tensors)


def _listing(what: str, entries: list[str]) -> str:
    if not entries:
        return ""
    more = f", and {len(entries) - EXAMPLES} more" if len(entries) > EXAMPLES else ""
    return f"{len(entries)} {what}: {', '.join(entries[:EXAMPLES])}{more}."
