"""From the tensor names that different programs write to one set of names: dict -> dict, nothing read or built.

Canonical names are those of CLIP4Clip's retrieval model: the encoder as `clip.` + OpenAI's names (where an encoder has
others, those), heads as they stand. A prefix is only ever removed at the front of a name.
"""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

from checkpoints.files import CheckpointError

CLIP_PREFIX = "clip."
WRAPPERS = ("state_dict", "model_state_dict", "model", "module")
PARALLEL_PREFIXES = ("module.", "_orig_mod.")  # of DistributedDataParallel and torch.compile
SAVE_WEIGHTS = "Save the weights alone: torch.save(model.state_dict(), file)."
OPTIMIZER_KEYS = ("optimizer_state_dict", "optimizer", "param_groups")
# Constants that some programs store beside the weights: the causal mask, and 0, 1, 2... No module here has them.
NOT_WEIGHTS = ("attn_mask", "position_ids", "gelu_activation")
OPENAI_INTEGERS = ("input_resolution", "context_length", "vocab_size")
ALWAYS_PRESENT = (
    "visual.class_embedding",
    "visual.positional_embedding",
    "visual.conv1.weight",
    "visual.ln_pre.weight",
    "visual.transformer.resblocks.0.attn.in_proj_weight",
    "visual.ln_post.weight",
    "visual.proj",
    "token_embedding.weight",
    "positional_embedding",
    "transformer.resblocks.0.attn.in_proj_weight",
    "ln_final.weight",
    "text_projection",
    "logit_scale",
)
REFUSED = {  # how a name begins -> what the file is
    ("visual.layer1.", "visual.attnpool."): "a CLIP with a ResNet image tower",
    ("visual.trunk.",): "an open_clip model with a timm image tower (SigLIP, EVA, ConvNeXt...)",
    ("text.transformer.embeddings.", "text.transformer.encoder."): "an open_clip model with a Hugging Face text tower",
}

HF_NAMES = {
    "logit_scale": "logit_scale",
    "text_model.embeddings.token_embedding.weight": "token_embedding.weight",
    "text_model.embeddings.position_embedding.weight": "positional_embedding",
    "text_model.final_layer_norm.weight": "ln_final.weight",
    "text_model.final_layer_norm.bias": "ln_final.bias",
    "vision_model.embeddings.class_embedding": "visual.class_embedding",
    "vision_model.embeddings.patch_embedding.weight": "visual.conv1.weight",
    "vision_model.embeddings.position_embedding.weight": "visual.positional_embedding",
    "vision_model.pre_layrnorm.weight": "visual.ln_pre.weight",  # spelled so by transformers
    "vision_model.pre_layrnorm.bias": "visual.ln_pre.bias",
    "vision_model.post_layernorm.weight": "visual.ln_post.weight",
    "vision_model.post_layernorm.bias": "visual.ln_post.bias",
}
HF_TRANSPOSED = {"text_projection.weight": "text_projection", "visual_projection.weight": "visual.proj"}
HF_BLOCK = re.compile(r"(vision|text)_model\.encoder\.layers\.(\d+)\.(.+)\.(weight|bias)")
HF_BLOCK_PARTS = {
    "self_attn.out_proj": "attn.out_proj",
    "layer_norm1": "ln_1",
    "layer_norm2": "ln_2",
    "mlp.fc1": "mlp.c_fc",
    "mlp.fc2": "mlp.c_proj",
}


@dataclass(frozen=True)
class NamedTensors:
    """`tensors`: float32 (or integer) under canonical names. `naming`: "openai", "open_clip" or "hugging_face".

    `prefixed`: the file itself had the `clip.` prefix. `has_integers`: it had OpenAI's three integer tensors.
    `encoder`: the name of the one of `encoders` that it holds; `activation`: the one of all such files.
    """

    tensors: dict[str, Tensor]
    naming: str
    prefixed: bool
    has_integers: bool
    encoder: str
    activation: str | None = None


class KnownEncoder(Protocol):
    """What tells the tensors of an encoder from a plain CLIP's; see modules/encoders/base.py."""

    name: str
    trained_with: str | None
    own_parts: tuple[str, ...]
    renamed: Mapping[str, str]


PLAIN_CLIP = "clip"


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
    inner = next((content[key] for key in WRAPPERS if isinstance(content.get(key), Mapping)), None)
    if inner is not None:
        return unwrap(inner)
    if any(key in content for key in OPTIMIZER_KEYS):
        raise CheckpointError(
            "it holds the state of an optimizer (as CLIP4Clip's pytorch_opt.bin.N does), not weights. The weights are "
            "in the pytorch_model.bin.N beside it."
        )
    tensors = {str(key): value for key, value in content.items() if isinstance(value, Tensor)}
    if not tensors or any(isinstance(value, Mapping) for value in content.values()):
        keys = ", ".join(map(str, list(content)[:6])) or "none"
        raise CheckpointError(f"no state dict was recognised in it; its first entries are: {keys}. {SAVE_WEIGHTS}")
    while prefix := next((p for p in PARALLEL_PREFIXES if all(key.startswith(p) for key in tensors)), None):
        tensors = {key.removeprefix(prefix): value for key, value in tensors.items()}
    return tensors


def canonical_names(tensors: Mapping[str, Tensor], encoders: Sequence[KnownEncoder] = ()) -> NamedTensors:
    """Recognise the naming of a state dict and rename it; `encoders` are those besides a plain CLIP that it may hold.

    CheckpointError says what an unusable one looks like.
    """
    prefixed = any(key.startswith(CLIP_PREFIX) for key in tensors)
    if prefixed:
        towers, heads = split_towers(tensors)
    else:
        towers, heads = dict(tensors), {}
    for starts, what in REFUSED.items():
        if any(key.startswith(starts) for key in towers):
            raise CheckpointError(f"it is {what}. Only CLIP's own ViT and text towers are built here.")
    has_integers = all(key in towers for key in OPENAI_INTEGERS)
    for key in OPENAI_INTEGERS:
        towers.pop(key, None)  # sizes, not weights: no module has a place for them
    towers = {key: value for key, value in towers.items() if key.rpartition(".")[2] not in NOT_WEIGHTS}
    naming = "openai"
    if any(key.startswith(("vision_model.", "text_model.")) for key in towers):
        naming, towers = "hugging_face", _from_hugging_face(towers)
    elif any(key.startswith("text.") for key in towers):
        naming, towers = "open_clip", {key.removeprefix("text."): value for key, value in towers.items()}
    encoder = next((e for e in encoders if _belongs_to(towers, e)), None)
    renamed = encoder.renamed if encoder else {}
    missing = [key for key in ALWAYS_PRESENT if key not in towers and renamed.get(key, key) not in towers]
    if len(missing) > len(ALWAYS_PRESENT) // 2:
        raise CheckpointError(
            f"it holds {len(tensors)} tensors of something other than a CLIP model (such as "
            f"{', '.join(list(tensors)[:4])}). Give CLIP weights of OpenAI, open_clip, Hugging Face or CLIP4Clip."
        )
    if missing:
        raise CheckpointError(
            f"it is a CLIP model without {', '.join(missing)}: a part of one, or another variant. A whole CLIP with "
            "image and text tower is needed."
        )
    if not prefixed:
        # Whatever is neither a known tower's nor OpenAI's stands as it is: strict loading names it.
        own = tuple(part for e in encoders for part in (*e.own_parts, *e.renamed.values()))
        starts = ("visual.", "transformer.resblocks.", "ln_final.", *own)
        heads = {k: towers.pop(k) for k in list(towers) if not k.startswith(starts) and k not in ALWAYS_PRESENT}
    canonical = {CLIP_PREFIX + key: value for key, value in towers.items()} | heads
    plain = {k: owned(v.float() if v.is_floating_point() else v) for k, v in canonical.items()}
    name, activation = (encoder.name, encoder.trained_with) if encoder else (PLAIN_CLIP, None)
    return NamedTensors(plain, naming, prefixed, has_integers, name, activation)


def _belongs_to(towers: Mapping[str, Tensor], encoder: KnownEncoder) -> bool:
    return any(key.startswith(encoder.own_parts) or key in encoder.renamed.values() for key in towers)


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
        block = HF_BLOCK.fullmatch(key)
        if key in HF_TRANSPOSED:
            renamed[HF_TRANSPOSED[key]] = value.T
        elif block:
            tower, number, part, kind = block.groups()
            front = f"{'visual.' if tower == 'vision' else ''}transformer.resblocks.{number}."
            if part in ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"):
                stacks.setdefault(f"{front}attn.in_proj_{kind}", {})[part[-6]] = value
            else:
                renamed[f"{front}{HF_BLOCK_PARTS.get(part, part)}.{kind}"] = value
        else:
            renamed[HF_NAMES.get(key, key)] = value
    for key, parts in stacks.items():
        if set(parts) != set("qkv"):
            raise CheckpointError(
                f"it is a Hugging Face CLIP that lacks {sorted(set('qkv') - set(parts))} of {key}: "
                "the file is incomplete. Fetch it again."
            )
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
        raise CheckpointError(
            f"--mergeclip needs a CLIP of the same size as the file of --pretrained_path; {len(different)} tensors "
            f"differ: {', '.join(different[:4])}"
        )
    return {**upstream, **{key: weight * theirs[key] + (1 - weight) * value for key, value in ours.items()}}
