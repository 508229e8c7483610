"""Retrieval against a slow sort."""

import numpy as np
import torch
import torch.nn.functional as F

from clips_core.zero_shot import ranks, recall, retrieval


def test_ranks_equal_a_sort() -> None:
    torch.manual_seed(0)
    image, text = F.normalize(torch.randn(40, 6), dim=-1), F.normalize(torch.randn(40, 6), dim=-1)
    similarity = (image @ text.T).numpy()
    expected = [int(np.argsort(-row, kind="stable").tolist().index(i)) for i, row in enumerate(similarity)]
    assert ranks(image, text).tolist() == expected
    result = retrieval(image, text)
    assert result["image_to_text"]["R@5"] == np.float32(np.mean([rank < 5 for rank in expected]))
    columns = [int(np.argsort(-column, kind="stable").tolist().index(i)) for i, column in enumerate(similarity.T)]
    assert result["ranks"]["text_to_image"] == columns
    assert result["chance"] == {"R@1": 1 / 40, "R@5": 5 / 40, "R@10": 10 / 40}


def test_a_collapsed_model_scores_nothing() -> None:
    same = F.normalize(torch.ones(10, 4), dim=-1)
    assert recall(ranks(same, same), 5) == 0.0
