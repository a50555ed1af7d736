"""Contenders timed in one process, in turn."""

import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np


def interleaved(
    contenders: Mapping[str, Callable[[], Any]], rounds: int, warm_up: int = 0
) -> tuple[dict[str, np.ndarray], dict[str, Any]]:
    """Seconds [rounds] of each contender, and what each returned last.

    Within every round they run in random order; the first `warm_up` rounds are not measured.
    """
    generator = np.random.default_rng(0)
    seconds: dict[str, list[float]] = {name: [] for name in contenders}
    results = {}
    for _ in range(warm_up + rounds):
        for name in generator.permutation(list(contenders)).tolist():
            began = time.perf_counter()
            results[name] = contenders[name]()
            seconds[name].append(time.perf_counter() - began)
    return {name: np.array(taken[warm_up:]) for name, taken in seconds.items()}, results


def median_ratio(other: np.ndarray, ours: np.ndarray) -> float:
    """The median over rounds of their time / our time: what slows a whole round falls out of it."""
    return float(np.median(other / ours))


def compare(title: str, ours: Callable[[], Any], other: Callable[[], Any], rounds: int) -> tuple[Any, Any]:
    """Time both and print a line; what they returned."""
    taken, results = interleaved({"ours": ours, "other": other}, rounds)
    mine, theirs = (np.median(taken[name]) for name in ("ours", "other"))
    ratio = median_ratio(taken["other"], taken["ours"])
    print(f"{title:<28} ours {mine:6.2f} s   other {theirs:6.2f} s   other / ours {ratio:5.2f}", flush=True)
    return results["ours"], results["other"]


def make_sample_data(flags: Sequence[str]) -> int:
    """``python -m tools.sample_data`` with these flags; its exit status."""
    return subprocess.run([sys.executable, "-m", "tools.sample_data", *flags]).returncode
