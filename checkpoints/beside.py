"""What stands beside weights and they do not show: how pictures were prepared, image heads, the eps of LayerNorms.

open_clip writes open_clip_config.json, Hugging Face config.json and preprocessor_config.json, this project a sidecar.
Whatever of it is not built here is refused with file and key; keys that change no picture are ignored.
"""

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from checkpoints.files import CheckpointError, read_json

OPEN_CLIP, CONFIG = "open_clip_config.json", "config.json"
PROCESSOR, NEWER_PROCESSOR = "preprocessor_config.json", "processor_config.json"
RESIZE_MODES, INTERPOLATIONS = ("shortest", "longest", "squash"), ("bicubic", "bilinear")
SAMPLINGS = {0: "nearest", 1: "lanczos", 2: "bilinear", 3: "bicubic", 4: "box", 5: "hamming"}  # codes of PIL
REMEDY = "Give weights whose pictures are prepared so; if the file belongs to other weights, move it away"
# Of Hugging Face: steps that all is built on. Any other do_…: true is a step that is not built.
STEPS = {"do_resize", "do_rescale", "do_normalize"}
HARMLESS_STEPS = {"do_center_crop", "do_convert_rgb"}
# Parts of open_clip's towers that OpenAI's do not have. Where the text's is told, so is another tokenizer.
TOWER_EXTRAS = ("ls_init_value", "act_kwargs", "final_ln_after_pool")
EXTRAS = {
    "vision_cfg": (*TOWER_EXTRAS, "attentional_pool", "no_ln_pre", "timm_model_name"),
    "text_cfg": (*TOWER_EXTRAS, "embed_cls", "hf_model_name", "hf_tokenizer_name", "tokenizer_kwargs"),
}


@dataclass(frozen=True)
class Beside:
    """None: it is not said. `norm_eps`: of the image and of the text tower. `image_heads`: attention heads of the image
    tower. `sides`: what names the image side, and its pixels. The others are fields of the encoders' ImageInput: mean
    and std of values in 0..1, fill_color in 0..255.
    """

    mean: tuple[float, ...] | None = None
    std: tuple[float, ...] | None = None
    resize_mode: str | None = None
    interpolation: str | None = None
    fill_color: tuple[int, ...] | None = None
    norm_eps: tuple[float, float] | None = None
    image_heads: int | None = None
    sides: tuple[tuple[str, int], ...] = ()
    files: tuple[str, ...] = ()  # that say anything of it

    @property
    def image(self) -> dict[str, Any]:
        """What is said of ImageInput, but for the size."""
        names = ("mean", "std", "resize_mode", "interpolation", "fill_color")
        return {name: getattr(self, name) for name in names if getattr(self, name) is not None}

    def completed(self, other: "Beside") -> "Beside":
        """What this does not say is taken from `other`."""
        mine = {field.name: getattr(self, field.name) for field in fields(self)}
        theirs = {name: getattr(other, name) if value is None else value for name, value in mine.items()}
        files = tuple(dict.fromkeys(self.files + other.files))
        return Beside(**theirs | {"sides": self.sides + other.sides, "files": files})


def read_beside(path: Path, naming: str) -> Beside:
    """Of the weight file at `path`, whose tensors are named as `naming` says (see names.py); of a link, what stands
    beside it, else beside the file. The other program's file counts for the pictures where its own is not there.

    Raises CheckpointError for what is unreadable or not built here.
    """
    for folder in dict.fromkeys((path.parent, path.resolve().parent)):
        found = {name: read_json(folder / name) for name in (OPEN_CLIP, CONFIG, PROCESSOR, NEWER_PROCESSOR)}
        ours, theirs = found[OPEN_CLIP], found[PROCESSOR]
        name = PROCESSOR
        if theirs is None and isinstance((found[NEWER_PROCESSOR] or {}).get("image_processor"), dict):
            name, theirs = NEWER_PROCESSOR, (found[NEWER_PROCESSOR] or {})["image_processor"]
        pictures = of_processor(theirs, folder / name) if theirs is not None else None
        if naming == "hugging_face":
            config = found[CONFIG]
            told = of_clip_config(config, folder / CONFIG) if config is not None else Beside()
            if pictures is None and ours is not None:
                pictures = of_open_clip({"preprocess_cfg": ours.get("preprocess_cfg")}, folder / OPEN_CLIP)
            told = (pictures or Beside()).completed(told)
        else:
            told = of_open_clip(ours, folder / OPEN_CLIP) if ours is not None else Beside()
            if pictures is not None and not (ours or {}).get("preprocess_cfg"):
                told = told.completed(pictures)
        if told.files:
            return told
    return Beside()


def of_sidecar(spec: Mapping[str, Any], file: Path) -> Beside:
    """Of an encoder's `spec`, whose ``image`` has open_clip's keys; empty for a spec that says nothing of it."""
    told = _pictures(_Keys(spec.get("image"), file, "encoder.image"))
    eps = spec.get("norm_eps")
    if eps is None:
        return told
    keys = _Keys(dict(zip(("image", "text"), eps)) if isinstance(eps, list) else {}, file, "encoder.norm_eps")
    return told.completed(Beside(norm_eps=(keys.eps("image"), keys.eps("text"))))


def of_open_clip(config: Mapping[str, Any], file: Path) -> Beside:
    """Of open_clip_config.json: ``preprocess_cfg``, and of ``model_cfg`` image side, image heads and eps."""
    told = _pictures(_Keys(config.get("preprocess_cfg"), file, "preprocess_cfg"))
    model = _Keys(config.get("model_cfg"), file, "model_cfg").values or config
    eps = []
    for part, extras in EXTRAS.items():
        tower = _Keys(model.get(part), file, part)
        for key in extras:
            if tower.values.get(key):
                tower.refuse(key, "OpenAI's towers, the only ones built here, have nothing of it")
        norm = _Keys(tower.values.get("norm_kwargs"), file, f"{part}.norm_kwargs")
        for key in norm.values.keys() - {"eps"}:
            norm.refuse(key, "no option of a LayerNorm but eps is built here")
        eps.append(norm.eps("eps"))
        if part == "vision_cfg":
            width, head = tower.whole("width"), tower.whole("head_width")
            heads = (width or 768) // (head or 64) if width or head else None  # one of its defaults is left out
            told = told.completed(Beside(sides=tower.side("image_size"), image_heads=heads))
    return told.completed(Beside(norm_eps=(eps[0], eps[1]), files=(file.name,)))


def _pictures(keys: "_Keys") -> Beside:
    """Of open_clip's ``preprocess_cfg``, or of ImageInput as a sidecar has it."""
    if not keys.values:
        return Beside()
    keys.must("mode", ("RGB",), "frames are RGB here")
    keys.must("crop_pct", (1,), "the whole of the resized picture's centre square is taken here")
    interpolation = keys.must("interpolation", (*INTERPOLATIONS, "random"), f"built are {', '.join(INTERPOLATIONS)}")
    return Beside(
        keys.channels("mean", 0, 1),
        keys.channels("std", 1e-6, 1),
        keys.must("resize_mode", RESIZE_MODES, f"built are {', '.join(RESIZE_MODES)}"),
        "bicubic" if interpolation == "random" else interpolation,  # as open_clip evaluates
        keys.channels("fill_color", 0, 255, int),
        sides=keys.side("size"),
        files=(keys.file.name,),
    )


def of_clip_config(config: Mapping[str, Any], file: Path) -> Beside:
    """Of transformers' config.json of a CLIPModel: image side, image heads and eps."""
    vision, text = (_Keys(config.get(part), file, part) for part in ("vision_config", "text_config"))
    eps = vision.eps("layer_norm_eps"), text.eps("layer_norm_eps")
    heads = vision.whole("num_attention_heads")
    return Beside(norm_eps=eps, image_heads=heads, sides=vision.side("image_size"), files=(file.name,))


def of_processor(config: Mapping[str, Any], file: Path) -> Beside:
    """Of transformers' preprocessor_config.json, as its CLIPImageProcessor reads it."""
    keys = _Keys(config, file)
    for key, value in config.items():
        if key in STEPS and not value and value is not None:
            keys.refuse(key, "this step is always taken here")
        if key.startswith("do_") and key not in STEPS | HARMLESS_STEPS and value:
            keys.refuse(key, "this step is not built here")
    keys.must("crop_pct", (1,), "the whole of the resized picture's centre square is taken here")
    for key in ("offset", "rescale_offset"):
        keys.must(key, (False,), "values are brought to 0..1 here")
    factor = keys.values.get("rescale_factor")
    if factor is not None and not (_is_number(factor) and math.isclose(factor, 1 / 255, rel_tol=1e-4)):
        keys.refuse("rescale_factor", "values are multiplied by 1/255 here")
    size, mode = keys.values.get("size"), None
    if isinstance(size, Mapping):
        mode = "squash" if size.keys() == {"height", "width"} else "shortest"
        if mode == "shortest" and size.keys() != {"shortest_edge"}:
            keys.refuse("size", "built are shortest_edge, and height with width")
    elif size is not None:
        mode = "shortest"
    if config.get("do_center_crop") is False and mode != "squash":
        keys.refuse("do_center_crop", "pictures resized by their short side are cut square here")
    return Beside(
        keys.channels("image_mean", 0, 1),
        keys.channels("image_std", 1e-6, 1),
        mode,
        keys.sampling("resample"),
        sides=keys.side("size") + (keys.side("crop_size") if config.get("do_center_crop") is not False else ()),
        files=(file.name,),
    )


class _Keys:
    """The values of a JSON object; what is wrong with one is told with file and key. `part`: where it stands in it."""

    def __init__(self, values: Any, file: Path, part: str = "") -> None:
        self.file, self.prefix = file, f"{part}." if part else ""
        if values is not None and not isinstance(values, Mapping):
            raise CheckpointError(
                f"{file}: {part} is {json.dumps(values)}, not an object. Repair the file or remove it"
            )
        self.values: Mapping[str, Any] = values or {}

    def refuse(self, key: str, why: str) -> None:
        shown = json.dumps(self.values.get(key), default=str)
        raise CheckpointError(f"{self.file}: {self.prefix}{key} is {shown}: {why}. {REMEDY}")

    def must(self, key: str, allowed: tuple[Any, ...], why: str) -> Any:
        """The value, None where there is none."""
        value = self.values.get(key)
        if value is not None and value not in allowed:
            self.refuse(key, why)
        return value

    def channels(self, key: str, low: float, high: float, kind: type = float) -> tuple[Any, ...] | None:
        """One number for each of red, green and blue; a single one counts for all."""
        value = self.values.get(key)
        if value is None:
            return None
        numbers = list(value) if isinstance(value, (list, tuple)) else [value]
        numbers = numbers * 3 if len(numbers) == 1 else numbers
        if len(numbers) != 3 or not all(_is_number(x) and low <= x <= high for x in numbers):
            self.refuse(key, f"expected are three numbers in {max(low, 0):.0f}..{high:.0f}, for red, green and blue")
        return tuple(kind(x) for x in numbers)

    def whole(self, key: str) -> int | None:
        """A whole number above 0."""
        value = self.values.get(key)
        if value is not None and (type(value) is not int or value < 1):
            self.refuse(key, "expected is a whole number above 0")
        return value

    def side(self, key: str) -> tuple[tuple[str, int], ...]:
        """The side of a square in pixels, under its name in messages; empty where there is none."""
        value = self.values.get(key)
        if value is None:
            return ()
        sides = list(value.values() if isinstance(value, Mapping) else value if isinstance(value, list) else [value])
        if not sides or any(type(side) is not int or side != sides[0] or side < 1 for side in sides):
            self.refuse(key, "pictures are square here, with a whole number of pixels")
        return ((f"{self.file}: {self.prefix}{key}", sides[0]),)

    def sampling(self, key: str) -> str | None:
        """PIL's code of an interpolation, or its name."""
        value = self.values.get(key)
        if value is None:
            return None
        name = SAMPLINGS.get(value, "unknown") if type(value) is int else str(value).lower()
        if name not in INTERPOLATIONS:
            self.refuse(key, f"that is {name}; built are {', '.join(INTERPOLATIONS)}")
        return name

    def eps(self, key: str) -> float:
        """Of a LayerNorm; both programs leave their default out."""
        value = self.values.get(key, 1e-5)
        if not _is_number(value) or not 0 < value < 1:
            self.refuse(key, "the eps of a LayerNorm is a small number above 0")
        return float(value)


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)
