"""From options and weight files to a model."""

from collections.abc import Mapping
from contextlib import suppress
from dataclasses import asdict, dataclass, fields, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from checkpoints.download import HUB, OPENAI_CLIP, fetch_clip, fetch_from_hub
from checkpoints.names import CLIP_PREFIX, PLAIN_CLIP, merge, parameter_name, split_towers
from checkpoints.read import Checkpoint, CheckpointError, load_strict, read_checkpoint, read_sidecar, weight_file
from engine.compat import COMPAT
from engine.options import Options
from engine.progress import log
from modules.encoders import ENCODERS, Encoder
from modules.encoders.base import NORM_EPS, Conventions, ImageInput, Sizes
from modules.heads import HEADS, INTERACTIONS, Head
from modules.losses import LOSSES
from modules.model import VideoTextModel
from plugins import out_of_range

# What heads are built from, of OpenAI's CLIPs by name; known before they are downloaded.
OPENAI_SIZES = {
    "ViT-B/32": Sizes(512, 77, 8, 512),
    "ViT-B/16": Sizes(512, 77, 8, 512),
    "ViT-L/14": Sizes(768, 77, 12, 768),
}


@dataclass(frozen=True)
class Weights:
    """The file that a run starts from: resolved once, with what stands beside it.

    flag: the one that names it. clip: of --mergeclip, the CLIP that it is averaged with. by_name: it is OpenAI's, and
    nothing else in its folder is of it. known: what its encoder knows of a file from elsewhere, in place of a sidecar.
    """

    flag: str
    path: Path
    clip: "Weights | None" = None
    by_name: bool = False
    known: Mapping[str, Any] | None = None

    @cached_property
    def sidecar(self) -> dict[str, Any]:
        """What this project wrote beside the file; empty where there is nothing."""
        return dict(self.known or (read_sidecar(self.path) if self.path.exists() else {}) or {})

    def read(self) -> Checkpoint:
        """The tensors. Raises CheckpointError."""
        return read_checkpoint(self.path, list(ENCODERS.values()), self.sidecar, alone=self.by_name)

    def files(self) -> list[Path]:
        return [self.path, *(self.clip.files() if self.clip else [])]


def find_weights(options: Options, download: bool = True) -> Weights:
    """The file that decides: of --finetuned_path, --init_model, the encoder's own, else --pretrained_clip_name.

    Raises CheckpointError where there is none. download: fetch a CLIP that --cache_dir lacks, not only name it.
    """
    model, encoder, own = options.model, ENCODERS[options.model.encoder], options.own["encoder"]
    own_weights, merging = encoder.own_weights(own), encoder.merge_weight(own) is not None
    for flag in ("finetuned_path", "init_model"):
        if path := getattr(model, flag):
            if own_weights or merging:
                log.info("%s holds the whole model: --pretrained_path and --mergeclip have no effect", path)
            return Weights(flag, existing(flag, path))
    if own_weights:
        return Weights(own_weights[0], existing(*own_weights), find_clip(options, download) if merging else None)
    return find_clip(options, download)


def find_clip(options: Options, download: bool) -> Weights:
    """The CLIP of --pretrained_clip_name: a name to fetch, or a path. Raises CheckpointError, DownloadError."""
    flag, name, own = "pretrained_clip_name", options.model.pretrained_clip_name, options.own["encoder"]

    def fetch(name: str) -> Path:
        return fetch_from_hub(name, download) if name.startswith(HUB) else existing(flag, Path(name))

    if found := ENCODERS[options.model.encoder].find(name, own, fetch):
        return Weights(flag, found[0], known=found[1])
    if name.startswith(HUB):
        return Weights(flag, fetch(name))
    if name not in OPENAI_CLIP:
        return Weights(flag, existing(flag, Path(name), f", and not one of the names {', '.join(OPENAI_CLIP)}"))
    # The flag may stretch them.
    length = getattr(own, "context_length", None) or OPENAI_SIZES[name].context_length
    check_head(options, replace(OPENAI_SIZES[name], context_length=length))
    folder = options.model.cache_dir.expanduser()
    path = fetch_clip(name, folder) if download else folder / OPENAI_CLIP[name][0]
    return Weights(flag, path, by_name=True)


def existing(flag: str, path: Path, hint: str = "") -> Path:
    """The file itself: of a folder, the weights under their usual name."""
    if not (path := path.expanduser()).exists():
        raise CheckpointError(f"--{flag} {path}: no such file{hint}")
    return weight_file(path)


def check_head(options: Options, sizes: Sizes) -> None:
    """Before weights of these sizes are fetched: ValueError for words, frames or a head that do not fit them."""
    check_max_words(options, sizes.context_length)
    # Shapes alone: no memory, no random number. A head that needs numbers is checked when the weights are there.
    with suppress(NotImplementedError, RuntimeError), torch.device("meta"):
        check_frames(build_head(options, sizes, COMPAT[options.model.compat].conventions, {}, {}), options)


def check_max_words(options: Options, most: int) -> None:
    if options.data.max_words > most:
        raise ValueError(f"--max_words must be at most {most} for this CLIP, got {options.data.max_words}")


def build_model(options: Options, weights: Weights) -> VideoTextModel:
    """Model on the CPU in float32 with its weights. A checkpoint may lack a head only to train it anew.

    Raises CheckpointError or ValueError for a wrong file, naming what it looks like; logs what was recognised.
    """
    model, compat = options.model, COMPAT[options.model.compat]
    words, frames = options.data.max_words, options.data.max_frames
    conventions = replace(compat.conventions, source_words=words, source_frames=frames)
    checkpoint = weights.read()
    rest = split_towers(checkpoint.tensors)[1]
    try:
        encoder, towers, new = build_encoder(options, weights, checkpoint, conventions)
        head = build_head(options, encoder.head_sizes, conventions, weights.sidecar, rest)
        if head.takes_tokens and encoder.no_tokens:
            raise ValueError(f"--interaction {model.interaction} compares words with frames, and {encoder.no_tokens}")
    except ValueError as error:
        raise CheckpointError(f"{weights.path}: {error}") from error
    check_max_words(options, encoder.head_sizes.context_length)
    loss = LOSSES[model.loss](options.own["loss"])
    scaled = compat.scales_cosines if model.interaction == "no" else compat.scales_tokens
    built = VideoTextModel(encoder, head, loss, scaled)
    if options.run.precision == "half":
        encoder.to_half()
    built.new_parts = frozenset(CLIP_PREFIX + name for name in new)
    rest = tensors_of_head(options, built, towers, rest, weights.path)
    tensors = {CLIP_PREFIX + k: v for k, v in towers.items()} | rest
    load_weights(built, tensors, str(weights.path))
    check_frames(head, options)
    reason, size = checkpoint.activation_reason, sum(p.numel() for p in built.parameters()) / 1e6
    log.info("weights: %s: %s; %s (%s)", weights.path, checkpoint.kind, encoder.activation, reason)
    sizes = ", ".join(f"{name} {value}" for name, value in asdict(encoder.sizes).items())
    parts = f"head {model.sim_header}, interaction {model.interaction}, loss {model.loss}"
    log.info("model: %s, %s; %s; %.1f M parameters", encoder.title, sizes, parts, size)
    return built


def check_frames(head: Head, options: Options) -> None:
    """Raises ValueError for longer clips than the head can take."""
    clip = torch.zeros(1, options.data.max_frames, head.sizes.embed_dim)
    with torch.no_grad():
        head.eval().video(clip, torch.ones(clip.shape[:2], dtype=torch.bool))  # eval: it draws nothing at random
    head.train()


def build_encoder(
    options: Options, weights: Weights, checkpoint: Checkpoint, conventions: Conventions
) -> tuple[Encoder, dict[str, Tensor], list[str]]:
    """The encoder, the tensors to load into it (without ``clip.``), and the names that no file holds a value for."""
    chosen, own, path = ENCODERS[options.model.encoder], encoder_options(options, weights.sidecar), checkpoint.path
    held = ENCODERS[checkpoint.encoder]
    if held.name != PLAIN_CLIP and not issubclass(chosen, held):
        raise CheckpointError(f"{path} holds {held.title}; give {held.chosen_by}")
    found = split_towers(checkpoint.tensors)[0]
    towers = chosen.adapted(found)
    merge_weight, other = chosen.merge_weight(own), None
    if weights.clip is not None and merge_weight is not None:
        other = weights.clip.read()
        clip = chosen.adapted(split_towers(other.tensors)[0])
        kept = (*chosen.renamed.values(), *chosen.own_parts)
        towers = merge(towers, clip, merge_weight, kept)
        log.info("--mergeclip: %g x CLIP + %g x %s; kept %s*", merge_weight, 1 - merge_weight, path, "*, ".join(kept))
    activation = choose_activation(options.model.activation, checkpoint)
    encoder = chosen(chosen.sizes_of(towers, own, checkpoint.told), activation, own, conventions)
    if not chosen.own_names:  # such an encoder has in its sizes what stands beside its weights
        side = encoder.image.size
        if getattr(own, "image_size", None):
            side = chosen.sizes_of(towers, replace(own, image_size=None), checkpoint.told).image_resolution
        take_over(encoder, side, checkpoint, other)
    before, towers = towers, encoder.fitted(towers)
    for name in before.keys() & towers.keys():
        if (was := list(before[name].shape)) != (now := list(towers[name].shape)):
            log.info("clip.%s: %s in the file, %s here: interpolated (--image_size, --context_length)", name, was, now)
    start = missing_own_parts(encoder, found)
    if start and options.model.finetuned_path:
        asked = [f"--{name} {getattr(own, name)}" for name in chosen.spec_options] or [chosen.chosen_by]
        raise CheckpointError(f"{path} holds no clip.{min(start)}: it was not trained with {' '.join(asked)}")
    derived = encoder.start_values(towers) if start else {}
    if new := [name for name in start if name not in derived]:
        names = ", ".join(f"clip.{name}" for name in new)
        log.warning("%s holds nothing of %s: %d tensors start anew: %s", path, encoder.title, len(new), names)
    return encoder, towers | start | derived, new


def encoder_options(options: Options, sidecar: Mapping[str, Any]) -> Any:
    """The encoder's own: those that decide what is built and were not given are as the checkpoint's sidecar says."""
    chosen, own, spec = ENCODERS[options.model.encoder], options.own["encoder"], sidecar.get("encoder", {})
    if not isinstance(spec, dict) or spec.get("name") != chosen.name:
        return own
    stored = {name: value for name, value in (spec.get("options") or {}).items() if name in chosen.spec_options}
    stored = {name: value for name, value in stored.items() if name not in options.given}
    own = replace(own, **stored)
    if problem := out_of_range(own):
        raise ValueError(f"{problem} by the file's sidecar; repair it")
    return own


def take_over(encoder: Encoder, side: int, checkpoint: Checkpoint, merged: Checkpoint | None) -> None:
    """What stands beside the weights counts from here on. side: of the images that they are for, in pixels.

    Raises CheckpointError where it names another image side than the weights have, and for weights to be `merged` whose
    pictures are prepared otherwise.
    """
    beside = checkpoint.beside
    for source in [checkpoint] + ([merged] if merged else []):
        for key, told in source.beside.sides:
            if told != side:
                problem = f"{key} is {told}, but {source.path} has positions for {side} x {side} pixels"
                raise CheckpointError(f"{problem}. Repair the file, or if it belongs to other weights, move it away")
    if merged:
        usual = {"image": asdict(ImageInput(side)), "norm_eps": [NORM_EPS] * 2}
        mine, theirs = (
            in_words({"image": usual["image"] | b.image, "norm_eps": b.norm_eps or usual["norm_eps"]})
            for b in (beside, merged.beside)
        )
        if mine != theirs:
            told = f"{checkpoint.path}: {mine}; {merged.path}: {theirs}"
            raise CheckpointError(f"--mergeclip averages weights whose pictures are prepared alike. {told}")
    encoder.take_over(beside.image, beside.norm_eps)
    if encoder.unlike_built:
        log.info("not OpenAI's preprocessing, by %s: %s", ", ".join(beside.files), in_words(encoder.unlike_built))


def in_words(unlike: Mapping[str, Any]) -> str:
    """`Encoder.unlike_built` in a line."""
    told = {**unlike.get("image", {}), "norm_eps": unlike.get("norm_eps")}
    shown = {k: " ".join(map(str, v)) if isinstance(v, (list, tuple)) else v for k, v in told.items() if v is not None}
    return ", ".join(f"{k} {v}" for k, v in shown.items()) or "OpenAI's"


def missing_own_parts(encoder: Encoder, found: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Of the encoder's own parts, those to start anew, as they are in a new model. found: the tensors of the file.

    All or none: a file that lacks only some of them is damaged, which strict loading then reports.
    """
    trained = {name: value.detach() for name, value in encoder.named_parameters() if value.requires_grad}
    own = {name: value for name, value in trained.items() if name.startswith(encoder.own_parts)}
    return {} if own.keys() & found.keys() else own


def choose_activation(wanted: str, checkpoint: Checkpoint) -> str:
    """The activation the file tells, or the one asked for. Raises CheckpointError when neither says."""
    path, told, reason = checkpoint.path, checkpoint.activation, checkpoint.activation_reason
    if wanted == "auto" and told is None:
        remedy = "give --activation quick_gelu or gelu: OpenAI's weights use quick_gelu, most others gelu"
        raise CheckpointError(f"{path} does not tell which activation it was trained with ({reason}); {remedy}")
    if wanted not in ("auto", told) and told:
        log.warning("%s looks like %s (%s); using --activation %s as asked", path, told, reason, wanted)
    return told if wanted == "auto" else wanted


def build_head(
    options: Options,
    sizes: Sizes,
    conventions: Conventions,
    sidecar: Mapping[str, Any],
    tensors: Mapping[str, Tensor],
) -> Head:
    """The head of --sim_header; with --interaction its frames meet the text tokens.

    Options that weights do not show come from the command line, else from the sidecar; ValueError where nobody says.
    """
    head, interaction, own = HEADS[options.model.sim_header], options.model.interaction, options.own["sim_header"]
    stored = sidecar.get("head_options", {})
    for field in fields(own):
        if field.metadata.get("not_in_weights") and field.name not in options.given:
            if field.name in stored:
                own = replace(own, **{field.name: stored[field.name]})
            elif "sim_header" not in sidecar and any(key.startswith(head.checkpoint_prefixes) for key in tensors):
                raise ValueError(f"weights do not show --{field.name}: give the number that they were trained with")
    built = head(sizes, own, conventions)
    return built if interaction == "no" else INTERACTIONS[interaction](built, options.own["interaction"])


def tensors_of_head(
    options: Options, model: VideoTextModel, towers: Mapping[str, Tensor], rest: Mapping[str, Tensor], path: Path
) -> dict[str, Tensor]:
    """The tensors of head and loss: of `rest`, which the file holds beside the encoder's, else their start values.

    A part, by its prefix, of which the file has something stays as it is there: strict loading names what is missing.
    Raises CheckpointError, with the option to give, for parts the model lacks, and for missing ones not to be trained.
    """
    head, loss, chosen, kinds = model.head, model.criterion, options.model, (HEADS, INTERACTIONS, LOSSES)
    kept = {key: value for key, value in rest.items() if not key.startswith(head.ignored_prefixes)}
    if len(kept) < len(rest):
        left_out = "*, ".join(head.ignored_prefixes)
        log.warning("%d tensors of %s* have no use in this model and are left out", len(rest) - len(kept), left_out)
    parts = (*head.checkpoint_prefixes, *loss.checkpoint_prefixes)
    if foreign := [key for key in kept if not key.startswith(parts)]:
        known = ((kind, name, plugin.checkpoint_prefixes) for kind in kinds for name, plugin in kind.items())
        fitting = ((kind, name) for kind, name, own in known if all(key.startswith(own) for key in foreign))
        kind, name = next(fitting, (HEADS, ""))
        problem = f"{path} holds {len(foreign)} tensors that --{kind.flag} {getattr(chosen, kind.flag)} does not have"
        raise CheckpointError(f"{problem}, such as {foreign[0]}" + (f"; give --{kind.flag} {name}" if name else ""))
    added = tuple(part for part in parts if not any(key.startswith(part) for key in kept))
    if not added:
        return kept
    names = "*, ".join(added)
    if chosen.finetuned_path or (chosen.init_model and not options.run.do_train):
        asked = ((kind.flag, getattr(chosen, kind.flag), kind) for kind in kinds)
        flag, name = next((f, n) for f, n, kind in asked if n in kind and added[0] in kind[n].checkpoint_prefixes)
        without = f"--{flag} {name} ({names}*)"
        raise CheckpointError(f"{path} holds no weights for {without}; give the options it was trained with")
    log.info("%s has no %s*: they start from CLIP's tensors where those fit, else at random", path, names)
    start = {**head.state_dict(), **loss.state_dict()}
    start = {parameter_name(key): value for key, value in start.items()}
    if of_text := model.clip.text_blocks(towers):
        derived = head.init_from_clip(of_text).items()
        start |= {key: value for key, value in derived if key in start and value.shape == start[key].shape}
    return kept | {key: value.clone() for key, value in start.items() if key.startswith(added)}


def checkpoint_tensors(model: VideoTextModel) -> dict[str, Tensor]:
    """The model's tensors under CLIP4Clip's names, on the CPU."""
    return {parameter_name(k): v.detach().cpu() for k, v in model.state_dict().items()}


def load_weights(model: VideoTextModel, tensors: Mapping[str, Tensor], source: str) -> None:
    """Put tensors under CLIP4Clip's names into `model`. Raises CheckpointError naming `source` when they do not fit."""
    names = {parameter_name(name): name for name in model.state_dict()}
    load_strict(model, {names.get(k, k): v for k, v in tensors.items()}, source)
