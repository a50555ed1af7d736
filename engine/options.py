"""Every flag: the groups of groups.py and those that the plug-ins bring, gathered, checked and resolved once.

:func:`parse_options` checks every value and every combination before anything is loaded; functions elsewhere
take the group they need.
"""

import argparse
import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dataloaders.registry import DATASETS
from dataloaders.video.rules import RULES
from engine.compat import COMPAT, DEAD_FLAGS, PARSER
from engine.groups import GROUPS, DataOptions, ModelOptions, RunOptions, TrainOptions
from modules.encoders import ENCODERS
from modules.heads import HEADS, INTERACTIONS, Head
from modules.losses import LOSSES
from plugins import NoOptions, Registry, add_flags, from_flags, out_of_range

OF_OLD_COMMANDS = {"loose_type", "expand_msrvtt_sentences", "slice_framepos"}  # flags by which CLIP4Clip's are known
AUTO = Path("auto")  # --resume_model auto
REGISTRIES: tuple[Registry[Any], ...] = (DATASETS, RULES, ENCODERS, HEADS, INTERACTIONS, LOSSES)
ALL = [*GROUPS.values(), *(plugin.Options for registry in REGISTRIES for plugin in registry.values())]


@dataclass(frozen=True)
class Options:
    """All flags. `own`: registry's flag -> the own options of the plug-in that it chose.

    `values`: flag -> value, of plug-ins that were not chosen as well. `given`: the flags given with a value, which auto
    is not. `without_effect`: on flags given that do nothing.
    """

    data: DataOptions
    model: ModelOptions
    train: TrainOptions
    run: RunOptions
    own: Mapping[str, Any]
    values: Mapping[str, Any]
    given: frozenset[str] = frozenset()
    without_effect: tuple[str, ...] = ()

    def as_dict(self) -> dict[str, Any]:
        """Flat and JSON-ready: flag -> value."""
        return {k: str(v) if isinstance(v, Path) else v for k, v in self.values.items()}

    @property
    def evaluation_precision(self) -> str:
        """What was asked for by name; else float32, or the weights' own type where they are half."""
        asked = "precision" in self.given or self.run.fp16 or self.run.precision == "half"
        return self.run.precision if asked else "fp32"

    @property
    def of_source(self) -> list[str]:
        """Flags that have the defaults of --compat's project."""
        return [f"--{n} {self.values[n]}" for n in COMPAT[self.model.compat].defaults if n not in self.given]

    @property
    def unlike_source(self) -> list[str]:
        """Of a command in CLIP4Clip's form, without --compat: flags not given that have another default there."""
        if COMPAT[self.model.compat].defaults or not OF_OLD_COMMANDS & self.given:
            return []
        here = {name: self.values[name] for name in PARSER if name not in self.given}
        return [f"--{name} {value} ({PARSER[name]} there)" for name, value in here.items() if value != PARSER[name]]


def plugin_flags(registry: Registry[Any]) -> dict[tuple[str, ...], list[dataclasses.Field]]:
    """The plug-ins' own flags: names of those that have them in common -> the flags.

    Plug-ins share flags where they have the same Options class, or where one extends that of another.
    """
    owners: dict[dataclasses.Field, tuple[str, ...]] = {}
    for name, plugin in registry.items():
        owners |= {field: (*owners.get(field, ()), name) for field in dataclasses.fields(plugin.Options)}
    return {names: [field for field in owners if owners[field] == names] for names in owners.values()}


def defaults(compat: str = "none") -> dict[str, Any]:
    """Flag -> the value that it has when it is not given."""
    plain = {field.name: field.default for options in ALL for field in dataclasses.fields(options)}
    return plain | COMPAT[compat].defaults


def recorded(values: Mapping[str, Any]) -> dict[str, Any]:
    """`as_dict` of an earlier run, completed by the flags that its version of the code did not have."""
    known = defaults(values.get("compat", "none")) | dict(values)
    known |= {r.flag: choose(r, known, values) for r in REGISTRIES if r.flag not in values}
    return {k: str(v) if isinstance(v, Path) else v for k, v in known.items()}


def build_parser() -> argparse.ArgumentParser:
    """The parser of ``main_task_retrieval.py``. Flags that are not given leave no trace in its namespace."""
    about = "Video-text retrieval with CLIP: zero-shot evaluation, fine-tuning, evaluation of checkpoints."
    parser = argparse.ArgumentParser("main_task_retrieval.py", allow_abbrev=False, description=about)
    for title, group in GROUPS.items():
        add_flags(parser.add_argument_group(title, group.__doc__), dataclasses.fields(group))
    for registry in REGISTRIES:
        for names, flags in plugin_flags(registry).items():
            add_flags(parser.add_argument_group(f"--{registry.flag} {', '.join(names)}"), flags)
    # torch.distributed.launch passes this; the environment says the same, and engine/distributed.py reads that.
    parser.add_argument("--local_rank", "--local-rank", type=int, default=argparse.SUPPRESS, help=argparse.SUPPRESS)
    return parser


def parse_options(argv: Sequence[str]) -> Options:
    """argv -> checked :class:`Options`. A bad flag, value or combination prints one line and exits with status 2."""
    parser = build_parser()
    for name in (token.split("=")[0].lstrip("-") for token in argv if token.startswith("--")):
        if name in DEAD_FLAGS:
            parser.error(f"--{name} {DEAD_FLAGS[name]}")
    given = vars(parser.parse_args(argv))
    given.pop("local_rank", None)
    try:
        return resolve(given)
    except ValueError as error:
        parser.error(str(error))


def resolve(given: Mapping[str, Any]) -> Options:
    """Flags given -> :class:`Options`. Raises ValueError about the first thing wrong, in words for the user."""
    named = {k: v for k, v in given.items() if v != "auto"}  # `auto` is what a flag has that is not given
    values = defaults(given.get("compat", "none")) | named
    for group in ALL:
        if problem := out_of_range(from_flags(group, values)):
            raise ValueError(problem)
    if values["fp16"]:
        if named.get("precision", "fp16") != "fp16":
            raise ValueError(f"--fp16 means --precision fp16, but --precision {named['precision']} was given")
        values["precision"] = "fp16"
    without_effect: list[str] = []
    for registry in REGISTRIES:
        values[registry.flag] = choose(registry, values, named)
        without_effect += unused_flags(registry, values, named)
    if values["precision"] == "auto":
        values["precision"] = COMPAT[values["compat"]].precision.get(values["encoder"], "auto")
    dataset = DATASETS[values["datatype"]]
    if values["select_on"] == "auto":
        values["select_on"] = "val" if "val" in dataset.splits else "test"
    chosen = {r.flag: r.get(values[r.flag]) for r in REGISTRIES}  # None for --interaction no
    own = {name: from_flags(plugin.Options if plugin else NoOptions, values) for name, plugin in chosen.items()}
    groups = {name: from_flags(group, values) for name, group in GROUPS.items()}
    options = Options(**groups, own=own, values=values, given=frozenset(named), without_effect=tuple(without_effect))
    check_model(options)
    check_run(options)
    return options


def follow(options: Options, spec: Mapping[str, Any]) -> Options:
    """`options` with the encoder of a sidecar's `spec`, where no flag chose one. Raises ValueError."""
    name, chosen = spec.get("name", options.model.encoder), options.model.encoder
    if name == chosen or name not in ENCODERS or "encoder" in options.given or chosen != ModelOptions.encoder:
        return options
    return resolve({flag: options.values[flag] for flag in options.given} | spec.get("options", {}) | {"encoder": name})


def choose(registry: Registry[Any], values: Mapping[str, Any], named: Mapping[str, Any]) -> str:
    """The name of the plug-in: the one asked for, or the one whose flag chooses it. Raises ValueError."""
    name = values[registry.flag]
    for names, flags in plugin_flags(registry).items():
        for field in flags:
            value = named.get(field.name, field.default)
            if field.metadata.get("chooses") and value != field.default and name not in names:
                if registry.flag in named:
                    raise ValueError(foreign(registry, field.name, value, names, name))
                name = names[0]
    if registry is RULES and name == "auto":
        return DATASETS[values["datatype"]].frame_rule
    known = [*(["no"] if registry is INTERACTIONS else []), *sorted(registry)]
    if name not in known:
        raise ValueError(f"--{registry.flag} must be one of {', '.join(known)}, got {name}")
    return name


def unused_flags(registry: Registry[Any], values: Mapping[str, Any], named: Mapping[str, Any]) -> list[str]:
    """What to say of flags given that belong to a plug-in that was not chosen. Raises ValueError for most of them.

    Those of datasets, and those declared as tolerated, stand in old commands where they never had an effect.
    """
    chosen, found = values[registry.flag], []
    for names, flags in plugin_flags(registry).items():
        for field in flags:
            if chosen not in names and named.get(field.name, field.default) != field.default:
                found.append(foreign(registry, field.name, named[field.name], names, chosen))
                if registry is not DATASETS and not field.metadata.get("tolerated"):
                    raise ValueError(found[-1])
    return found


def foreign(registry: Registry[Any], name: str, value: Any, owners: Sequence[str], chosen: str) -> str:
    flags = [getattr(registry[owner], "chosen_by", f"--{registry.flag} {owner}") for owner in owners]
    return f"--{name} {value} belongs to {' or '.join(flags)}, got --{registry.flag} {chosen}"


def check_model(options: Options) -> None:
    """Raises ValueError for parts of a model that do not go together."""
    model, given = options.model, options.given
    head = HEADS[model.sim_header]
    if not head.loose and model.loose_type and "loose_type" in given:
        raise ValueError(f"--sim_header {head.name} is not of --loose_type; leave --loose_type out")
    if head.loose and not model.loose_type:
        tight = " or ".join(name for name in HEADS if not HEADS[name].loose)
        raise ValueError(f"--loose_type=false belongs to --sim_header {tight}, got --sim_header {head.name}")
    fitting = [name for name, kind in HEADS.items() if kind.separable and kind.video is Head.video]
    if model.interaction != "no" and head.name not in fitting:
        problem = f"--interaction {model.interaction} takes the place of --sim_header {head.name}'s similarity"
        raise ValueError(f"{problem}; use it with {' or '.join(fitting)}")
    if problem := LOSSES[model.loss].refuses(options.own["loss"], head, model.interaction):
        raise ValueError(problem)
    encoder = ENCODERS[model.encoder]
    encoder.check_installed()
    if options.run.precision == "half" and not encoder.has_half:
        raise ValueError(f"--precision half is for a plain CLIP, as in CLIP4Clip; {encoder.title} is trained in fp32")
    merging = encoder.merge_weight(options.own["encoder"]) is not None
    if merging and not (encoder.own_weights(options.own["encoder"]) or model.finetuned_path or model.init_model):
        raise ValueError("--mergeclip averages the file of --pretrained_path with a CLIP; add --pretrained_path")


def check_frames(options: Options) -> None:
    """Raises ValueError unless there is one place that frames come from."""
    data = options.data
    if data.features_path is None and data.frames_path is None:
        raise ValueError("--features_path is required, or --frames_path for frames that are extracted already")
    if data.features_path and data.frames_path:
        raise ValueError("--features_path (videos) and --frames_path (extracted frames) exclude each other; give one")
    if data.frames_path and not data.frames_fps:
        raise ValueError("--frames_path needs --frames_fps, the pictures per second that were extracted")
    if data.frames_fps and not data.frames_path:
        raise ValueError("--frames_fps belongs to --frames_path")
    if data.frames_path and data.frame_cache:
        raise ValueError("--frame_cache keeps what is decoded from videos; with --frames_path leave it out")
    for name in ("frame_cache_format", "frame_cache_gb"):
        if name in options.given and not data.frame_cache:
            raise ValueError(f"--{name} belongs to --frame_cache")


def check_run(options: Options) -> None:
    """Raises ValueError for a run that cannot be."""
    model, train, run, values = options.model, options.train, options.run, options.values
    datatype, pieces = options.data.datatype, train.gradient_accumulation_steps
    dataset = DATASETS[datatype]
    lists = dataset.split_flags.items()
    missing = {split: f"--{name} ({example})" for split, (name, example) in lists if values[name] is None}
    if not (run.do_train or run.do_eval):
        raise ValueError("nothing to do: give --do_train, --do_eval or both")
    for name in ("output_dir", "data_path"):
        if values[name] is None:
            raise ValueError(f"--{name} is required")
    check_frames(options)
    if run.eval_split in missing:
        raise ValueError(f"--datatype {datatype} needs {missing[run.eval_split]}")
    if run.do_train and "train" in missing:
        raise ValueError(f"--datatype {datatype} with --do_train needs {missing['train']}")
    for name in ("select_on", "eval_split"):
        if values[name] == "val" and "val" not in dataset.splits:
            raise ValueError(f"--{name} val: {datatype} has no val split; give test")
    if run.qb_norm and "train" in missing:
        raise ValueError(f"--qb_norm takes its query bank from the training captions; add {missing['train']}")
    for name in ("do_train", "finetuned_path", "init_model"):
        if model.zeroshot and values[name]:
            raise ValueError(f"--zeroshot evaluates weights as they were pre-trained; leave it or --{name} out")
    if model.init_model and model.finetuned_path:
        raise ValueError("--init_model and --finetuned_path both name the weights to load; give one")
    if run.do_train and model.finetuned_path:
        raise ValueError("--finetuned_path is for evaluation; to train on from a checkpoint give --init_model")
    if train.resume_model and not run.do_train:
        raise ValueError("--resume_model continues a training run; add --do_train")
    if train.resume_model and train.overwrite:
        raise ValueError("--overwrite starts anew, --resume_model goes on with what is there; give one of them")
    least = LOSSES[model.loss].least_pairs
    if run.do_train and train.batch_size < least:
        alone = "nothing to tell apart" if train.batch_size == 1 else "too few"
        problem = f"--batch_size {train.batch_size}: {alone}, so that --loss {model.loss} would teach nothing"
        raise ValueError(f"{problem}; give at least {least}")
    if train.resume_model not in (None, AUTO) and model.init_model:
        raise ValueError("--resume_model already holds the weights; leave --init_model out")
    if pieces > train.batch_size:
        exceeds = f"--gradient_accumulation_steps {pieces} exceeds --batch_size {train.batch_size}"
        raise ValueError(f"{exceeds}: a piece holds at least one pair")
