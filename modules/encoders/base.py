"""What every encoder offers, and the registry of encoders by ``--encoder`` name.

Letters: N captions, V videos, L tokens, T frames, D embedding width, S image side.
"""

from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from plugins import NoOptions, Registry

ENCODERS: Registry[type["Encoder"]] = Registry("encoder", "encoder")
CLIP_MEAN = (0.48145466, 0.4578275, 0.40821073)
CLIP_STD = (0.26862954, 0.26130258, 0.27577711)
NORM_EPS = 1e-5  # of CLIP's LayerNorms, and torch's default


@dataclass(frozen=True)
class ImageInput:
    """The pictures that an image tower was trained on, and how a frame became one."""

    size: int  # side in pixels
    mean: tuple[float, float, float] = CLIP_MEAN  # of values in 0..1
    std: tuple[float, float, float] = CLIP_STD
    # shortest: the short side to `size`, then the centre square; longest: the long side, then bars of `fill_color`
    # around; squash: both sides.
    resize_mode: str = "shortest"
    interpolation: str = "bicubic"  # or bilinear
    fill_color: tuple[int, int, int] = (0, 0, 0)  # 0..255


@dataclass(frozen=True)
class Sizes:
    """What heads are built from."""

    embed_dim: int  # D, of frames and pooled texts
    context_length: int  # most tokens of a caption
    text_heads: int  # attention heads of the text tower
    token_width: int  # width of the tokens that encode_text gives


@dataclass(frozen=True)
class Conventions:
    """What source projects compute otherwise. Defaults are right; engine/compat.py says who differs where, and why."""

    normalize_frames: bool = True  # frames to unit length before their mean
    mask_padding: bool = True  # padded tokens and frames stay out of a maximum; False: they score 0 in it
    read_padding: bool = False  # a video tower reads padding as frames of the mean colour
    cross_heads: int | None = None  # attention heads of the cross encoder; None: one per 64 channels
    # What the sources' loaders fill captions and clips to; it counts where padding takes part.
    source_words: int = 0
    source_frames: int = 0


RIGHT = Conventions()


def frame_places(frame_mask: Tensor) -> Tensor:
    """Where the real frames of a batch stand among its V * T: mask bool [V, T] -> int64 [R].

    How many there are has to be known before work on them can be queued: on a CUDA device that is a wait for all that
    runs there, so ask while the mask is still on the CPU. Raises ValueError for clips without a single frame.
    """
    if empty := (~frame_mask.any(dim=1)).nonzero().flatten().tolist():
        raise ValueError(f"clips without a single frame in the batch, at {empty}: drop them before the model")
    return frame_mask.flatten().nonzero().squeeze(1)


class Slots:
    """R packed frames and the V * T slots of a batch of clips, of which `keep`, bool [V, T], are taken.

    places: int64 [R] of :func:`frame_places`, on the device of `keep`.
    """

    def __init__(self, keep: Tensor, places: Tensor) -> None:
        self.keep, self.places = keep, None if len(places) == keep.numel() else places  # None: all are taken

    def take(self, clips: Tensor) -> Tensor:
        """clips [V, T, ...] -> their real frames [R, ...]."""
        frames = clips.flatten(0, 1)
        return frames if self.places is None else frames.index_select(0, self.places)

    def fill(self, rows: Tensor) -> Tensor:
        """rows [R, ...] -> [V, T, ...], zeros in empty slots."""
        if self.places is not None:
            rows = rows.new_zeros(self.keep.numel(), *rows.shape[1:]).index_copy(0, self.places, rows)
        return rows.unflatten(0, self.keep.shape)


class Encoder(nn.Module):
    """Texts and frames into one space. A subclass is one file in this folder, under ``@register("name")``.

    Its parameters, a scalar `logit_scale` among them, are ``clip.`` + their names in checkpoints: OpenAI's for CLIP's.
    """

    Options: type = NoOptions
    image: ImageInput  # set before __init__ of this class is called; what stands beside weights may change it
    norm_eps: tuple[float, float] | None = None  # of the LayerNorms of image and text tower, where weights bring it
    title = "encoder"  # in messages
    chosen_by: str  # the flag that chooses it, in messages
    name = ""  # under which it is registered
    has_half = False  # whether `to_half()` puts into float16 what the source project keeps in it (--precision half)
    trained_with: str | None = None  # the activation of all files of this encoder's own, where there is but one
    spec_options: tuple[str, ...] = ()  # the options that decide what is built
    # How names of parameters begin that only this encoder has: a file with such names is one of this encoder's, and a
    # file with none starts them at `start_values`, else as a new model has them.
    own_parts: tuple[str, ...] = ()
    # Name in CLIP -> the name that this encoder has for the same tensor; --mergeclip leaves these as they are.
    renamed: Mapping[str, str] = {}

    def __init__(self, sizes: Any, activation: str, options: Any, conventions: Conventions = RIGHT) -> None:
        super().__init__()
        self.sizes, self.activation, self.options, self.conventions = sizes, activation, options, conventions
        self._as_built = self.image
        self.take_over({})

    def take_over(self, image: Mapping[str, Any], norm_eps: tuple[float, float] | None = None) -> None:
        """What stands beside weights and they do not show: fields of `image`, `norm_eps`; the rest stays as built."""
        self.image = replace(self.image, **image)
        mean, std = (torch.tensor(values).view(3, 1, 1) for values in (self.image.mean, self.image.std))
        # Buffers, so that normalising copies nothing to the device; not stored, as no file has them.
        self.register_buffer("image_std", 255 * std, persistent=False)
        self.register_buffer("image_shift", mean / std, persistent=False)
        if norm_eps is not None:
            self.norm_eps = norm_eps
            for name, module in self.named_modules():
                if isinstance(module, nn.LayerNorm):
                    module.eps = norm_eps[0 if name.startswith("visual") else 1]

    @property
    def unlike_built(self) -> dict[str, Any]:
        """Of `spec`, what weights brought along and is not as this encoder has it otherwise; empty where nothing is."""
        eps = self.norm_eps and any(value != NORM_EPS for value in self.norm_eps)
        return {k: self.spec[k] for k in ("image", "norm_eps")} if eps or self.image != self._as_built else {}

    @classmethod
    def sizes_of(cls, tensors: Mapping[str, Tensor], options: Any) -> Any:
        """From `tensors` of :meth:`adapted`. Raises ValueError for shapes and parts that it has not with `options`."""
        raise NotImplementedError

    @classmethod
    def adapted(cls, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Tensors of a plain CLIP or of this encoder under this encoder's names and in its shapes.

        Parameters that never train and that files may lack are filled in.
        """
        return {cls.renamed.get(name, name): value for name, value in tensors.items()}

    @classmethod
    def own_weights(cls, options: Any) -> tuple[str, Any] | None:
        """(flag, path) of weights of this encoder's own that a run starts from, in place of --pretrained_clip_name."""
        return None

    @classmethod
    def merge_weight(cls, options: Any) -> float | None:
        """The share of the CLIP of --pretrained_clip_name in an average with :meth:`own_weights`; None: no average."""
        return None

    @property
    def tower(self) -> str:
        """What results call this encoder, such as ``CLIP ViT-B/32``."""
        return self.title

    @property
    def tokenizer(self) -> Any:
        """Picklable: (captions, max_words) -> ids int64 [N, max_words], mask bool [N, max_words]."""
        raise NotImplementedError

    @property
    def head_sizes(self) -> Sizes:
        raise NotImplementedError

    @property
    def spec(self) -> dict[str, Any]:
        """All it takes to build this encoder without weights, JSON-ready: it stands in every sidecar."""
        return {
            "name": self.name,
            "sizes": asdict(self.sizes),
            "activation": self.activation,
            "image": asdict(self.image),
            "norm_eps": self.norm_eps and list(self.norm_eps),
            "options": {name: getattr(self.options, name) for name in self.spec_options},
        }

    def start_values(self, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Start of own parts that follows from `tensors` without them; what is left out starts as built."""
        return {}

    def normalize(self, images: Tensor) -> Tensor:
        """uint8 [..., 3, S, S] in 0..255 -> float32 less the mean, by the deviation; float input is taken as done."""
        if images.is_floating_point():
            return images
        # One conversion and two in-place passes: a naive (x / 255 - mean) / std would cost four copies of the clip.
        return images.float().mul_(1 / self.image_std).sub_(self.image_shift)

    def check_frames(self, frames: Tensor, frame_mask: Tensor, places: Tensor | None = None) -> Slots:
        """Where the real ones of frames [V, T, 3, S, S] stand; `places` as in :meth:`encode_frames`.

        Raises ValueError unless they have the side of this encoder and every clip has one.
        """
        side = self.image.size
        if frames.shape[-2:] != (side, side):
            raise ValueError(f"this CLIP takes frames of {side}x{side} pixels, got {tuple(frames.shape[-2:])}")
        return Slots(frame_mask, frame_places(frame_mask) if places is None else places)

    def encode_text(self, token_ids: Tensor, token_mask: Tensor) -> tuple[Tensor, Tensor]:
        """token_ids int64 [N, L], mask bool [N, L] -> pooled [N, D] and tokens [N, L, token_width], not unit length."""
        raise NotImplementedError

    def encode_frames(
        self, frames: Tensor, frame_mask: Tensor, places: Tensor | None = None
    ) -> tuple[Tensor, Tensor | None]:
        """frames uint8 or float [V, T, 3, S, S], mask bool [V, T] -> frames [V, T', D] and the whole clips [V, D].

        places: what :func:`frame_places` says of the mask, int64 [R]; None: asked for here, a wait on a CUDA device.
        Not unit length; zeros at padding. None: no feature of whole clips. T' > T where ``read_padding`` adds frames.
        """
        raise NotImplementedError

    def depth(self, name: str) -> int | None:
        """0 for what comes before the first block, n for the n-th block (from 1) of its tower, None for the rest.

        ``--freeze_layer_num n`` freezes parameters with a depth of at most n.
        """
        raise NotImplementedError

    @property
    def blocks(self) -> int:
        """Blocks of the deepest tower."""
        raise NotImplementedError

    def without_gradient(self, reads_tokens: bool, reads_whole: bool) -> tuple[str, ...]:
        """Prefixes of parameters without gradient where a head reads tokens (else texts), whole clips (else frames)."""
        return ()


def register(name: str, chosen_by: str = "") -> Callable[[type[Encoder]], type[Encoder]]:
    """Class decorator: make an encoder available as ``--encoder name``, by its own flag `chosen_by` too."""

    def add(encoder: type[Encoder]) -> type[Encoder]:
        encoder.chosen_by = chosen_by or f"--encoder {name}"
        return ENCODERS.register(name)(encoder)

    return add
