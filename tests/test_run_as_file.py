"""Every command runs both as ``python -m package.name`` and as a file, the latter from any directory."""

from __future__ import annotations

import json
import os
import runpy
import subprocess
import sys
from contextlib import suppress
from pathlib import Path

import pytest
from launching import LIMIT, ROOT
from video_files import make_video

COMMANDS = [
    path.relative_to(ROOT)
    for folder in ("preprocess", "tools")
    for path in sorted((ROOT / folder).rglob("*.py"))
    if 'if __name__ == "__main__"' in path.read_text() or path.name == "__main__.py"
]
ENTRY = Path("inference.py")  # it imports main_task_retrieval.py, which the scripts run from elsewhere


def run(*command: object, cwd: Path, **variables: object) -> subprocess.CompletedProcess:
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    environment |= {name: str(value) for name, value in variables.items()}
    return subprocess.run(
        [sys.executable, *map(str, command)], cwd=cwd, env=environment, text=True, capture_output=True, timeout=LIMIT
    )


def test_the_commands_are_found():
    assert {"check_dataset", "compress_video", "demo", "rerun", "results"} <= {path.stem for path in COMMANDS}


# Runs files one after another as `python file --help` would, in one process that has imported torch already.
EACH_AS_A_FILE = """
import io, json, runpy, sys
from contextlib import redirect_stdout
import torch
outside, found = [p for p in sys.path if p != ''], {}
known = set(sys.modules)
for file in sys.argv[1:]:
    for name in set(sys.modules) - known:
        if not name.split('.')[0] in ('numpy', 'pandas', 'torch', 'cv2', 'av'):
            del sys.modules[name]
    sys.path[:], sys.argv[:] = [file.rpartition('/')[0], *outside], [file, '--help']
    with redirect_stdout(io.StringIO()) as shown:
        try:
            runpy.run_path(file, run_name='__main__')
        except SystemExit as done:
            assert not done.code, (file, done.code)
    found[file] = shown.getvalue()
print(json.dumps(found))
"""


@pytest.mark.filterwarnings("ignore:.*found in sys.modules")
def test_help_is_the_same_both_ways(tmp_path, monkeypatch, capsys):
    files = {os.path.relpath(ROOT / path, tmp_path): path for path in (*COMMANDS, ENTRY)}
    done = run("-c", EACH_AS_A_FILE, *files, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    for file, shown in json.loads(done.stdout).items():
        assert shown, file
        if files[file] != ENTRY:  # what python -m does
            module = ".".join(files[file].with_suffix("").parts).removesuffix(".__main__")
            monkeypatch.setattr(sys, "argv", ["replaced by runpy", "--help"])
            with suppress(SystemExit):
                runpy.run_module(module, run_name="__main__", alter_sys=True)
            assert capsys.readouterr().out.replace(" -m " + module, "") == shown.replace(" -m " + module, ""), file


@pytest.mark.parametrize("method", ["fork", "spawn"])
def test_workers_find_their_modules_from_elsewhere(method, tmp_path):
    """Spawned workers import everything anew; forkserver, the default from Python 3.14 on, does the same."""
    chosen = f"import multiprocessing\nmultiprocessing.set_start_method({method!r})\n"
    (tmp_path / "sitecustomize.py").write_text(chosen)  # Python runs it as it starts
    (tmp_path / "in").mkdir()
    for name in ("a", "b", "c"):
        make_video(tmp_path / "in" / f"{name}.mp4", 30)
    file = ROOT / "preprocess" / "compress_video.py"
    flags = ["--input_root", "in", "--output_root", "out", "--num_workers", "2"]
    done = run(file, *flags, cwd=tmp_path, PYTHONPATH=tmp_path)
    assert (done.returncode, done.stderr) == (0, "")
    last = done.stdout.splitlines()[-1]  # after news of its progress, where it is slow
    assert last == "3 converted, 0 were there already, 0 failed; 0 other files left alone"
