"""The boundaries of the code base, read off the source: who imports whom, and how long things are."""

import ast
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PACKAGES = ("engine", "modules", "checkpoints", "dataloaders", "preprocess", "tools", "benchmarks", "tests")
LONGEST_FILE, LONGEST_TEST_FILE, LONGEST_FUNCTION = 400, 700, 80


def sources() -> list[Path]:
    listed = subprocess.run(
        ["git", "ls-files", "--cached", "--others", "--exclude-standard", "*.py"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=True,
    ).stdout.split()
    return [ROOT / name for name in listed if (ROOT / name).exists() and "golden/" not in name]


SOURCES = sources()


def imported(tree: ast.AST) -> set[str]:
    names = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "imports are absolute"
            names.add(node.module.split(".")[0])
    return names


def test_no_import_cycles_among_modules():
    edges = {}
    for path in SOURCES:
        parts = path.relative_to(ROOT).with_suffix("").parts
        if parts[0] in PACKAGES:
            name = ".".join(parts).removesuffix(".__init__")
            edges[name] = {
                node.module
                for node in ast.parse(path.read_text()).body
                if isinstance(node, ast.ImportFrom) and node.module.split(".")[0] in PACKAGES
            }

    def visit(name: str, trail: tuple[str, ...]) -> None:
        assert name not in trail, " -> ".join((*trail, name))
        for target in edges.get(name, ()):
            visit(target, (*trail, name))

    for name in edges:
        visit(name, ())


def test_only_one_module_reads_the_launchers_environment():
    for path in SOURCES:
        relative = str(path.relative_to(ROOT))
        if relative != "engine/distributed.py" and not relative.startswith("tests/"):
            text = path.read_text()
            for name in ('"RANK"', '"LOCAL_RANK"', '"WORLD_SIZE"', "SLURM_"):
                assert name not in text, f"{relative} reads {name}"


@pytest.mark.parametrize("path", SOURCES, ids=lambda p: str(p.relative_to(ROOT)))
def test_files_and_functions_stay_short(path):
    text = path.read_text()
    limit = LONGEST_TEST_FILE if path.is_relative_to(ROOT / "tests") else LONGEST_FILE
    assert len(text.splitlines()) <= limit
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
            length = node.end_lineno - node.lineno + 1
            assert length <= LONGEST_FUNCTION, f"{node.name} has {length} lines"


def test_the_tree_names_no_foreign_path():
    for path in SOURCES:
        if path.name != "test_structure.py":
            assert "/work/" not in path.read_text(), path
