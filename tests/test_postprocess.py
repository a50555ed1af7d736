"""QB-Norm on matrices small enough to follow, and against a literal reading of its formula."""

import numpy as np
import pytest
import torch

from modules.metrics import format_metrics, qb_norm, retrieval_metrics, retrieval_ranks


def test_a_hub_is_normalised_away():
    """Video 2 is nearest to both bank queries: a hub. Captions 0 and 1 prefer it by a hair and get their own back."""
    similarity = np.array([[0.50, 0.10, 0.52], [0.10, 0.50, 0.52], [0.10, 0.10, 0.90]])
    bank = np.array([[0.1, 0.2, 0.9], [0.2, 0.1, 0.8]])
    assert retrieval_ranks(similarity, range(3))[0].tolist() == [1, 1, 0]
    assert retrieval_ranks(qb_norm(similarity, bank), range(3))[0].tolist() == [0, 0, 0]


def test_a_query_whose_nearest_is_no_hub_is_left_alone():
    similarity = np.array([[0.9, 0.1], [0.2, 0.8]])
    bank = np.array([[0.1, 0.3]])
    got = qb_norm(similarity, bank)
    assert got[0].tolist() == similarity[0].tolist()
    assert got[1].tolist() != similarity[1].tolist()


def test_formula():
    """exp(beta s) / sum over the bank of exp(beta s), of rows that are nearest to a hub."""
    rng = np.random.default_rng(0)
    similarity, bank, beta = rng.uniform(-1, 1, (30, 12)), rng.uniform(-1, 1, (8, 12)), 20.0
    got = qb_norm(similarity, bank, beta).numpy()
    hubs = set(bank.argmax(axis=1))
    inverted = np.exp(beta * similarity) / np.exp(beta * bank).sum(axis=0)
    activated = 0
    for row in range(30):
        is_hub = similarity[row].argmax() in hubs
        activated += is_hub
        want = np.log(inverted[row]) / beta if is_hub else similarity[row]
        np.testing.assert_allclose(got[row], want, rtol=1e-9, atol=1e-9)
    assert 0 < activated < 30


def test_scale_of_the_logits_does_not_matter():
    rng = np.random.default_rng(1)
    similarity, bank = rng.uniform(-1, 1, (20, 20)), rng.uniform(-1, 1, (9, 20))
    plain = retrieval_metrics(similarity, range(20), bank=bank)
    scaled = retrieval_metrics(100 * similarity, range(20), bank=100 * bank, scale=100.0)
    assert plain["qb_norm"] == scaled["qb_norm"]
    assert torch.isfinite(qb_norm(1e4 * similarity, 1e4 * bank)).all()


def test_the_table_says_what_looks_at_what():
    text = format_metrics(retrieval_metrics(np.eye(3), range(3), bank=np.eye(3)))
    assert "dsl uses all other test queries (transductive)" in text
    assert "text-to-video qb_norm" in text
    assert "video-to-text qb_norm" not in text
    assert "qb_norm" not in format_metrics(retrieval_metrics(np.eye(3), range(3)))


def test_a_bank_of_another_gallery_is_refused():
    with pytest.raises(ValueError, match=r"the query bank must be \[B, 3\]"):
        qb_norm(np.eye(3), np.eye(4))
    with pytest.raises(ValueError, match="B >= 1"):
        qb_norm(np.eye(3), np.zeros((0, 3)))
