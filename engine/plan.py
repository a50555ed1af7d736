"""``--dry_run``: everything a run checks before its model is built, and what it would do; no weights are loaded."""

from __future__ import annotations

from pathlib import Path

from checkpoints.download import OPENAI_CLIP
from checkpoints.read import CheckpointError
from engine.build import weights_path
from engine.data import Evaluator, RunData, load_run_data, query_bank
from engine.distributed import World
from engine.options import ModelOptions, Options
from engine.options_check import AUTO
from engine.resume import LAST, SELECTED

CONTEXT = 77  # tokens that OpenAI's CLIPs read
# Of OpenAI's CLIPs: parameters, layers and width of the image tower, tokens of an image.
SIZES = {"ViT-B/32": (151.3e6, 12, 768, 50), "ViT-B/16": (149.6e6, 12, 768, 197), "ViT-L/14": (427.6e6, 24, 1024, 257)}
KEPT = 17  # numbers that a transformer layer keeps per token and channel, attention fused (arXiv 2205.05198, section 4)


def weight_files(model: ModelOptions) -> dict[Path, str]:
    """The files that a run starts from, each with what will happen to it. CheckpointError for one that is not there."""
    own = [flag for flag in ("finetuned_path", "init_model", "pretrained_path") if getattr(model, flag)]
    found = {weights_path(model): f"of --{own[0]}"} if own else {}
    if own and not (model.mergeclip and own == ["pretrained_path"]):
        return found
    if model.pretrained_clip_name not in OPENAI_CLIP:
        path = Path(model.pretrained_clip_name).expanduser()
        if not path.exists():
            raise CheckpointError(
                f"--pretrained_clip_name {path}: no such file, and not one of the names {', '.join(OPENAI_CLIP)}"
            )
        return found | {path: "of --pretrained_clip_name"}
    path = model.cache_dir.expanduser() / OPENAI_CLIP[model.pretrained_clip_name][0]
    return found | {path: "in --cache_dir" if path.exists() else "will be downloaded"}


def training_steps(options: Options, world: World, data: RunData) -> list[str]:
    """Lines on training. Raises ValueError for a batch that does not fit the data or the processes."""
    evaluator = Evaluator(options, world, tokenize=list, image_size=1)  # nothing is read or tokenised
    loader, training = evaluator.training_pairs(data.train), options.train
    return [
        f"train: {len(data.train.videos)} videos, {len(loader.dataset)} items; --batch_size {training.batch_size} = "
        f"{world.size} process(es) x {training.batch_size // world.size}, in {training.gradient_accumulation_steps} "
        f"piece(s); {training.epochs} epochs x {len(loader)} steps = {training.epochs * len(loader)} steps",
        f"selects the epoch on: {training.select_on} ({len(data.selection.videos)} videos)",
    ]


def memory(options: Options, world: World) -> str:
    """A rough line on the memory of one process: parameters and optimiser in float32, activations of the image tower.

    The text tower adds little. Sizes of a file are known once it is read, so there is no estimate for one.
    """
    model, training, run = options.model, options.train, options.run
    if model.pretrained_clip_name not in SIZES or model.finetuned_path or model.init_model or model.pretrained_path:
        return "memory: no estimate, the sizes of the model are in its file"
    parameters, layers, width, tokens = SIZES[model.pretrained_clip_name]
    size = 4 if run.precision == "fp32" else 2
    if run.do_train:
        clips = -(-training.batch_size // world.size // training.gradient_accumulation_steps)
        kept = (layers + KEPT) if training.grad_checkpointing else layers * KEPT
        fixed = 16 * parameters  # weights, gradient, two moments
    else:
        clips, kept, fixed = run.batch_size_val, KEPT, 4 * parameters
    activations = clips * options.data.max_frames * tokens * width * kept * size
    held = "weights and optimiser" if run.do_train else "weights"
    return (
        f"memory: roughly {(fixed + activations) / 2**30:.1f} GiB a process: {fixed / 2**30:.1f} for {held}, "
        f"{activations / 2**30:.1f} for {clips} clips at a time of {options.data.max_frames} frames"
    )


def plan(options: Options, world: World) -> list[str]:
    """What the run would do, in lines. Raises for everything that it would stop at before its weights are read."""
    data_options, run, resume = options.data, options.run, options.train.resume_model
    weights = weight_files(options.model)
    if options.model.pretrained_clip_name in OPENAI_CLIP and data_options.max_words > CONTEXT:
        raise ValueError(f"--max_words must be at most {CONTEXT} for this CLIP, got {data_options.max_words}")
    if resume and resume != AUTO and not resume.is_file():
        raise CheckpointError(f"--resume_model {resume}: no such file; it takes a run's checkpoint_last.pt, or auto")
    data = load_run_data(options, next(iter(weights)))
    lines = [f"--{name} {value}" for name, value in options.as_dict().items()]
    lines += [f"weights: {path} ({what})" for path, what in weights.items()]
    lines += [f"on: {world.device}, {world.size} process(es), {run.precision}", memory(options, world)]
    files = ["log.txt", "results.json", *(["similarity.npz"] if run.save_similarity else [])]
    if data.train is not None:
        lines += training_steps(options, world, data)
        files += ["history.jsonl", SELECTED, f"{SELECTED}.json", LAST]
    bank = query_bank(options)
    scored = data.scored
    lines.append(
        f"evaluate: {scored.dataset} {scored.name}: {len(scored.videos)} videos, {len(scored.captions)} "
        f"captions, {run.batch_size_val} clips a batch and process"
    )
    if bank is not None:
        lines.append(f"query bank: {len(bank.captions)} captions")
    written = [
        f"{run.output_dir / name}{' (overwritten)' if (run.output_dir / name).exists() else ''}"
        for name in files
        if name != "log.txt"
    ]
    return [*lines, "writes: " + ", ".join(written), "dry run: nothing is wrong so far; the weights have not been read"]
