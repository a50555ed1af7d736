"""`make bench` runs every benchmark, and what it leaves can be read."""

import json
import sys
from pathlib import Path

from repository_copy import ROOT, run_in

from benchmarks.__main__ import LEFT_OUT, SCRIPTS


def test_every_benchmark_is_run():
    found = {path.stem for path in (ROOT / "benchmarks").glob("bench_*.py")}
    assert found == SCRIPTS.keys() | LEFT_OUT
    assert "$(BIN)/python -m benchmarks\n" in (ROOT / "Makefile").read_text()


def test_tables_and_figures_are_written(tmp_path: Path):
    run_in(ROOT, sys.executable, "-m", "benchmarks", "--only", "bench_text", "--output_dir", str(tmp_path))
    (race,) = json.loads((tmp_path / "bench_text.json").read_text())["races"]
    assert race["contenders"].keys() == {"ours", "32 tokens", "77 tokens"}
    assert race["contenders"]["ours"]["ratio"] == race["contenders"]["ours"]["cpu_ratio"] == 1
    assert "77 tokens" in (tmp_path / "bench_text.txt").read_text()
