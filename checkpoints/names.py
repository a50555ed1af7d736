"""From the tensor names that different programs write to one set of names: dict -> dict, nothing read or built.

Canonical names are those of CLIP4Clip's retrieval model: the CLIP towers as `clip.` + OpenAI's names (InternVideo's
where its video tower is), heads as they stand. A prefix is only ever removed at the front of a name.
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from checkpoints.files import CheckpointError

CLIP_PREFIX = "clip."
WRAPPERS = ("state_dict", "model_state_dict", "model", "module")
PARALLEL_PREFIXES = ("module.", "_orig_mod.")  # of DistributedDataParallel and torch.compile
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
# What InternVideo's video tower has and no plain CLIP: it starts at initial values when a plain CLIP starts the tower.
VIDEO_TOWER_PARTS = (
    "visual.transformer.temporal_cls_token",
    "visual.transformer.balance",
    "visual.transformer.dpe.",
    "visual.transformer.dec.",
    "text_mask_embedding",
)
VIDEO_TOWER_NAMES = {  # CLIP's name -> InternVideo's
    "visual.proj": "visual_proj",
    "visual.ln_post.weight": "visual_ln_post.weight",
    "visual.ln_post.bias": "visual_ln_post.bias",
}
REFUSED = {  # a key, or the start of keys if it ends with a dot -> what the file is
    "visual.layer1.": "resnet",
    "visual.attnpool.": "resnet",
    "visual.trunk.": "timm",
    "text.transformer.embeddings.": "hf_text",
    "text.transformer.encoder.": "hf_text",
}
REFUSALS = {
    "resnet": "it is a CLIP with a ResNet image tower. Only ViT towers are built here: ViT-B/32, ViT-B/16 or ViT-L/14.",
    "timm": "it is an open_clip model with a timm image tower (SigLIP, EVA, ConvNeXt...). Only CLIP's own ViT towers "
    "are built here.",
    "hf_text": "it is an open_clip model with a Hugging Face text tower. Only CLIP's own text tower is built here.",
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
    `video_tower`: it holds InternVideo's video tower (`--clip_evl`), with 5-D patch weights, instead of an image tower.
    """

    tensors: dict[str, Tensor]
    naming: str
    prefixed: bool
    has_integers: bool
    video_tower: bool


def unwrap(content: Any) -> dict[str, Tensor]:
    """The state dict inside what torch.save wrote. CheckpointError for optimizer states and for no tensors at all."""
    found = content
    while isinstance(found, Mapping):
        inner = next((found[key] for key in WRAPPERS if isinstance(found.get(key), Mapping)), None)
        if inner is None:
            break
        found = inner
    if not isinstance(found, Mapping):
        raise CheckpointError(
            f"it holds a {type(found).__name__} where named tensors are expected. Save a model's weights with "
            "torch.save(model.state_dict(), file)."
        )
    if any(key in found for key in OPTIMIZER_KEYS):
        raise CheckpointError(
            "it holds the state of an optimizer (as CLIP4Clip's pytorch_opt.bin.N does), not weights. The weights are "
            "in the pytorch_model.bin.N beside it."
        )
    tensors = {str(key): value for key, value in found.items() if isinstance(value, Tensor)}
    others = [str(key) for key, value in found.items() if isinstance(value, Mapping)]
    if not tensors or others:
        keys = ", ".join(map(str, list(found)[:6]))
        raise CheckpointError(
            f"no state dict was recognised in it; its first entries are: {keys or 'none'}. Save the "
            "weights alone: torch.save(model.state_dict(), file)."
        )
    return _without_parallel_prefixes(tensors)


def canonical_names(tensors: Mapping[str, Tensor]) -> NamedTensors:
    """Recognise the naming of a state dict and rename it. CheckpointError says what an unusable one looks like."""
    prefixed = any(key.startswith(CLIP_PREFIX) for key in tensors)
    if prefixed:
        towers = {key[len(CLIP_PREFIX) :]: value for key, value in tensors.items() if key.startswith(CLIP_PREFIX)}
        heads = {key: value for key, value in tensors.items() if not key.startswith(CLIP_PREFIX)}
    else:
        towers, heads = dict(tensors), {}
    for start, reason in REFUSED.items():
        if start in towers or (start.endswith(".") and any(key.startswith(start) for key in towers)):
            raise CheckpointError(REFUSALS[reason])
    has_integers = all(key in towers for key in OPENAI_INTEGERS)
    for key in OPENAI_INTEGERS:
        towers.pop(key, None)  # sizes, not weights: no module has a place for them
    towers = {key: value for key, value in towers.items() if key.rpartition(".")[2] not in NOT_WEIGHTS}
    naming = "openai"
    if any(key.startswith(("vision_model.", "text_model.")) for key in towers):
        naming, towers = "hugging_face", _from_hugging_face(towers)
    elif any(key.startswith("text.") for key in towers):
        naming, towers = "open_clip", {_without_front(key, "text."): value for key, value in towers.items()}
    video = is_video_tower(towers)
    if video:
        towers = video_tower_names(towers)
    wanted = [VIDEO_TOWER_NAMES.get(key, key) for key in ALWAYS_PRESENT] if video else ALWAYS_PRESENT
    missing = [key for key in wanted if key not in towers]
    if missing:
        raise CheckpointError(_not_clip(tensors, missing))
    if not prefixed:
        # Whatever is neither a known tower's nor OpenAI's stands as it is: strict loading names it.
        heads = {key: towers.pop(key) for key in list(towers) if not _is_tower_key(key)}
    renamed = {CLIP_PREFIX + key: value for key, value in towers.items()} | heads
    return NamedTensors({key: _plain(value) for key, value in renamed.items()}, naming, prefixed, has_integers, video)


def is_video_tower(towers: Mapping[str, Tensor]) -> bool:
    """Whether the names (without `clip.`) or the patch weights are those of InternVideo's video tower."""
    patches = towers.get("visual.conv1.weight")
    return (
        any(key.startswith(VIDEO_TOWER_PARTS) or key in VIDEO_TOWER_NAMES.values() for key in towers)
        or patches is not None
        and patches.ndim == 5
    )


def video_tower_names(towers: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Tensors of a CLIP or a video tower, names without `clip.`, under InternVideo's: patches [width, 3, 1, p, p]."""
    renamed = dict(towers)
    for plain, video in VIDEO_TOWER_NAMES.items():
        if plain in renamed and video not in renamed:
            renamed[video] = renamed.pop(plain)
    patches = renamed.get("visual.conv1.weight")
    if patches is not None and patches.ndim == 4:
        renamed["visual.conv1.weight"] = patches.unsqueeze(2)
    return renamed


def _is_tower_key(key: str) -> bool:
    starts = ("visual.", "transformer.resblocks.", "ln_final.", "visual_ln_post.", "visual_proj", *VIDEO_TOWER_PARTS)
    return key.startswith(starts) or key in ALWAYS_PRESENT


def _plain(tensor: Tensor) -> Tensor:
    """float32 where it is floating point; memory of its own, so that a view does not keep a larger storage alive."""
    tensor = tensor.detach()
    if tensor.is_floating_point():
        tensor = tensor.to(torch.float32)
    owns_all = tensor.untyped_storage().nbytes() == tensor.numel() * tensor.element_size()
    return tensor if owns_all and tensor.is_contiguous() else tensor.clone(memory_format=torch.contiguous_format)


def _without_front(key: str, prefix: str) -> str:
    return key[len(prefix) :] if key.startswith(prefix) else key


def _without_parallel_prefixes(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    while True:
        prefix = next((p for p in PARALLEL_PREFIXES if all(key.startswith(p) for key in tensors)), None)
        if prefix is None:
            return tensors
        tensors = {key[len(prefix) :]: value for key, value in tensors.items()}


def _from_hugging_face(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """transformers' CLIPModel names to OpenAI's: projections transposed, q, k and v stacked in this order."""
    renamed: dict[str, Tensor] = {}
    stacks: dict[str, dict[str, Tensor]] = {}
    for key, value in tensors.items():
        block = HF_BLOCK.fullmatch(key)
        if key in HF_NAMES:
            renamed[HF_NAMES[key]] = value
        elif key in HF_TRANSPOSED:
            renamed[HF_TRANSPOSED[key]] = value.T
        elif block:
            tower, number, part, kind = block.groups()
            front = f"{'visual.' if tower == 'vision' else ''}transformer.resblocks.{number}."
            if part in HF_BLOCK_PARTS:
                renamed[f"{front}{HF_BLOCK_PARTS[part]}.{kind}"] = value
            elif part in ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"):
                stacks.setdefault(f"{front}attn.in_proj_{kind}", {})[part[-6]] = value
            else:
                renamed[key] = value
        else:
            renamed[key] = value
    for key, parts in stacks.items():
        if set(parts) != set("qkv"):
            raise CheckpointError(
                f"it is a Hugging Face CLIP that lacks {sorted(set('qkv') - set(parts))} of {key}: "
                "the file is incomplete. Fetch it again."
            )
        renamed[key] = torch.cat([parts[letter] for letter in "qkv"])
    return renamed


def _not_clip(tensors: Mapping[str, Tensor], missing: list[str]) -> str:
    examples = ", ".join(list(tensors)[:4])
    if len(missing) > len(ALWAYS_PRESENT) // 2:
        return (
            f"it holds {len(tensors)} tensors of something other than a CLIP model (such as {examples}). Give CLIP "
            "weights of OpenAI, open_clip, Hugging Face or CLIP4Clip."
        )
    return (
        f"it is a CLIP model without {', '.join(missing)}: a part of one, or another variant. A whole CLIP with "
        "image and text tower is needed."
    )
