"""The tokenizer against recorded token ids of CLIP4Clip's (fixtures G1*)."""

import json
import os
from pathlib import Path

import numpy as np
import pytest

from modules.tokenizer import Tokenizer

GOLDEN_DIR = Path(os.environ.get("GOLDEN_DIR", Path(__file__).parent / "golden"))
FIXTURES = sorted(GOLDEN_DIR.glob("G1*.json"))


@pytest.fixture(scope="module")
def tokenizer():
    return Tokenizer()


def read(path):
    manifest = json.loads(path.read_text(encoding="utf-8"))
    return manifest, manifest["data"]["strings"]


def test_fixtures_are_there():
    assert FIXTURES, f"no G1*.json in {GOLDEN_DIR}"


@pytest.mark.parametrize("path", FIXTURES, ids=lambda path: path.stem)
def test_ids(path, tokenizer):
    manifest, strings = read(path)
    assert (tokenizer.sot, tokenizer.eot, tokenizer.eot + 1) == tuple(
        manifest["config"][key] for key in ("sot", "eot", "vocab")
    )
    wrong = {
        item["text"]: tokenizer.encode(item["text"])
        for item in strings
        if tokenizer.encode(item["text"]) != item["ids"]
    }
    assert len(strings) > 0
    assert wrong == {}


@pytest.mark.parametrize("path", FIXTURES, ids=lambda path: path.stem)
def test_rows_and_masks(path, tokenizer):
    _, strings = read(path)
    texts = [item["text"] for item in strings]
    with np.load(path.with_suffix(".npz")) as arrays:
        lengths = [int(name.removeprefix("layout_")) for name in arrays if name.startswith("layout_")]
        assert lengths
        for length in lengths:
            ids, mask = tokenizer(texts, length)
            np.testing.assert_array_equal(ids.numpy(), arrays[f"layout_{length}"])
            np.testing.assert_array_equal(mask.numpy(), arrays[f"mask_{length}"].astype(bool))


@pytest.mark.parametrize("path", FIXTURES, ids=lambda path: path.stem)
def test_special_tokens_spelled_out_are_text(path, tokenizer):
    """The one deliberate difference: see Tokenizer. Each spelling goes the way of the source that reads it as text."""
    manifest, _ = read(path)
    special = {tokenizer.sot, tokenizer.eot}
    for item in manifest["data"].get("special_token_spellings", []):
        as_text = [ids for ids in (item["reference_ids"], item["open_clip_ids"]) if not special & set(ids)]
        ids = tokenizer.encode(item["text"])
        assert not special & set(ids)
        assert not as_text or ids in as_text
