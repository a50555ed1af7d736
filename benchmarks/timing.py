"""Contenders timed in one process, in turn."""

import time
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import pandas as pd


def race(title: str, contenders: Mapping[str, Callable[[], Any]], rounds: int, warm_up: int = 0) -> dict[str, Any]:
    """Print each contender's median time and the median over rounds of its time / that of "ours".

    In every round contenders run in random order; the first `warm_up` are not measured. Returns what each gave last.
    """
    generator, results = np.random.default_rng(0), {}
    seconds = pd.DataFrame(index=range(-warm_up, rounds), columns=list(contenders), dtype=float)
    for number in seconds.index:
        for name in generator.permutation(list(contenders)).tolist():
            began = time.perf_counter()
            results[name] = contenders[name]()
            seconds.loc[number, name] = time.perf_counter() - began
    print(f"{title}, {rounds} rounds")
    for name, taken in seconds.loc[0:].items():
        ratio = (taken / seconds["ours"]).median()
        print(f"  {name:18s} {taken.median() * 1e3:8.1f} ms   {ratio:5.2f} x our time", flush=True)
    return results
