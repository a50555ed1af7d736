"""Ranks and DSL of N captions x V videos from features of width 512: in strips, against the whole matrix at once.

"ours" is what evaluation does: similarities, raw ranks both ways and DSL both ways in strips, the matrix never held.
"whole" multiplies once and holds what it needs: the matrix, DSL in float64, the scores of the caption groups. Each side
runs in a process of its own; printed are seconds and the peak memory of the process, of which torch itself takes part.
Above --most_whole scores only "ours" runs. Both must give the same numbers.
"""

import argparse
import time
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from typing import Any

import numpy as np
import pandas as pd
import torch
from torch import Tensor

from engine.distributed import setup
from engine.progress import peak_memory_mb
from engine.scores import Computed
from modules.encoders.clip import CLIP, ClipSizes
from modules.heads import HEADS
from modules.metrics import Metrics, retrieval_metrics, summarize
from modules.model import VideoTextModel

WIDTH = 512
SIZES = ClipSizes(WIDTH, 16, 1, 64, 8, 77, 64, 64, 1, 1, 1)  # of an encoder that only lends its logit scale


def features(n: int, v: int) -> tuple[Tensor, Tensor, np.ndarray]:
    """Unit vectors of captions and videos, a caption near its own video, and whose each is."""
    generator, owner = torch.Generator().manual_seed(0), np.arange(n) * v // n
    video = torch.randn(v, WIDTH, generator=generator)
    text = torch.randn(n, WIDTH, generator=generator).mul_(3).add_(video[torch.from_numpy(owner)])
    return torch.nn.functional.normalize(text, dim=1), torch.nn.functional.normalize(video, dim=1), owner


def whole_ranks(sim: Tensor, owner: Tensor) -> tuple[Tensor, Tensor]:
    groups = torch.full((sim.shape[1],) * 2, float("-inf"), dtype=sim.dtype)
    groups.scatter_reduce_(0, owner[:, None].expand_as(sim), sim, "amax")
    own = groups.diagonal()
    return (sim >= sim.gather(1, owner[:, None])).sum(1) - 1, (groups >= own).sum(0) - 1


def whole(sim: Tensor, owner: Tensor) -> Metrics:
    raw, double = whole_ranks(sim, owner), sim.double()
    dsl = (whole_ranks(double * double.softmax(dim), owner)[dim] for dim in (0, 1))
    rows = {"raw": raw, "dsl": dsl}
    return {kind: dict(zip(("t2v", "v2t"), map(summarize, ranks))) for kind, ranks in rows.items()}


def measure(side: str, n: int, v: int, memory_mb: int, device: str) -> dict[str, Any]:
    """One side, in this process."""
    world = setup(device)
    encoder = CLIP(SIZES, "quick_gelu")
    model = VideoTextModel(encoder, HEADS["meanP"](encoder.head_sizes)).eval().to(world.device)
    text, video, owner = features(n, v)
    text, video = text.to(world.device), video.to(world.device)
    began = time.perf_counter()
    with torch.inference_mode():
        if side == "ours":
            found = retrieval_metrics(Computed(model, text, video, memory_mb), owner)
        else:
            found = whole(model.similarity(text, video), torch.from_numpy(owner))
    seconds = time.perf_counter() - began
    return {"side": side, "seconds": seconds, "peak MiB": peak_memory_mb(torch.device("cpu")), "found": found}


def main() -> None:
    parser = argparse.ArgumentParser("benchmarks.bench_ranks", allow_abbrev=False, description=__doc__)
    parser.add_argument("--captions", type=int, default=10_000)
    parser.add_argument("--videos", type=int, default=10_000)
    parser.add_argument("--similarity_memory_mb", type=int, default=1024)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--most_whole", type=float, default=2e8, help="largest matrix that the other side is given")
    parser.add_argument("--device", default="auto", choices=("auto", "cpu", "cuda"))
    args = parser.parse_args()
    n, v = args.captions, args.videos
    sides, runs = ("ours", "whole") if n * v <= args.most_whole else ("ours",), []
    generator = np.random.default_rng(0)
    for side in [side for _ in range(args.rounds) for side in generator.permutation(sides).tolist()]:
        with ProcessPoolExecutor(1, get_context("spawn")) as process:
            given = (side, n, v, args.similarity_memory_mb, args.device)
            runs.append(process.submit(measure, *given).result())
    medians = pd.DataFrame(runs).drop(columns="found").groupby("side").median()
    print(f"{n} captions x {v} videos, {torch.get_num_threads()} threads, {args.rounds} rounds; medians")
    print(medians.to_string(float_format="{:.1f}".format), flush=True)
    if len(sides) == 2:
        print(
            (medians.loc["whole"] / medians.loc["ours"]).rename("whole / ours").to_string(float_format="{:.2f}".format)
        )
    if any(run["found"] != runs[0]["found"] for run in runs):
        raise SystemExit("the sides gave different numbers")


if __name__ == "__main__":
    main()
