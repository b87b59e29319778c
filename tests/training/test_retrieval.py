"""Retrieval scores against plain loops, chance, ties, missing modalities, intervals and tables."""

import json

import numpy as np
import pytest
import torch

from solarchip_hf.training.retrieval import (
    RetrievalTable,
    bootstrap_interval,
    class_similarity,
    cross_modal_retrieval,
    partner_ranks,
    patch_similarity,
    recall_at,
    retrieval_pairs,
    retrieval_scores,
)

MODALITIES = ["hmi", "aia171", "aia304"]


def test_patch_similarity_equals_a_plain_loop_and_slices_agree():
    torch.manual_seed(0)
    queries, gallery = torch.randn(5, 7, 4), torch.randn(6, 7, 4)
    mask = torch.tensor([True, False, True, True, True, False, True])
    expected = torch.zeros(5, 6)
    for row in range(5):
        for column in range(6):
            cosines = [
                torch.nn.functional.cosine_similarity(queries[row, patch], gallery[column, patch], dim=0)
                for patch in range(7)
                if mask[patch]
            ]
            expected[row, column] = torch.stack(cosines).mean()
    torch.testing.assert_close(patch_similarity(queries, gallery, mask), expected)
    torch.testing.assert_close(patch_similarity(queries, gallery, mask, max_elements=1), expected)
    torch.testing.assert_close(
        class_similarity(queries[:, 0], gallery[:, 0]), patch_similarity(queries[:, :1], gallery[:, :1])
    )
    with pytest.raises(ValueError, match="at least one patch"):
        patch_similarity(queries, gallery, torch.zeros(7, dtype=torch.bool))


def test_ranks_and_recall_by_hand():
    similarity = np.array([[3.0, 1, 2], [5, 4, 6], [1, 1, 1]])
    before, ties = partner_ranks(similarity)
    assert before.tolist() == [0, 2, 0]
    assert ties.tolist() == [0, 0, 2]
    assert recall_at(1, before, ties).tolist() == [1, 0, pytest.approx(1 / 3)]
    assert recall_at(2, before, ties).tolist() == [1, 0, pytest.approx(2 / 3)]
    scores = retrieval_scores(similarity)
    # columns: partner 3 beaten by 5; partner 4 is first; partner 1 beaten by 2 and 6
    assert scores["recall@1_forward"] == pytest.approx((1 + 0 + 1 / 3) / 3)
    assert scores["recall@1_backward"] == pytest.approx(1 / 3)
    assert scores["median_rank"] == pytest.approx((np.median([1, 3, 2]) + np.median([2, 1, 3])) / 2)
    assert scores["chance@1"] == pytest.approx(1 / 3)
    assert scores["chance@5"] == 1


def test_constant_and_random_embeddings_score_chance_and_true_partners_score_one():
    observed = torch.ones(200, 3, dtype=torch.bool)
    constant = cross_modal_retrieval(torch.ones(200, 3, 5, 8), observed, MODALITIES, anchor="hmi")
    assert constant.mean("class token") == pytest.approx(1 / 200)
    assert constant.mean("patch similarity", "recall@5") == pytest.approx(5 / 200)
    torch.manual_seed(0)
    noise = cross_modal_retrieval(torch.randn(200, 3, 5, 8), observed, MODALITIES, anchor="hmi")
    assert noise.mean("class token") < 0.03
    assert 70 < noise.mean("class token", "median_rank") < 130
    shared = torch.randn(200, 1, 5, 8) + 0.05 * torch.randn(200, 3, 5, 8)
    aligned = cross_modal_retrieval(shared, observed, MODALITIES, anchor="hmi")
    assert aligned.mean("class token") > 0.9
    assert aligned.mean("patch similarity") == 1.0
    assert {row["pair"] for row in aligned.rows} == {"hmi / aia171", "hmi / aia304"}


def test_missing_images_are_left_out_whatever_they_hold():
    torch.manual_seed(1)
    embeds = torch.randn(12, 1, 5, 8).repeat(1, 3, 1, 1)
    observed = torch.ones(12, 3, dtype=torch.bool)
    observed[:4, 1] = False
    observed[:, 2] = False
    observed[0, 2] = True  # one partner alone is no gallery
    embeds[~observed] = torch.nan
    table = cross_modal_retrieval(embeds, observed, MODALITIES, anchor="hmi")
    assert [(row["pair"], row["gallery"], row["recall@1"]) for row in table.rows] == [
        ("hmi / aia171", 8, 1.0),
        ("hmi / aia171", 8, 1.0),
    ]
    with pytest.raises(ValueError, match="finite"):
        cross_modal_retrieval(embeds, torch.ones(12, 3, dtype=torch.bool), MODALITIES)


def test_pairs():
    assert retrieval_pairs(MODALITIES, "aia171") == [(1, 0), (1, 2)]
    assert retrieval_pairs(MODALITIES) == retrieval_pairs(MODALITIES, "aia94") == [(0, 1), (0, 2), (1, 2)]


def test_blocks_widen_the_interval_of_a_series_with_memory():
    series = np.repeat(np.random.default_rng(0).random(20) > 0.5, 10).astype(float)
    single, blocks = bootstrap_interval(series), bootstrap_interval(series, block=20)
    assert blocks[1] - blocks[0] > 1.8 * (single[1] - single[0])
    assert single[0] < series.mean() < single[1]
    assert bootstrap_interval(np.ones(10), block=99) == (1.0, 1.0)
    wide = np.random.default_rng(1).random((400, 50)) < 0.3
    covered = [low <= 0.3 <= high for low, high in (bootstrap_interval(row, resamples=200) for row in wide)]
    assert np.mean(covered) > 0.88


def test_table_prints_text_markdown_and_json():
    table = RetrievalTable(title="a title")
    for pair in (("hmi", "aia171"), ("hmi", "aia304")):
        table.add("patch similarity", pair, retrieval_scores(np.eye(4)))
    table.add("control", ("hmi", "aia171"), retrieval_scores(np.ones((4, 4))))
    text = table.to_text().splitlines()
    assert text[0] == "a title"
    assert "recall@1" in text[1]
    assert "mean over pairs" in table.to_text()
    assert len({len(line.rstrip()) for line in text[3:5]}) == 1
    assert table.to_markdown().splitlines()[2].startswith("| patch similarity | hmi / aia171 | 1.000 |")
    stored = json.loads(table.to_json())
    assert stored["rows"][2]["recall@1"] == 0.25
    assert stored["title"] == "a title"
    assert np.isnan(table.mean("absent"))


def test_shapes_are_checked():
    with pytest.raises(ValueError, match="expected \\(N, 3, 1 \\+ L, P\\)"):
        cross_modal_retrieval(torch.zeros(4, 2, 5, 8), torch.ones(4, 2, dtype=torch.bool), MODALITIES)
    with pytest.raises(ValueError, match="square"):
        partner_ranks(np.zeros((2, 3)))
