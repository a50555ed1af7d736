"""Make small video-text datasets in the layouts of the real ones, and a tiny CLIP checkpoint to train on them.

Clips show coloured shapes that stand, move, change or take turns; every test caption is true of one clip of its gallery
only. Writes <output_dir>/<datatype>/ and <output_dir>/clip/tiny_clip.pt. Same options, same bytes.
"""

import argparse
import hashlib
import io
import json
import math
import os
import shutil
import sys
from pathlib import Path
from random import Random

import torch

if __package__ in (None, ""):  # run as a file: the repository root is not on the path
    sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from checkpoints.whole import write_whole
from plugins import user_path
from preprocess.parallel import run_parallel
from tools.sample_data.plan import LAYOUTS, SPLITS, Clip, Planner, dataset_files
from tools.sample_data.render import write_video

CLIP_SIZES = {"resolution": 64, "patch": 16, "embed_dim": 128}
CLIP_SIZES |= {"vision_width": 128, "vision_layers": 4, "text_width": 128, "text_layers": 3}


def parse_args(argv: list[str] | None) -> argparse.Namespace:
    """Options of the command; exits with a message naming flag and value where one is impossible."""
    parser = argparse.ArgumentParser("tools.sample_data", allow_abbrev=False, description=__doc__.splitlines()[0])
    parser.formatter_class = argparse.ArgumentDefaultsHelpFormatter
    add = parser.add_argument
    add(
        "--output_dir",
        required=True,
        type=user_path,
        default=argparse.SUPPRESS,
        help="gets a folder a dataset and clip/",
    )
    add("--datatype", required=True, choices=[*LAYOUTS, "all"], default=argparse.SUPPRESS, help="layout to write")
    add("--seed", type=int, default=0, help="everything follows from it")
    for n, split in enumerate(SPLITS):
        defaults = ", ".join(f"{name} {recipe.counts[n]}" for name, (recipe, _) in LAYOUTS.items())
        add(f"--n_{split}", type=int, default=argparse.SUPPRESS, help=f"{split} clips (default: {defaults})")
    order = "msrvtt: add this many pairs of test clips that differ in frame order only, and to train in proportion"
    add("--order_pairs", type=int, default=0, help=order)
    plain = "plain: one a clip (paragraphs stay whole), with every fact in one fixed wording"
    add("--captions", choices=("varied", "plain"), default="varied", help=plain)
    add("--resolution", type=int, default=96, help="short side of the smallest clips, pixels")
    add("--min_seconds", type=float, default=2.0, help="shortest clip, seconds (didemo: always 5 a moment)")
    add("--max_seconds", type=float, default=5.0, help="longest clip, seconds")
    add("--num_workers", type=int, default=os.cpu_count() or 1, help="rendering processes")
    add("--force", action="store_true", help="make it anew, over whatever its folder holds")
    for name, value in CLIP_SIZES.items():
        add(f"--clip_{name}", type=int, default=value, help="tiny checkpoint: " + name.replace("_", " "))
    args = parser.parse_args(argv)
    args.datatypes = list(LAYOUTS) if args.datatype == "all" else [args.datatype]
    lowest = {"seed": 0, "n_train": 1, "n_val": 0, "n_test": 1, "order_pairs": 0, "num_workers": 0}
    for flag, low in (lowest | {f"clip_{name}": 1 for name in CLIP_SIZES}).items():
        value = getattr(args, flag, low)
        if value < low:
            parser.error(f"--{flag} must be >= {low}, got {value}")
        if flag.endswith("_width") and value % 64:
            parser.error(f"--{flag} must be a multiple of the head width 64, got {value}")
    datatype, n_val, pairs = args.datatype, getattr(args, "n_val", None), args.order_pairs
    has_val = any(LAYOUTS[name][0].counts[1] for name in args.datatypes)
    shortest, longest, side, patch = args.min_seconds, args.max_seconds, args.clip_resolution, args.clip_patch
    for wrong, message in (
        (not 32 <= args.resolution <= 2160, f"--resolution must be 32 to 2160 pixels, got {args.resolution}"),
        (not 0.5 <= shortest < math.inf, f"--min_seconds must be >= 0.5, got {shortest}"),
        (not shortest <= longest < math.inf, f"--max_seconds must be >= --min_seconds {shortest}, got {longest}"),
        (pairs and datatype not in ("msrvtt", "all"), f"--order_pairs {pairs}: only msrvtt has them, not {datatype}"),
        (n_val and not has_val, f"--n_val {n_val}: {datatype} has no validation split"),
        (n_val == 0 and has_val and datatype != "all", f"--n_val must be >= 1 for {datatype}, got 0"),
        (side % patch, f"--clip_resolution must be a multiple of --clip_patch {patch}, got {side}"),
    ):
        if wrong:
            parser.error(message)
    return args


def tiny_clip(sizes: dict[str, int], seed: int) -> bytes:
    """A checkpoint under OpenAI's names: random float32, initialised as the code of CLIP does (Radford et al. 2021).

    `sizes`: resolution, patch, embed_dim; width and layers of vision and text. The same seed and sizes give the same
    bytes. Three integer tensors (input_resolution, context_length, vocab_size) mark OpenAI's layout, as in their files.
    """
    vision, text, patch, embed = (sizes[name] for name in ("vision_width", "text_width", "patch", "embed_dim"))
    integers = {"input_resolution": sizes["resolution"], "context_length": 77, "vocab_size": 49408}
    positions = (sizes["resolution"] // patch) ** 2 + 1
    weights = {  # shape and standard deviation
        "positional_embedding": ((integers["context_length"], text), 0.01),
        "text_projection": ((text, embed), text**-0.5),
        "visual.class_embedding": ((vision,), vision**-0.5),
        "visual.positional_embedding": ((positions, vision), vision**-0.5),
        "visual.proj": ((vision, embed), vision**-0.5),
        # The paper's code leaves the patch embedding to PyTorch's default, whose standard deviation this is.
        "visual.conv1.weight": ((vision, 3, patch, patch), (3 * 3 * patch * patch) ** -0.5),
        "token_embedding.weight": ((integers["vocab_size"], text), 0.02),
    }
    norms = {"visual.ln_pre": vision, "visual.ln_post": vision, "ln_final": text}
    for tower, width, layers in (("visual.", vision, sizes["vision_layers"]), ("", text, sizes["text_layers"])):
        for layer in range(layers):
            block, residual = f"{tower}transformer.resblocks.{layer}", width**-0.5 * (2 * layers) ** -0.5
            weights[f"{block}.attn.in_proj_weight"] = ((3 * width, width), width**-0.5)
            weights[f"{block}.attn.out_proj.weight"] = ((width, width), residual)
            weights[f"{block}.mlp.c_fc.weight"] = ((4 * width, width), (2 * width) ** -0.5)
            weights[f"{block}.mlp.c_proj.weight"] = ((width, 4 * width), residual)
            norms |= {f"{block}.ln_1": width, f"{block}.ln_2": width}
    generator = torch.Generator().manual_seed(seed)
    state = {name: torch.randn(shape, generator=generator) * std for name, (shape, std) in weights.items()}
    for name, (shape, _) in weights.items():
        if ".resblocks." in name:
            state[name.removesuffix("weight") + "bias"] = torch.zeros(shape[0])
    for name, width in norms.items():
        state |= {f"{name}.weight": torch.ones(width), f"{name}.bias": torch.zeros(width)}
    state["logit_scale"] = torch.tensor(math.log(1 / 0.07))
    file = io.BytesIO()
    torch.save(state | {name: torch.tensor(value) for name, value in integers.items()}, file)
    return file.getvalue()


def make_folder(folder: Path, files: dict[str, bytes], clips: dict[str, Clip], force: bool, workers: int) -> None:
    """Write files as they are and clips rendered, by path; does nothing where the same are there already.

    sample.json has a hash of what was planned, and lists the files once all are written, so that an interrupted run
    is told from a whole one and made again. Raises FileExistsError over somebody else's files, OSError.
    """
    plan = hashlib.sha256(b"".join(files.values()) + repr((list(files), clips)).encode()).hexdigest()
    record_file = folder / "sample.json"
    try:
        record = json.loads(record_file.read_text())
        earlier_plan, earlier_files = record["plan"], record["files"]
    except (OSError, ValueError, LookupError, TypeError):
        earlier_plan = earlier_files = None  # no sample.json, or not one of ours
    if not force and earlier_files != [] and folder.exists() and any(folder.iterdir()):
        if earlier_plan == plan and all((folder / path).is_file() for path in earlier_files):
            print(f"{folder} is up to date")
            return
        what = "a sample made with other parameters" if earlier_plan else "files that this command did not make"
        raise FileExistsError(f"{folder} holds {what}: choose another --output_dir or pass --force to write over it")
    folder.mkdir(parents=True, exist_ok=True)
    record_file.write_text(json.dumps({"plan": plan, "files": []}))
    if clips and (folder / "videos").exists():
        shutil.rmtree(folder / "videos")
    (folder / "order_pairs.json").unlink(missing_ok=True)
    for path, content in files.items():
        (folder / path).write_bytes(content)
    tasks = [(folder / path, clip) for path, clip in clips.items()]
    for _, error in run_parallel(write_video, tasks, workers, folder.name, lambda task: f"{task[0]}: process killed"):
        if error:
            raise OSError(error)
    record = json.dumps({"plan": plan, "files": [*files, *clips]}, indent=1)
    write_whole(record_file, lambda file: file.write(record.encode()))
    print(f"{folder}: {len(files)} files and {len(clips)} clips written")


def main(argv: list[str] | None = None) -> int:
    args = parse_args(argv)
    try:
        clip = tiny_clip({name: getattr(args, f"clip_{name}") for name in CLIP_SIZES}, args.seed)
        make_folder(args.output_dir / "clip", {"tiny_clip.pt": clip}, {}, args.force, args.num_workers)
        for datatype in args.datatypes:
            recipe, _ = LAYOUTS[datatype]
            counts = {split: getattr(args, f"n_{split}", n) if n else 0 for split, n in zip(SPLITS, recipe.counts)}
            # Each dataset has a stream of its own, so that --datatype all writes what single runs write.
            rng = Random(f"{datatype} {args.seed}")
            seconds = args.min_seconds, args.max_seconds
            planner = Planner(recipe, args.resolution, seconds, args.captions == "plain", rng)
            splits = planner.splits(counts, args.order_pairs if datatype == "msrvtt" else 0)
            files, clips = dataset_files(datatype, splits, counts, rng)
            make_folder(args.output_dir / datatype, files, clips, args.force, args.num_workers)
    except (FileExistsError, ValueError) as error:
        print(f"tools.sample_data: {error}", file=sys.stderr)
        return 2 if isinstance(error, ValueError) else 1
    except OSError as error:
        print(f"tools.sample_data: cannot write below --output_dir {args.output_dir}: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
