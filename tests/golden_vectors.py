"""Access to the golden vectors: numbers computed with the reference implementations.

``GOLDEN_DIR`` names another folder of the same form. A vector that a test asks for and that is absent or unreadable
is an error, never a skip.
"""

import importlib.util
import os
from pathlib import Path

import torch

GOLDEN_DIR = Path(os.environ.get("GOLDEN_DIR", Path(__file__).parent / "golden"))


def _recipe():
    spec = importlib.util.spec_from_file_location("golden_recipe", GOLDEN_DIR / "recipe.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


recipe = _recipe()


def fixtures(pattern: str) -> list[str]:
    """Stems of the fixtures that match, for parametrisation; an empty list would hide a missing vector."""
    stems = sorted(p.stem for p in GOLDEN_DIR.glob(f"{pattern}.json"))
    if not stems:
        raise FileNotFoundError(f"no golden vector {pattern}.json in {GOLDEN_DIR}")
    return stems


def load(stem: str):
    return recipe.load(GOLDEN_DIR / stem)


def weights(fixture) -> dict[str, torch.Tensor]:
    return {k: torch.from_numpy(v.copy()) if v.shape else torch.tensor(float(v)) for k, v in fixture.weights().items()}


def inputs(fixture) -> dict[str, torch.Tensor]:
    return {k: torch.as_tensor(v) for k, v in fixture.inputs().items()}
