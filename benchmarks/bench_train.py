"""Training steps of ViT-B/32 and ViT-L/14: clips a second, share of the device's peak, and where the time goes.

Contenders, in random order within every round, on the same pairs in the same process:

- ours: the project's own Trainer, eager and with --compile;
- textbook: the same weights and the same step in the usual layout: sequence-first nn.MultiheadAttention, captions
  padded to --max_words, eager.

Their first losses must agree. Printed for each precision: median seconds of a step, clips a second, the ratio of every
contender's time to ours (median of the rounds), and the share of two rates: of one large matrix product on this device
in this precision, measured here, and of the card's data sheet where the card is known. The work is that of ours,
counted by torch's FlopCounterMode, so that what is wasted on padding counts for nothing. Then the operations that take
most of an eager step. Reading videos is not part of it: pixels are random and in memory.

Without a CUDA device the models are reduced to a few layers and the batch to a few clips, and only float32 is measured:
such figures compare the contenders on this CPU, and say nothing about a GPU.
"""

import argparse
import json
import random
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pandas as pd
import torch
from torch import Tensor, nn
from torch.profiler import ProfilerActivity, profile
from torch.utils.flop_counter import FlopCounterMode

from engine.distributed import World, setup
from engine.step import Trainer, trade
from modules.encoders.clip import CLIP, ClipSizes
from modules.heads import HEADS
from modules.model import VideoTextModel
from modules.optim import BertAdam, parameter_groups
from modules.transformer import Transformer

B32 = ClipSizes(512, 224, 12, 768, 32, 77, 49408, 512, 8, 12, 12)
L14 = ClipSizes(768, 224, 24, 1024, 14, 77, 49408, 768, 12, 12, 16)
MODELS = {"ViT-B/32": (B32, 128, 12), "ViT-L/14": (L14, 16, 12)}  # sizes, pairs, frames
REDUCED = {
    "ViT-B/32": (replace(B32, vision_layers=2, text_layers=2, vocab_size=1000), 8, 2),
    "ViT-L/14": (replace(L14, vision_layers=1, text_layers=1, vocab_size=1000), 2, 1),
}
# Dense TFLOP/s of the data sheets: bf16, TF32.
PEAKS = {"H100": (989, 495), "H200": (989, 495), "A100": (312, 156), "L40S": (362, 183), "RTX 4090": (165, 83)}
MAX_WORDS, SHORTEST, LONGEST = 32, 8, 20  # tokens: captions of MSR-VTT have some 12
TOP = 12


class TextbookBlock(nn.Module):
    """CLIP's residual block as in OpenAI's release: sequence first, nn.MultiheadAttention."""

    def __init__(self, block: Any) -> None:
        super().__init__()
        width, self.ln_1, self.ln_2, self.mlp = block.ln_1.normalized_shape[0], block.ln_1, block.ln_2, block.mlp
        self.attn = nn.MultiheadAttention(width, block.attn.heads)
        self.attn.load_state_dict(block.attn.state_dict())

    def forward(self, x: Tensor, mask: Tensor | None) -> Tensor:
        y = self.ln_1(x)
        x = x + self.attn(y, y, y, need_weights=False, attn_mask=mask)[0]
        return x + self.mlp(self.ln_2(x))


class TextbookTransformer(nn.Module):
    def __init__(self, stack: Transformer) -> None:
        super().__init__()
        self.resblocks = nn.ModuleList(map(TextbookBlock, stack.resblocks))

    def forward(self, x: Tensor, mask: Tensor | None = None, causal: bool = False) -> Tensor:
        x, length = x.permute(1, 0, 2), x.shape[1]
        above = torch.full((length, length), float("-inf"), device=x.device).triu_(1) if causal else None
        for block in self.resblocks:
            x = block(x, above)
        return x.permute(1, 0, 2)


def make_batch(pairs: int, frames: int, padded: bool) -> SimpleNamespace:
    """Random pairs, the same on every call; captions cut to the longest, or `padded` to MAX_WORDS."""
    draws = torch.Generator().manual_seed(0)
    ids = torch.randint(1, 900, (pairs, MAX_WORDS), generator=draws)
    lengths = torch.randint(SHORTEST, LONGEST + 1, (pairs, 1), generator=draws)
    words = torch.arange(MAX_WORDS) < lengths
    ids = ids.masked_fill(~words, 0).scatter(1, lengths - 1, 999)
    cut = MAX_WORDS if padded else int(lengths.max())
    pixels = torch.randint(0, 256, (pairs, frames, 3, 224, 224), generator=draws, dtype=torch.uint8)
    everything = {"frames": pixels, "frame_mask": torch.ones(pairs, frames, dtype=torch.bool), "video_ids": ()}
    return SimpleNamespace(token_ids=ids[:, :cut], token_mask=words[:, :cut], **everything)


def make_trainer(kind: str, sizes: ClipSizes, precision: str, world: World) -> Trainer:
    torch.manual_seed(0)
    encoder = CLIP(sizes, "quick_gelu")
    model = VideoTextModel(encoder, HEADS["meanP"](encoder.head_sizes))
    if kind == "textbook":
        encoder.transformer = TextbookTransformer(encoder.transformer)  # type: ignore[assignment]
        encoder.visual.transformer = TextbookTransformer(encoder.visual.transformer)  # type: ignore[assignment]
    model.to(world.device)
    optimizer = BertAdam(parameter_groups(model.named_parameters(), 1e-4, 1e-3, 0.2), lr=1e-4)
    if kind == "ours, compiled":
        trade(model, world.device, grad_checkpointing=False, compile_blocks=True)
        optimizer.compile()
    return Trainer(model, optimizer, world, precision, 1.0, tf32=precision == "fp32")


def seconds_of(work: Callable[[], Any], device: torch.device, times: int) -> float:
    """Of one of `times` calls, all done on the device."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    began = time.perf_counter()
    for _ in range(times):
        work()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return (time.perf_counter() - began) / times


def product_rate(precision: str, device: torch.device) -> float:
    """FLOP/s of one large matrix product in the arithmetic of the step."""
    side = 8192 if device.type == "cuda" else 1024
    a = torch.randn(side, side, device=device, dtype=torch.bfloat16 if precision == "bf16" else torch.float32)
    if precision == "fp32":
        torch.set_float32_matmul_precision("high")
    seconds_of(lambda: a @ a, device, 2)
    rate = 2 * side**3 / min(seconds_of(lambda: a @ a, device, 5) for _ in range(5))
    torch.set_float32_matmul_precision("highest")
    return rate


def slowest(step: Callable[[], Any], device: torch.device) -> list[dict[str, Any]]:
    """The operations with the largest share of a step's time on the device."""
    on_cuda = device.type == "cuda"
    activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if on_cuda else [])]
    with profile(activities=activities) as run:
        step()
    name = "self_device_time_total" if on_cuda else "self_cpu_time_total"
    rows = sorted(((getattr(e, name), e.key, e.count) for e in run.key_averages()), reverse=True)
    total = sum(row[0] for row in rows)
    return [{"operation": key[:70], "share": round(t / total, 4), "calls": n} for t, key, n in rows[:TOP]]


def measure(name: str, precision: str, world: World, args: argparse.Namespace) -> dict[str, Any]:
    """All contenders on one model in one precision."""
    device = world.device
    sizes, pairs, frames = (MODELS if device.type == "cuda" else REDUCED)[name]
    kinds = ["ours", *(["ours, compiled"] if args.compile else []), "textbook"]
    trainers = {kind: make_trainer(kind, sizes, precision, world) for kind in kinds}
    batches = {kind: make_batch(pairs, frames, padded=kind == "textbook") for kind in kinds}
    steps = {kind: (lambda kind=kind: trainers[kind].step(batches[kind])[0]) for kind in kinds}
    with FlopCounterMode(display=False) as counter:
        trainers["ours"].backward(batches["ours"])
    trainers["ours"].optimizer.zero_grad(set_to_none=True)
    first = {kind: step() for kind, step in steps.items()}  # also chooses kernels, compiles and makes optimiser state
    if max(first.values()) - min(first.values()) > (1e-3 if precision == "fp32" else 3e-2) * first["ours"]:
        raise SystemExit(f"the losses differ: {first}: the contenders did not do the same work")
    for step in steps.values():
        step()
    rounds = []
    for _ in range(args.rounds):
        rounds.append({k: seconds_of(steps[k], device, args.steps) for k in random.sample(kinds, len(kinds))})
    taken, flops, product = pd.DataFrame(rounds)[kinds], counter.get_total_flops(), product_rate(precision, device)
    card = torch.cuda.get_device_name(device) if device.type == "cuda" else "CPU"
    peaks = next((peak for part, peak in PEAKS.items() if part in card), None)
    table = [
        {
            "contender": kind,
            "s a step": taken[kind].median(),
            "clips/s": pairs / taken[kind].median(),
            "time / ours": (taken[kind] / taken["ours"]).median(),
            "of a product": flops / taken[kind].median() / product,
            "of the peak": flops / taken[kind].median() / peaks[precision == "fp32"] / 1e12 if peaks else None,
        }
        for kind in kinds
    ]
    shape = f"{pairs} x {frames} frames, {sizes.vision_layers} + {sizes.text_layers} layers"
    return {
        "model": name,
        "batch": shape,
        "precision": precision,
        "TFLOP a step": flops / 1e12,
        "TFLOP/s of a product": product / 1e12,
        "contenders": table,
        "slowest": slowest(steps["ours"], device),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", choices=list(MODELS), default=list(MODELS))
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--steps", type=int, default=3, help="steps that are timed together")
    parser.add_argument("--device", default="auto", choices=("auto", "cpu", "cuda"))
    parser.add_argument("--compile", action=argparse.BooleanOptionalAction, default=True, help="a compiled contender")
    parser.add_argument("--json", type=Path, help="write what was measured to this file as well")
    args = parser.parse_args()
    world = setup(args.device)
    on_cuda = world.device.type == "cuda"
    precisions = ["fp32"]
    if on_cuda and torch.cuda.is_bf16_supported(including_emulation=False):
        precisions.append("bf16")
    where = (
        torch.cuda.get_device_name()
        if on_cuda
        else f"CPU, {torch.get_num_threads()} threads, models and batches reduced"
    )
    print(f"{where}; torch {torch.__version__}; captions of {SHORTEST} to {LONGEST} tokens")
    found = []
    for name in args.models:
        for precision in precisions:
            result = measure(name, precision, world, args)
            found.append(result)
            arithmetic = "fp32 (TF32)" if precision == "fp32" and on_cuda else precision
            print(f"\n{name}, {result['batch']}, {arithmetic}: {result['TFLOP a step']:.2f} TFLOP a step", flush=True)
            print(pd.DataFrame(result["contenders"]).to_string(index=False, float_format="{:.3f}".format))
            print(pd.DataFrame(result["slowest"]).to_string(index=False))
    if args.json:
        content = {"device": where, "torch": torch.__version__, "options": vars(args) | {"json": str(args.json)}}
        args.json.write_text(json.dumps(content | {"results": found}, indent=1) + "\n")


if __name__ == "__main__":
    main()
