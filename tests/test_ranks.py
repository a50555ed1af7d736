"""Ranks and DSL in strips: equal to a literal computation on the whole matrix, ties included, however they are cut."""

import math
import subprocess
import sys
from io import BytesIO
from pathlib import Path

import numpy as np
import pytest
import torch
from tiny_models import tiny_model

from engine.distributed import World
from engine.scores import Computed, Stored, read_npz, score, write_npz
from modules.metrics import dual_softmax, duplicates, qb_norm, retrieval_metrics, retrieval_ranks, summarize
from modules.ranks import Held

ROOT = Path(__file__).parent.parent
ALONE = World(0, 1, torch.device("cpu"))


def whole_ranks(matrix: np.ndarray, owner: np.ndarray, also=({}, {})) -> tuple[list[int], list[int]]:
    """By the definition: wrong candidates that score at least as high as the best correct one."""
    videos = range(matrix.shape[1])
    right = [{owner[n], *also[0].get(n, ())} for n in range(len(matrix))]
    t2v = [sum(row[v] >= max(row[u] for u in ok) for v in videos if v not in ok) for row, ok in zip(matrix, right)]
    groups = np.array([matrix[owner == u].max(axis=0) for u in videos])
    right = [{v, *also[1].get(v, ())} for v in videos]
    return t2v, [
        sum(groups[u, v] >= max(groups[w, v] for w in right[v]) for u in videos if u not in right[v]) for v in videos
    ]


def whole_dsl(matrix: np.ndarray, dim: int) -> np.ndarray:
    """sim * softmax(sim, dim), its sums without any rounding but the last."""
    sim = torch.as_tensor(matrix).double()
    sim = sim if dim == 0 else sim.t()
    sums = torch.tensor([math.fsum(column.exp().tolist()) for column in sim.t()], dtype=torch.double)
    found = sim.exp() / sums * sim
    return (found if dim == 0 else found.t()).numpy()


def case(seed: int) -> tuple[np.ndarray, np.ndarray, list[str]]:
    """Matrix, owners, captions: few values and equal rows and columns make many ties; captions of a video may lie
    apart; some texts belong to several videos. Odd seeds: float64."""
    rng = np.random.default_rng(seed)
    videos, more = int(rng.integers(1, 14)), int(rng.integers(0, 25))
    owner = rng.permutation(np.concatenate([np.arange(videos), rng.integers(0, videos, more)]))
    sim = rng.integers(-3, 4, (len(owner), videos)) if seed % 3 else rng.normal(0, 3, (len(owner), videos))
    sim[:, rng.integers(videos)] = sim[:, rng.integers(videos)]
    sim[rng.integers(len(owner))] = sim[rng.integers(len(owner))]
    kind = np.float64 if seed % 2 else np.float32
    return sim.astype(kind), owner, [f"text {i}" for i in rng.integers(0, 2 * len(owner), len(owner))]


@pytest.mark.parametrize("block", [1, 30, 2**20])
def test_against_the_whole_matrix(block, monkeypatch):
    """80 matrices. Columns that hold the same scores in another order have the same softmax, which decides ties."""
    monkeypatch.setattr("modules.metrics.BLOCK", block)
    aware = 0
    for seed in range(80):
        sim, owner, captions = case(seed)
        also = duplicates(captions, owner)
        want = whole_ranks(sim, owner)
        assert tuple(r.tolist() for r in retrieval_ranks(sim, owner)) == want, seed
        by_texts = whole_ranks(whole_dsl(sim, 0), owner)
        metrics = retrieval_metrics(sim, owner, captions=captions)
        for same_axis in (False, True):
            dsl = by_texts[0], (by_texts if same_axis else whole_ranks(dual_softmax(sim, 1).numpy(), owner))[1]
            got = retrieval_metrics(sim, owner, same_dsl_axis=same_axis)["dsl"]
            assert got == {"t2v": summarize(dsl[0]), "v2t": summarize(dsl[1])}, seed
        if also[0]:
            aware += 1
            ranks = whole_ranks(sim, owner, also)
            assert metrics["duplicate_aware"] == {"t2v": summarize(ranks[0]), "v2t": summarize(ranks[1])}, seed
    assert aware > 30


def test_dsl_is_what_torch_computes_on_the_whole_matrix():
    """Also far outside of what exp() takes, where the largest score of a column has to be subtracted first."""
    generator = torch.Generator().manual_seed(0)
    for size in (1, 100, 5000):
        sim = size * torch.randn(300, 40, generator=generator)
        for dim in (0, 1):
            want = sim.double() * sim.double().softmax(dim)
            torch.testing.assert_close(dual_softmax(sim, dim), want, rtol=1e-12, atol=1e-300)
        owner = torch.arange(300) % 40
        weighed = [sim.double() * sim.double().softmax(dim) for dim in (0, 1)]
        want = {"t2v": retrieval_ranks(weighed[0], owner)[0], "v2t": retrieval_ranks(weighed[1], owner)[1]}
        assert retrieval_metrics(sim, owner)["dsl"] == {side: summarize(ranks) for side, ranks in want.items()}


def test_infinite_scores_have_ranks_and_no_dsl():
    sim = torch.tensor([[1.0, -math.inf], [0.0, 2.0]])
    assert [r.tolist() for r in retrieval_ranks(sim, range(2))] == [[0, 0], [0, 0]]
    with pytest.raises(ValueError, match="infinite values"):
        retrieval_metrics(sim, range(2))


def test_the_first_nan_is_named_as_the_captions_are_numbered(monkeypatch):
    monkeypatch.setattr("modules.metrics.BLOCK", 6)
    sim = torch.zeros(6, 3)
    sim[4, 1] = sim[5, 0] = math.nan
    with pytest.raises(ValueError, match="2 NaN, the first at caption 4, video 1"):
        retrieval_ranks(sim, [2, 1, 0, 0, 1, 2])


def exact_features(texts: int, videos: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Features of small whole numbers: their products are exact, in whatever order and blocks they are summed."""
    generator = torch.Generator().manual_seed(1)
    sides = (torch.randint(-2, 3, (n, 64), generator=generator).float() for n in (texts, videos))
    return tuple(sides)  # type: ignore[return-value]


def test_computed_stored_and_held_scores_give_the_same(tmp_path):
    """700 captions x 300 videos in strips of one row, from features and from similarity.npz."""
    model = tiny_model("meanP", scaled=False)
    text, video = exact_features(700, 300)
    owner = np.random.default_rng(0).permutation(np.arange(700) % 300)
    matrix, bank = model.similarity(text, video), exact_features(50, 300)[0] @ video.t()
    want = retrieval_metrics(matrix, owner, bank=bank)
    computed = score(model, text, video, ALONE, 0.001, tmp_path)
    assert isinstance(computed, Computed)
    assert retrieval_metrics(computed, owner, bank=Held(bank, 7)) == want
    held = score(model, text, video, ALONE, 1, tmp_path)
    assert torch.equal(held.matrix, matrix)
    with open(tmp_path / "similarity.npz", "wb") as file:
        write_npz(file, {"similarity": computed, "bank": held, "owner": owner})
    with np.load(tmp_path / "similarity.npz") as saved:
        assert np.array_equal(saved["similarity"], matrix.numpy())
        assert saved["similarity"].dtype == np.float32
    found = read_npz(tmp_path / "similarity.npz")
    assert isinstance(found["similarity"], Stored)
    assert retrieval_metrics(found["similarity"], found["owner"], bank=bank) == want


@pytest.mark.parametrize("sim_header", ["xpool", "tightTransf"])
def test_scores_that_cost_are_computed_once_and_kept_in_a_file(sim_header, tmp_path):
    model = tiny_model(sim_header)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        text = model.head.text(torch.randn(60, 64, generator=generator))
        video = model.head.video(torch.randn(20, 3, 64, generator=generator), torch.ones(20, 3, dtype=torch.bool))
        stored = score(model, text, video, ALONE, 0.001, tmp_path)
        held = score(model, text, video, ALONE, 64, tmp_path)
    assert isinstance(stored, Stored)
    assert list(tmp_path.iterdir()) == []  # the file goes with the scores, whatever ends the process
    torch.testing.assert_close(torch.cat(list(stored.strips(torch.arange(60)))), held.matrix, rtol=1e-5, atol=1e-5)
    assert torch.equal(torch.cat(list(stored.strips(torch.tensor([5, 3])))), next(stored.strips(torch.tensor([5, 3]))))


def test_archives_of_other_kinds_are_read_too(tmp_path):
    matrix = np.random.default_rng(0).normal(size=(6, 4))
    np.savez(tmp_path / "plain.npz", a=matrix, by_columns=np.asfortranarray(matrix), whole=np.arange(3))
    np.savez_compressed(tmp_path / "small.npz", a=matrix)
    plain, small = read_npz(tmp_path / "plain.npz"), read_npz(tmp_path / "small.npz")
    assert np.array_equal(torch.cat(list(plain["a"].strips(torch.arange(6)))).numpy(), matrix)
    assert all(np.array_equal(array, matrix) for array in (plain["by_columns"], small["a"]))
    assert plain["whole"].tolist() == [0, 1, 2]
    damaged = (tmp_path / "plain.npz").read_bytes()[:300]
    (tmp_path / "damaged.npz").write_bytes(damaged)
    with pytest.raises((ValueError, OSError)):
        read_npz(tmp_path / "damaged.npz")


def test_bytes_are_those_of_numpy(tmp_path):
    """np.load of an older numpy reads them as well: the header is that of np.save."""
    matrix, file, plain = torch.rand(5, 3), BytesIO(), BytesIO()
    write_npz(file, {"similarity": Held(matrix, 4)})
    np.save(plain, matrix.numpy())
    assert plain.getvalue() in file.getvalue()


MEMORY = """
import resource, sys, torch
from engine.scores import Computed
from modules.metrics import retrieval_metrics
from tests.tiny_models import tiny_model
def peak(): return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
model = tiny_model("meanP")
features = [torch.nn.functional.normalize(torch.randn(4500, 64), dim=1) for _ in range(2)]
retrieval_metrics(torch.rand(2000, 2000), range(2000))
before = peak()
retrieval_metrics(Computed(model, *features, 16), range(4500))
print(peak() - before)
"""


def test_memory_does_not_grow_with_the_matrix():
    """4,500 x 4,500 take 77 MiB in float32 and twice that in float64; with a budget of 16 MiB nothing like it."""
    environment = {"PYTHONPATH": f"{ROOT}:{ROOT}/tests", "OMP_NUM_THREADS": "1", "PATH": ""}
    shown = subprocess.run([sys.executable, "-c", MEMORY], cwd=ROOT, env=environment, capture_output=True, text=True)
    assert float(shown.stdout) < 60, shown.stderr


def test_qb_norm_reads_its_bank_in_strips(monkeypatch):
    rng = np.random.default_rng(2)
    sim, bank = rng.normal(size=(30, 12)), rng.normal(size=(40, 12))
    want = qb_norm(sim, bank)
    monkeypatch.setattr("modules.metrics.BLOCK", 12)
    torch.testing.assert_close(qb_norm(sim, bank), want, rtol=0, atol=0)
