"""The losses against plain loops and against their own plain versions, forward and backward."""

import math

import pytest
import torch
import torch.nn.functional as F

from clips_core.loss import caption_loss, caption_loss_plain, info_nce


def test_info_nce_is_the_mean_of_both_directions() -> None:
    torch.manual_seed(0)
    image, text = F.normalize(torch.randn(5, 4), dim=-1), F.normalize(torch.randn(5, 4), dim=-1)
    scale, total = 7.0, 0.0
    for i in range(5):
        row = [scale * float(image[i] @ text[j]) for j in range(5)]
        column = [scale * float(image[j] @ text[i]) for j in range(5)]
        total += math.log(sum(map(math.exp, row))) - row[i] + math.log(sum(map(math.exp, column))) - column[i]
    assert info_nce(image, text, torch.tensor(scale)).item() == pytest.approx(total / 10, rel=1e-6)


@pytest.mark.parametrize("chunk", [3, 7, 4096])
def test_chunked_caption_loss_equals_the_plain_one(chunk: int) -> None:
    torch.manual_seed(1)
    target = torch.randint(0, 11, (4, 6)) * (torch.rand(4, 6) < 0.6)
    results = []
    for function in (lambda *args: caption_loss(*args, chunk=chunk), caption_loss_plain):
        torch.manual_seed(2)
        hidden, head = torch.randn(4, 6, 8, requires_grad=True), torch.randn(11, 8, requires_grad=True)
        loss = function(hidden, head, target)
        loss.backward()
        results.append((loss.detach(), hidden.grad, head.grad))
    for fast, plain in zip(*results, strict=True):
        assert (fast - plain).abs().max() <= 1e-6 * plain.abs().max()


def test_caption_loss_without_a_target_is_zero_and_connected() -> None:
    hidden, head = torch.randn(2, 3, 4, requires_grad=True), torch.randn(5, 4, requires_grad=True)
    loss = caption_loss(hidden, head, torch.zeros(2, 3, dtype=torch.long))
    loss.backward()
    assert loss.item() == 0.0 and hidden.grad is not None and head.grad is not None


def test_caption_loss_is_a_token_mean_not_a_sample_mean() -> None:
    torch.manual_seed(3)
    hidden, head = torch.randn(2, 4, 8), torch.randn(9, 8)
    target = torch.tensor([[1, 2, 3, 4], [5, 0, 0, 0]])
    terms = [
        -F.log_softmax(hidden[b, k] @ head.T, -1)[target[b, k]] for b in range(2) for k in range(4) if target[b, k]
    ]
    torch.testing.assert_close(caption_loss(hidden, head, target), torch.stack(terms).mean())
