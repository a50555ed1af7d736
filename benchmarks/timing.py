"""Contenders timed in one process, in turn."""

import json
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch

RACES: list[dict[str, Any]] = []  # those of this process


def race(
    title: str,
    contenders: Mapping[str, Callable[[], Any]],
    rounds: int,
    warm_up: int = 0,
    before: Mapping[str, Callable[[], Any]] | None = None,
) -> dict[str, Any]:
    """Print each contender's median time and the median over rounds of its time / that of "ours".

    Both once more by the processor time of this process, which other work on the machine disturbs less. In every round
    contenders run in random order; the first `warm_up` are not measured. before: what is done before a contender runs,
    untimed. Returns what each gave last.
    """
    generator, results, before = np.random.default_rng(0), {}, before or {}
    seconds = pd.DataFrame(index=range(-warm_up, rounds), columns=list(contenders), dtype=float)
    spent = seconds.copy()
    for number in seconds.index:
        for name in generator.permutation(list(contenders)).tolist():
            before.get(name, lambda: None)()
            began, before_it = time.perf_counter(), time.process_time()
            results[name] = contenders[name]()
            seconds.loc[number, name] = time.perf_counter() - began
            spent.loc[number, name] = time.process_time() - before_it
    print(f"{title}, {rounds} rounds")
    print(f"  {'':24s} {'ms':>8s} {'/ ours':>8s} {'CPU ms':>8s} {'/ ours':>8s}")
    told: dict[str, dict[str, float]] = {}
    for name in contenders:
        told[name] = {}
        for what, taken in (("", seconds.loc[0:]), ("cpu_", spent.loc[0:])):
            told[name][f"{what}median_seconds"] = taken[name].median()
            told[name][f"{what}ratio"] = (taken[name] / taken["ours"]).median()
        wall, ratio, cpu, cpu_ratio = told[name].values()
        print(f"  {name:24s} {wall * 1e3:8.1f} {ratio:8.2f} {cpu * 1e3:8.1f} {cpu_ratio:8.2f}", flush=True)
    RACES.append({"title": title, "rounds": rounds, "contenders": told})
    return results


def write_races(path: Path | None) -> None:
    """All races of this process as JSON, where a path is given."""
    if path is not None:
        about = {"torch": torch.__version__, "threads": torch.get_num_threads()}
        path.write_text(json.dumps(about | {"races": RACES}, indent=1) + "\n", encoding="utf-8")
