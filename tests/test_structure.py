"""The boundaries of the code base, read off the source: who imports whom, and how long things are."""

import ast
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
# What each part may import of the others. Imports point down: what plug-ins have in common, three wings that know
# nothing of each other, the engine that joins them, and what stands on top, which nothing imports.
WINGS = ("dataloaders", "modules", "checkpoints")
MAY_IMPORT = {
    "plugins": set(),
    **{wing: {"plugins"} for wing in WINGS},
    "engine": {"plugins", *WINGS},
    "main_task_retrieval": {"plugins", "engine", *WINGS},
    "inference": {"main_task_retrieval"},
    "preprocess": {"plugins", "engine", *WINGS},
    "tools": {"plugins", "engine", "preprocess", *WINGS},
    "benchmarks": {"plugins", "engine", "main_task_retrieval", *WINGS},
}
LONGEST_FILE, LONGEST_TEST_FILE, LONGEST_FUNCTION = 400, 700, 60


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


def imported(path: Path) -> set[str]:
    """Modules of the project that a file imports, at its top or anywhere inside."""
    names = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "imports are absolute"
            names |= {node.module, *(f"{node.module}.{alias.name}" for alias in node.names)}
    return {name for name in names if name in MODULES}


def module_name(path: Path) -> str:
    return ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")


MODULES = {module_name(path): path for path in SOURCES if "tests" not in path.parts}


@pytest.mark.parametrize("part", MAY_IMPORT)
def test_imports_point_down(part):
    files = {name: path for name, path in MODULES.items() if name.split(".")[0] == part}
    assert files
    for name, path in files.items():
        others = {other.split(".")[0] for other in imported(path)} - {part}
        assert others <= MAY_IMPORT[part], f"{name} must not import {others - MAY_IMPORT[part]}"


def test_every_part_has_its_rule():
    assert {name.split(".")[0] for name in MODULES} == set(MAY_IMPORT)


def test_no_import_cycles_among_modules():
    """Also none through imports inside functions. A package counts as what its __init__ imports."""
    edges = {name: imported(path) - {name} for name, path in MODULES.items()}

    def visit(name: str, trail: tuple[str, ...]) -> None:
        assert name not in trail, " -> ".join((*trail, name))
        if name not in done:
            for target in edges[name]:
                visit(target, (*trail, name))
            done.add(name)

    done: set[str] = set()
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
