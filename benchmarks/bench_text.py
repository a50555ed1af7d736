"""Captions cut to the longest of the batch, against the same captions filled up to 32 and to 77 tokens.

The text tower has ViT-B/32's sizes (width 512, 12 layers) and random weights. Captions have 5 to 20 words, drawn. The
features of all three must agree.
"""

import argparse
from functools import partial
from pathlib import Path

import numpy as np
import torch

from benchmarks.timing import race, write_races
from dataloaders.datasets import trim
from modules.encoders.clip import CLIP, ClipSizes
from modules.tokenizer import Tokenizer

SIZES = ClipSizes(
    embed_dim=512,
    image_resolution=32,
    vision_layers=1,
    vision_width=64,
    patch_size=32,
    context_length=77,
    vocab_size=49408,
    text_width=512,
    text_heads=8,
    text_layers=12,
    vision_heads=1,
)
WORDS = (
    "a the man woman dog is are walking cooking playing with in on street kitchen guitar red small two people".split()
)


@torch.inference_mode()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--captions", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--json", type=Path, help="write what was measured to this file as well")
    args = parser.parse_args()
    generator, tokenizer = np.random.default_rng(0), Tokenizer()
    texts = [" ".join(generator.choice(WORDS, generator.integers(5, 21))) for _ in range(args.captions)]
    torch.manual_seed(0)
    clip = CLIP(SIZES, "quick_gelu").eval()
    inputs = {"ours": trim(*tokenizer(texts, 32)), "32 tokens": tokenizer(texts, 32), "77 tokens": tokenizer(texts, 77)}
    ways = {name: partial(clip.encode_text, *given) for name, given in inputs.items()}
    longest = inputs["ours"][0].shape[1]
    found = race(f"{args.captions} captions, the longest of {longest} tokens", ways, args.rounds, warm_up=1)
    for features, _ in found.values():
        torch.testing.assert_close(features, found["ours"][0], rtol=1e-4, atol=1e-4)
    write_races(args.json)


if __name__ == "__main__":
    main()
