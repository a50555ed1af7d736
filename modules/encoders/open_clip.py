"""open_clip: any model of the library open_clip_torch (Ilharco et al., doi 10.5281/zenodo.5143773).

Towers, tokenizer, context length and the format of pictures come from its configuration. The library is an extra: it is
imported when this encoder is used. Parameters carry its names for a model with a text tower of its own.
"""

import difflib
import json
import re
from collections.abc import Callable, Mapping, Sequence
from copy import deepcopy
from dataclasses import asdict, dataclass, replace
from functools import cached_property
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from modules.encoders.base import RIGHT, Conventions, Encoder, ImageInput, ShapeOptions, Sizes, register
from modules.encoders.clip import stretched
from plugins import flag

INSTALL = "pip install -r requirements-open_clip.txt"
CONFIG = "open_clip_config.json"
TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", "spiece.model")
# A block in the names of open_clip's, timm's and Hugging Face's towers.
BLOCK = re.compile(r"(?:(?:stages|layers)\.\d+\.)?(?:blocks|resblocks|layers?|block)\.\d+\.|layer\d\.\d+\.")
AFTER = re.compile(r"(?:proj|text_projection)(?:\.|$)")  # stands before the blocks among the names, works after them
WITHIN_REACH = ("argmax", "eos", "first")  # pooling of a text that does not look at what comes after its end


@dataclass(frozen=True)
class OpenClipSizes:
    """A model of open_clip: its configuration, and where it differs from that."""

    name: str
    model_cfg: dict[str, Any]
    preprocess_cfg: dict[str, Any]
    tokenizer: str | None = None  # a folder or a name for Hugging Face's tokenizers; None: CLIP's own
    image_size: int | None = None
    context_length: int | None = None


@dataclass(frozen=True)
class OpenClipOptions(ShapeOptions):
    open_clip_weights: str | None = flag(
        None,
        "weights for the model of --pretrained_clip_name: a tag of open_clip's list, or a file",
        type=str,
        on_resume="free",
    )
    open_clip_tokenizer: Path | None = flag(
        None, "folder with the files of the tokenizer, where they cannot be fetched by name", type=Path
    )


@dataclass(frozen=True)
class OpenClipTokenizer:
    """A tokenizer of open_clip's as this project calls them. `padding`: the id that fills a row up."""

    tokenizer: Any
    padding: int
    whole_rows: int | None = None  # rows end with a class token: they are always so long

    def __call__(self, captions: Sequence[str], max_words: int) -> tuple[Tensor, Tensor]:
        """Captions -> ids int64 [N, max_words], mask bool [N, max_words], True at every token that is no padding."""
        ids = self.tokenizer(list(captions), context_length=self.whole_rows or max_words)
        if self.whole_rows:
            return ids, torch.ones_like(ids, dtype=torch.bool)
        if not hasattr(self.tokenizer, "tokenizer"):  # CLIP's own, in which "!" has the id of the padding
            last = ids.argmax(dim=1)
        else:
            places = torch.arange(ids.shape[1])
            last = (places * (ids != self.padding)).amax(dim=1)
            if self.tokenizer.tokenizer.eos_token_id == self.padding:  # the first of them is the end of the text
                last = last + (ids[:, 0] != self.padding).long()
        return ids, torch.arange(ids.shape[1]) <= last[:, None]


@register("open_clip")
class OpenClip(Encoder):
    """Features of a frame are those of the library's ``encode_image``, of a text those of ``encode_text``."""

    Options = OpenClipOptions
    title = "a model of open_clip"
    own_names = True

    def __init__(
        self, sizes: OpenClipSizes, activation: str, options: Any = None, conventions: Conventions = RIGHT
    ) -> None:
        self.check_installed()
        self.image = picture_of(sizes)
        super().__init__(sizes, activation, options or OpenClipOptions(), conventions)
        net = built(sizes, sizes.image_size, sizes.context_length)
        self.visual, self.text, self.logit_scale = net.visual, net.text, net.logit_scale
        self.visual.output_tokens, self.text.output_tokens = False, True
        if net.logit_bias is not None:
            self.logit_bias = net.logit_bias
            self.largest_scale = float("inf")  # SigLIP's is not bounded
        self.by_transformers = hasattr(self.text, "pooler")
        if self.by_transformers:
            self.no_tokens = "this text tower makes one feature of a text: what projects it follows the pooling"
        # Whether what follows the end of a text cannot change its feature, so that rows may be cut there.
        causal = getattr(self.text, "attn_mask", None) is not None and self.text.cls_emb is None
        self.causal = causal and self.text.pool_type in WITHIN_REACH
        names = [name for name, _ in self.named_parameters()]
        self.depths = depths_of(names)
        for name in innermost({name[: match.end() - 1] for name in names if (match := BLOCK.search(name))}):
            self.get_submodule(name).is_block = True  # --compile compiles each of them

    @classmethod
    def check_installed(cls) -> None:
        if missing := [name for name in ("open_clip", "timm", "transformers") if not find_spec(name)]:
            raise ValueError(f"--encoder open_clip needs {' and '.join(missing)}, not installed here: {INSTALL}")

    @classmethod
    def find(cls, name: str, options: Any, fetch: Callable[[str], Path]) -> tuple[Path, dict[str, Any]]:
        """A model of open_clip's list with the tag or file of ``--open_clip_weights``, a repository, or a folder."""
        cls.check_installed()
        given = options.open_clip_weights
        if name.startswith("hf-hub:") or Path(name).expanduser().is_dir():
            if given:
                raise ValueError(f"--open_clip_weights {given}: {name} has weights of its own; leave it out")
            path = fetch(name)
            config = read_config(path)
            if path.exists() and config is None:
                raise ValueError(f"--pretrained_clip_name {name} has no {CONFIG} with a model_cfg in it")
            return path, described(
                Path(name).name, config["model_cfg"], config.get("preprocess_cfg"), path
            ) if config else {}
        name = name.replace("/", "-")
        model, tags = listed(name)
        remedy = f"tags of {name}: {', '.join(tags) or 'none'}"
        if given is None:
            raise ValueError(f"--pretrained_clip_name {name} needs --open_clip_weights, a tag or a file; {remedy}")
        if tag := tags.get(given.lower().replace("-", "_")):
            quick = f"{name}-quickgelu"
            if tag.get("quick_gelu", False) != model.get("quick_gelu", False):
                other = quick if tag.get("quick_gelu") else name.removesuffix("-quickgelu")
                raise ValueError(f"--open_clip_weights {given} has another activation than {name}; give {other}")
            return (path := fetch(f"hf-hub:{tag['hf_hub'].rstrip('/')}")), described(name, model, tag, path)
        path = Path(given).expanduser()
        if not path.exists():
            raise ValueError(f"--open_clip_weights {given} is neither a file nor a tag; {remedy}")
        pictures = [{k: tag.get(k) for k in ("mean", "std", "interpolation", "resize_mode")} for tag in tags.values()]
        alike = pictures[0] if pictures and all(each == pictures[0] for each in pictures) else {}
        return path, described(name, model, (read_config(path) or {}).get("preprocess_cfg") or alike, path)

    @classmethod
    def sizes_of(
        cls, tensors: Mapping[str, Tensor], options: Any = None, told: Mapping[str, Any] | None = None
    ) -> OpenClipSizes:
        """What is `told`, with the flags given. Raises ValueError where nothing tells which model it is."""
        if not told or "model_cfg" not in told:
            raise ValueError("nothing beside these weights tells which model of open_clip they are of")
        sizes, options = OpenClipSizes(**told), options or OpenClipOptions()
        text = sizes.model_cfg["text_cfg"]
        if options.context_length and (text.get("embed_cls") or text.get("hf_model_name")):
            raise ValueError(f"--context_length: the text positions of {sizes.name} cannot be stretched; leave it out")
        changed = {name: value for name in ("image_size", "context_length") if (value := getattr(options, name))}
        if options.open_clip_tokenizer:
            changed["tokenizer"] = str(options.open_clip_tokenizer.expanduser().absolute())
        return replace(sizes, **changed)

    def fitted(self, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """As the library loads them: forms of other programs renamed, image positions interpolated; text positions
        are stretched only for ``--context_length``. A caption decoder (CoCa's) has no part in retrieval."""
        from open_clip.convert import convert_state_dict
        from open_clip.model import convert_to_custom_text_state_dict, resize_pos_embed

        state = convert_to_custom_text_state_dict(convert_state_dict(self, dict(tensors)))
        state = {name: value for name, value in state.items() if not name.startswith("text_decoder.")}
        own = self.state_dict()
        for name in ("logit_scale", "logit_bias"):
            if name in own:
                state[name] = state[name].reshape(own[name].shape) if name in state else torch.zeros_like(own[name])
        resize_pos_embed(state, self)
        table = "text.positional_embedding"
        if self.sizes.context_length and table in state:
            state[table] = stretched(state[table], self.sizes.context_length)
        trunk = {name for name in own if name.startswith("visual.trunk.")}
        if trunk and self.sizes.image_size and any(own[n].shape != state[n].shape for n in trunk & state.keys()):
            native = built(self.sizes, None, self.sizes.context_length)
            native.load_state_dict(state)
            native.visual.set_input_size(self.sizes.image_size)
            state = {name: value for name, value in native.state_dict().items() if name in own}
        return state

    def text_blocks(self, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        if "text.positional_embedding" not in tensors:
            return {}
        return {k.removeprefix("text."): value for k, value in tensors.items() if k.startswith("text.")}

    @property
    def tower(self) -> str:
        return f"open_clip {self.sizes.name}"

    @cached_property
    def tokenizer(self) -> OpenClipTokenizer:
        """Raises ValueError where its files are neither in Hugging Face's cache nor to be fetched."""
        from open_clip.tokenizer import HFTokenizer, SimpleTokenizer

        text, length, source = self.sizes.model_cfg["text_cfg"], self.head_sizes.context_length, self.sizes.tokenizer
        settings = text.get("tokenizer_kwargs") or {}
        if source is None:
            return OpenClipTokenizer(SimpleTokenizer(context_length=length, **settings), padding=0)
        mode = text.get("tokenizer_mode")
        try:
            tokenizer = HFTokenizer(source, context_length=length, tokenizer_mode=mode, **settings)
        except (OSError, ValueError, ImportError) as error:
            remedy = "fetch it where there is a connection (HF_HOME), or give its files: --open_clip_tokenizer DIR"
            raise ValueError(
                f"the tokenizer {source} cannot be had ({str(error).splitlines()[0]}); {remedy}"
            ) from error
        whole = length if mode == "clips" else None
        return OpenClipTokenizer(tokenizer, tokenizer.tokenizer.pad_token_id or 0, whole)

    @property
    def head_sizes(self) -> Sizes:
        width, text = self.sizes.model_cfg["embed_dim"], self.sizes.model_cfg["text_cfg"]
        length, heads = self.sizes.context_length or text.get("context_length", 77), text.get("heads", 8)
        return Sizes(width, length, heads if width % heads == 0 else max(1, width // 64), width)

    def encode_frames(self, frames: Tensor, frame_mask: Tensor, places: Tensor | None = None) -> tuple[Tensor, None]:
        """frames uint8 or float [V, T, 3, S, S], mask bool [V, T] -> [V, T, D] float32, zeros at padding, and None."""
        slots = self.check_frames(frames, frame_mask, places)
        return slots.fill(self.visual(self.normalize(slots.take(frames))).float()), None

    def encode_text(self, token_ids: Tensor, token_mask: Tensor) -> tuple[Tensor, Tensor | None]:
        """token_ids int64 [N, L], mask bool [N, L] -> [N, D] and tokens [N, L, D], None where the tower has none.

        Where attention looks ahead, rows are filled up to the context length again: they were trained so.
        """
        text, length, most = self.text, token_ids.shape[1], self.head_sizes.context_length
        if length > most:
            raise ValueError(f"--max_words {length} exceeds the model's context of {most} tokens")
        if self.causal:
            x = text.token_embedding(token_ids) + text.positional_embedding[:length]
            tokens = self.project(text.ln_final(text.transformer(x, attn_mask=text.attn_mask[:length, :length])))
            at = {"argmax": token_ids.argmax, "eos": (token_ids == text.eos_id).int().argmax}.get(text.pool_type)
            ends = at(dim=-1) if at else torch.zeros_like(token_ids[:, 0])
            return tokens[torch.arange(len(tokens), device=tokens.device), ends], tokens
        if self.by_transformers:
            return text(token_ids.masked_fill(~token_mask, text.config.pad_token_id))[0], None
        padding = self.tokenizer.padding
        ids = F.pad(token_ids.masked_fill(~token_mask, padding), (0, most - length), value=padding)
        pooled, tokens = text(ids)
        tokens = tokens[:, :length] if text.cls_emb is None else text.ln_final(tokens[:, :length])
        return pooled, self.project(tokens)

    def project(self, tokens: Tensor) -> Tensor:
        projection = self.text.text_projection
        if projection is None:
            return tokens
        return projection(tokens) if isinstance(projection, nn.Module) else tokens @ projection

    def train(self, mode: bool = True) -> "OpenClip":
        """BatchNorms keep the statistics that they were trained with: those of a batch would make its gradient depend
        on how it is dealt to ranks and pieces."""
        super().train(mode)
        for module in self.modules():
            if isinstance(module, nn.modules.batchnorm._BatchNorm):
                module.eval()
        return self

    @property
    def checkpointing(self) -> bool:
        return False

    @checkpointing.setter
    def checkpointing(self, wanted: bool) -> None:
        if wanted:
            self.visual.set_grad_checkpointing(True)
            self.text.set_grad_checkpointing(True)

    def depth(self, name: str) -> int | None:
        return self.depths.get(name)

    @property
    def blocks(self) -> int:
        return max(depth or 0 for depth in self.depths.values())


def listed(name: str) -> tuple[dict[str, Any], dict[str, dict[str, Any]]]:
    """The configuration of a model of open_clip's list, and its tags. Raises ValueError for another name."""
    import open_clip

    if (model := open_clip.get_model_config(name)) is None:
        near = difflib.get_close_matches(name, open_clip.list_models(), 5, 0.5)
        hint = f"; near to it: {', '.join(near)}" if near else ""
        raise ValueError(f"--pretrained_clip_name {name} is no model of open_clip's list{hint}")
    tags = open_clip.list_pretrained_tags_by_model(name)
    return model, {tag: open_clip.get_pretrained_cfg(name, tag) for tag in tags}


def read_config(weights: Path) -> dict[str, Any] | None:
    """The configuration beside a weight file, or in a folder; None without one that has a model in it."""
    file = (weights if weights.is_dir() else weights.parent) / CONFIG
    try:
        found = json.loads(file.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return None
    except ValueError as error:
        raise ValueError(f"{file} cannot be read: {error}") from error
    return found if isinstance(found, dict) and "model_cfg" in found else None


def described(name: str, model: dict[str, Any], pictures: Mapping[str, Any] | None, path: Path) -> dict[str, Any]:
    """What a sidecar would say of weights at `path`."""
    from open_clip.transform import PreprocessCfg, merge_preprocess_dict

    folder = path if path.is_dir() else path.parent
    tokenizer = model["text_cfg"].get("hf_tokenizer_name") or None
    if tokenizer and any((folder / file).exists() for file in TOKENIZER_FILES):
        tokenizer = str(folder.absolute())
    found = merge_preprocess_dict(PreprocessCfg(), dict(pictures or {}))
    found = {key: value for key, value in found.items() if key != "size"}  # that of the tower counts
    sizes = OpenClipSizes(name, model, found, tokenizer)
    activation = "quick_gelu" if model.get("quick_gelu") else "gelu"
    return {"encoder": {"name": OpenClip.name, "sizes": asdict(sizes)}, "activation": activation}


def built(sizes: OpenClipSizes, image_size: int | None, context_length: int | None) -> Any:
    """The library's model with random weights. Raises ValueError for what it cannot build."""
    from open_clip.model import CustomTextCLIP

    config = {k: deepcopy(v) for k, v in sizes.model_cfg.items() if k not in ("custom_text", "multimodal_cfg")}
    vision, text = config["vision_cfg"], config["text_cfg"]
    own = vision.get("image_size", 224)
    by_timm = bool(vision.get("timm_model_name"))
    vision |= {"timm_model_pretrained": False} if by_timm else {"image_size": image_size or own}
    text |= {"hf_model_pretrained": False} if text.get("hf_model_name") else {}
    text |= {"context_length": context_length} if context_length else {}
    try:
        model = CustomTextCLIP(**config)
        if by_timm and image_size and image_size != own:
            model.visual.set_input_size(image_size)
    except (AssertionError, OSError, RuntimeError, TypeError) as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise ValueError(f"open_clip cannot build {sizes.name}: {reason}") from error
    return model


def picture_of(sizes: OpenClipSizes) -> ImageInput:
    """Raises ValueError for pictures that are not square."""
    size, found = sizes.image_size or sizes.model_cfg["vision_cfg"].get("image_size", 224), sizes.preprocess_cfg
    side = size if isinstance(size, int) else size[0]
    if not isinstance(size, int) and len(set(size)) > 1:
        raise ValueError(f"{sizes.name} takes pictures of {size[1]} x {size[0]}; only square ones are read here")
    interpolation = "bilinear" if found["interpolation"] == "bilinear" else "bicubic"  # as the library reads "random"
    return ImageInput(side, tuple(found["mean"]), tuple(found["std"]), found["resize_mode"], interpolation)


def innermost(names: set[str]) -> list[str]:
    """Of names of modules, those that none of the others stands in."""
    return [name for name in names if not any(other.startswith(f"{name}.") for other in names)]


def depths_of(names: Sequence[str]) -> dict[str, int | None]:
    """Parameter -> block of its tower, counted in the order of the names; between two blocks it is the next one's."""
    found: dict[str, int | None] = {}
    for tower in ("visual.", "text."):
        blocks: dict[str, int] = {}
        mine = [name for name in names if name.startswith(tower)]
        for name in mine:
            if match := BLOCK.search(name):
                found[name] = blocks.setdefault(match[0], len(blocks) + 1)
            elif AFTER.match(name.removeprefix(tower)):
                found[name] = None
            else:
                found[name] = len(blocks) + 1 if blocks else 0
        for name in reversed(mine):  # what follows the last block belongs to none
            if BLOCK.search(name):
                break
            found[name] = None
    return found
