"""From the tensor names that different programs write to one set of names: dict -> dict, nothing read or built.

Canonical names are those of CLIP4Clip's retrieval model: the encoder as `clip.` + OpenAI's names (where an encoder has
others, those), heads as they stand. A prefix is only ever removed at the front of a name.
"""

import re
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from checkpoints.files import CheckpointError

CLIP_PREFIX = "clip."
WRAPPERS = ("state_dict", "model_state_dict", "model", "module")
# Of DistributedDataParallel, torch.compile, and of Lightning modules, which keep the network as an attribute.
OUTER_PREFIXES = ("module.", "_orig_mod.", "model.", "net.")
SAVE_WEIGHTS = "Save the weights alone: torch.save(model.state_dict(), file)."
OPTIMIZER_KEYS = ("optimizer_state_dict", "optimizer", "param_groups")
# Among the tensors of our own files, where they were trained otherwise than OpenAI's: see save_checkpoint.
GELU_MARK, SPEC_MARK = "clip.gelu_activation", "clip.image_spec"
# Constants that some programs store beside the weights: the causal mask, 0, 1, 2..., sizes. No module here has them.
NOT_WEIGHTS = {"attn_mask", "position_ids", GELU_MARK.removeprefix("clip."), SPEC_MARK.removeprefix("clip.")}
OPENAI_INTEGERS = {"input_resolution", "context_length", "vocab_size"}
IN_BOTH_TOWERS = ("positional_embedding", "transformer.resblocks.0.attn.in_proj_weight")
ONLY_IN_IMAGE_TOWER = ("class_embedding", "conv1.weight", "ln_pre.weight", "ln_post.weight", "proj")
ALWAYS_PRESENT = tuple(f"visual.{part}" for part in (*ONLY_IN_IMAGE_TOWER, *IN_BOTH_TOWERS))
ALWAYS_PRESENT += (*IN_BOTH_TOWERS, "token_embedding.weight", "ln_final.weight", "text_projection", "logit_scale")
REFUSED = {  # how a name begins -> what the file is
    ("visual.layer1.", "visual.attnpool."): "a CLIP with a ResNet image tower",
    ("visual.trunk.",): "an open_clip model with a timm image tower (SigLIP, EVA, ConvNeXt...)",
    ("text.transformer.embeddings.", "text.transformer.encoder."): "an open_clip model with a Hugging Face text tower",
    (
        "logit_bias",
    ): "a CLIP trained with another loss, SigLIP's pairwise sigmoid, which adds its logit_bias to each pair",
}
CLIP_STARTS = (CLIP_PREFIX, "visual.", "text.", "vision_model.", "text_model.")

HF_TRANSPOSED = {"text_projection.weight": "text_projection", "visual_projection.weight": "visual.proj"}
HF_PARTS = {  # what stands in a name of transformers -> in OpenAI's
    "text_model.": "",
    "vision_model.": "visual.",
    "embeddings.position_embedding.weight": "positional_embedding",
    "embeddings.class_embedding": "class_embedding",
    "embeddings.patch_embedding": "conv1",
    "embeddings.token_embedding": "token_embedding",
    "pre_layrnorm": "ln_pre",  # spelled so by transformers
    "post_layernorm": "ln_post",
    "final_layer_norm": "ln_final",
    "encoder.layers.": "transformer.resblocks.",
    "self_attn.": "attn.",
    "layer_norm": "ln_",
    "mlp.fc1": "mlp.c_fc",
    "mlp.fc2": "mlp.c_proj",
}
HF_QKV = re.compile(r"(.+\.attn)\.([qkv])_proj\.(weight|bias)")
LAYER_SCALE = re.compile(r"\.(?:ls_?\d|layer_?scale\w*)(?:\.|$)")
PLAIN_CLIP = "clip"
# LongCLIP has two tables: of the first one it reads the first positions, of the second the others.
LONG_TABLE, KEPT_POSITIONS = "positional_embedding_res", 20


class NamedTensors(NamedTuple):
    tensors: dict[str, Tensor]  # float32 (or integer) under canonical names
    naming: str  # "openai", "open_clip" or "hugging_face"; an encoder's name for names of its own
    prefixed: bool  # the file itself had the `clip.` prefix
    has_integers: bool  # it had OpenAI's three integer tensors
    encoder: str  # the name of the encoder that it holds
    activation: str | None  # of all files with that encoder's tensors


def parameter_name(name: str) -> str:
    """A parameter's name in checkpoints: heads and losses are stored without what the module tree puts in front."""
    return name.removeprefix("head.").removeprefix("temporal.").removeprefix("criterion.")


def split_towers(tensors: Mapping[str, Tensor]) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Canonical names -> (the encoder's tensors without `clip.`, the rest)."""
    towers = {key.removeprefix(CLIP_PREFIX): v for key, v in tensors.items() if key.startswith(CLIP_PREFIX)}
    return towers, {key: value for key, value in tensors.items() if not key.startswith(CLIP_PREFIX)}


def unwrap(content: Any) -> dict[str, Tensor]:
    """The state dict inside what torch.save wrote. CheckpointError for optimizer states and for no tensors at all."""
    if not isinstance(content, Mapping):
        raise CheckpointError(f"it holds a {type(content).__name__} where named tensors are expected. {SAVE_WEIGHTS}")
    if (inner := next((content[key] for key in WRAPPERS if isinstance(content.get(key), Mapping)), None)) is not None:
        return unwrap(inner)
    if any(key in content for key in OPTIMIZER_KEYS):
        what = "the state of an optimizer (as CLIP4Clip's pytorch_opt.bin.N does), not weights"
        raise CheckpointError(f"it holds {what}. The weights are in the pytorch_model.bin.N beside it.")
    tensors = {str(key): value for key, value in content.items() if isinstance(value, Tensor)}
    if not tensors or any(isinstance(value, Mapping) for value in content.values()):
        keys = ", ".join(map(str, list(content)[:6])) or "none"
        raise CheckpointError(f"no state dict was recognised in it; its first entries are: {keys}. {SAVE_WEIGHTS}")
    while prefix := next((p for p in OUTER_PREFIXES if _is_around(p, tensors)), None):
        tensors = {key.removeprefix(prefix): value for key, value in tensors.items()}
    return tensors


def _is_around(prefix: str, tensors: Mapping[str, Tensor]) -> bool:
    """Whether `prefix` stands before all names, or, beside parts of a training program, before those of a CLIP."""
    inner = {key.removeprefix(prefix) for key in tensors if key.startswith(prefix)}
    if len(inner) == len(tensors):
        return True
    return inner.isdisjoint(tensors) and any(name.startswith((*CLIP_STARTS, *OUTER_PREFIXES)) for name in inner)


def canonical_names(
    tensors: Mapping[str, Tensor], encoders: Sequence[Any] = (), held: str | None = None
) -> NamedTensors:
    """Recognise the naming of a state dict and rename it.

    encoders: what it may hold besides a plain CLIP, told by `own_parts` and `renamed`. CheckpointError for the rest.
    held: which of them it holds, where something beside the file says so; one with ``own_names`` keeps its names.
    """
    prefixed = any(key.startswith(CLIP_PREFIX) for key in tensors)
    towers, heads = split_towers(tensors) if prefixed else (tensors, {})
    if any(known.name == held and known.own_names for known in encoders):
        return NamedTensors(_canonical(_weights(towers), _weights(heads)), held, prefixed, False, held, None)
    for starts, what in REFUSED.items():
        if any(key.startswith(starts) for key in towers):
            raise CheckpointError(f"it is {what}. Only CLIP's own ViT and text towers are built here.")
    if scaled := [key for key in towers if LAYER_SCALE.search(key)]:
        what = f"a CLIP with LayerScale, {len(scaled)} factors such as {min(scaled)}, which OpenAI's towers do not have"
        raise CheckpointError(f"it is {what}. Only CLIP's own ViT and text towers are built here.")
    has_integers = towers.keys() >= OPENAI_INTEGERS
    towers = _weights(towers)
    naming = "openai"
    if any(key.startswith(("vision_model.", "text_model.")) for key in towers):
        naming, towers = "hugging_face", _from_hugging_face(towers)
    elif any(key.startswith("text.") for key in towers):
        naming, towers = "open_clip", {key.removeprefix("text."): value for key, value in towers.items()}
    encoder, renamed, activation = PLAIN_CLIP, {}, None
    for known in encoders:
        if any(key.startswith(known.own_parts) or key in known.renamed.values() for key in towers):
            encoder, renamed, activation = known.name, known.renamed, known.trained_with
            break
    if LONG_TABLE in towers:
        rest = towers.pop(LONG_TABLE)[KEPT_POSITIONS:]
        towers["positional_embedding"] = torch.cat([towers["positional_embedding"][:KEPT_POSITIONS], rest])
    missing = [key for key in ALWAYS_PRESENT if key not in towers and renamed.get(key, key) not in towers]
    if len(missing) > len(ALWAYS_PRESENT) // 2:
        what = f"{len(tensors)} tensors of something other than a CLIP model (such as {', '.join(list(tensors)[:4])})"
        raise CheckpointError(f"it holds {what}. Give CLIP weights of OpenAI, open_clip, Hugging Face or CLIP4Clip.")
    if missing:
        what = f"a CLIP model without {', '.join(missing)}: a part of one, or another variant"
        raise CheckpointError(f"it is {what}. A whole CLIP with image and text tower is needed.")
    if not prefixed:
        # Whatever is neither a known tower's nor OpenAI's stands as it is: strict loading names it.
        own = tuple(part for known in encoders for part in (*known.own_parts, *known.renamed.values()))
        starts = ("visual.", "transformer.resblocks.", "ln_final.", *own)
        heads = {k: towers.pop(k) for k in list(towers) if not k.startswith(starts) and k not in ALWAYS_PRESENT}
    return NamedTensors(_canonical(towers, heads), naming, prefixed, has_integers, encoder, activation)


def _weights(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {k: v for k, v in tensors.items() if k.rpartition(".")[2] not in OPENAI_INTEGERS | NOT_WEIGHTS}


def _canonical(towers: Mapping[str, Tensor], heads: Mapping[str, Tensor]) -> dict[str, Tensor]:
    named = {**{CLIP_PREFIX + key: value for key, value in towers.items()}, **heads}
    return {k: owned(v.float() if v.is_floating_point() else v) for k, v in named.items()}


def owned(tensor: Tensor) -> Tensor:
    """`tensor`, detached, with contiguous memory of its own: a view would keep alive, and save, all it is a view of."""
    tensor = tensor.detach()
    owns_all = tensor.untyped_storage().nbytes() == tensor.numel() * tensor.element_size()
    return tensor if owns_all and tensor.is_contiguous() else tensor.clone(memory_format=torch.contiguous_format)


def _from_hugging_face(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """transformers' CLIPModel names to OpenAI's: projections transposed, q, k and v stacked in this order."""
    renamed: dict[str, Tensor] = {}
    stacks: dict[str, dict[str, Tensor]] = {}
    for key, value in tensors.items():
        if key in HF_TRANSPOSED:
            renamed[HF_TRANSPOSED[key]] = value.T
            continue
        for theirs, ours in HF_PARTS.items():
            key = key.replace(theirs, ours)
        if part := HF_QKV.fullmatch(key):
            stacks.setdefault(f"{part[1]}.in_proj_{part[3]}", {})[part[2]] = value
        else:
            renamed[key] = value
    for key, parts in stacks.items():
        if lacking := sorted(set("qkv") - set(parts)):
            raise CheckpointError(f"it is a Hugging Face CLIP that lacks {lacking} of {key}. Fetch it again.")
        renamed[key] = torch.cat([parts[letter] for letter in "qkv"])
    return renamed


def merge(
    upstream: Mapping[str, Tensor], clip: Mapping[str, Tensor], weight: float, kept: tuple[str, ...] = ()
) -> dict[str, Tensor]:
    """`--mergeclip`, `--mergeweight`: ``weight * clip + (1 - weight) * upstream`` for every tensor that both have.

    Both under the same encoder's names, without ``clip.``. The logit scale is averaged as it is stored, in log space.
    What begins with one of `kept` stays `upstream`'s. CheckpointError if the two differ in size.
    """
    theirs, ours = ({k: v for k, v in side.items() if not k.startswith(kept)} for side in (clip, upstream))
    different = [
        f"clip.{key} {list(value.shape)} and {list(theirs[key].shape)}"
        for key, value in ours.items()
        if key in theirs and value.shape != theirs[key].shape
    ]
    different += [f"clip.{key} only in the file of --pretrained_path" for key in ours if key not in theirs]
    different += [f"clip.{key} only in the CLIP" for key in theirs if key not in ours]
    if different:
        found = f"{len(different)} tensors differ: {', '.join(different[:4])}"
        raise CheckpointError(f"--mergeclip needs a CLIP of the same size as the file of --pretrained_path; {found}")
    return {**upstream, **{key: weight * theirs[key] + (1 - weight) * value for key, value in ours.items()}}
