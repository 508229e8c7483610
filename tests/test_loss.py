"""The losses against plain loops and against their own plain versions, forward and backward."""

import math
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from clips_core.loss import caption_loss, caption_loss_plain, info_nce, info_nce_plain, summed_caption_loss
from clips_core.measure import peak_bytes

Loss = Callable[[Tensor, Tensor, Tensor], Tensor]


def features(count: int, width: int, seed: int = 0) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    image, text = (F.normalize(torch.randn(count, width, generator=generator), dim=-1) for _ in range(2))
    return image.requires_grad_(), text.requires_grad_()


def run_contrastive(loss: Loss, count: int, width: int) -> tuple[Tensor, ...]:
    """The loss and its gradients, with the temperature as a parameter, as in training."""
    image, text = features(count, width)
    logarithm = torch.tensor(2.0, requires_grad=True)
    value = loss(image, text, logarithm.exp())
    (3 * value).backward()  # a factor, as the weight of a term in a sum
    assert image.grad is not None and text.grad is not None and logarithm.grad is not None
    return value.detach(), image.grad, text.grad, logarithm.grad


def difference(a: Tensor, b: Tensor) -> float:
    return float((a - b).abs().max() / b.abs().max())


def test_info_nce_is_the_mean_of_both_directions() -> None:
    image, text = (feature.detach() for feature in features(5, 4))
    scale, total = 7.0, 0.0
    for i in range(5):
        row = [scale * float(image[i] @ text[j]) for j in range(5)]
        column = [scale * float(image[j] @ text[i]) for j in range(5)]
        total += math.log(sum(map(math.exp, row))) - row[i] + math.log(sum(map(math.exp, column))) - column[i]
    for function in (info_nce, info_nce_plain):
        assert function(image, text, torch.tensor(scale)).item() == pytest.approx(total / 10, rel=1e-6)


@pytest.mark.parametrize("count", [2, 37, 64])
@pytest.mark.parametrize("chunk", [1, 7, 16, 1024])
def test_chunked_info_nce_equals_the_plain_one(count: int, chunk: int) -> None:
    plain = run_contrastive(info_nce_plain, count, 16)
    chunked = run_contrastive(lambda i, t, s: info_nce(i, t, s, chunk), count, 16)
    assert max(difference(a, b) for a, b in zip(chunked, plain, strict=True)) <= 1e-6


def test_info_nce_holds_no_more_than_chunk_rows_of_logits() -> None:
    count, width, chunk = 2048, 16, 64
    rows, all_logits, feature = 4 * chunk * count, 4 * count * count, 4 * count * width
    chunked = peak_bytes(lambda: run_contrastive(lambda i, t, s: info_nce(i, t, s, chunk), count, width))
    assert chunked <= 1.1 * rows + 12 * feature
    assert peak_bytes(lambda: run_contrastive(info_nce_plain, count, width)) > 2 * all_logits  # so it can be seen here


def test_info_nce_in_double_precision_of_its_gradient() -> None:
    """The analytic gradient against finite differences of the plain loss in float64."""
    image, text = features(4, 3)
    value = info_nce(image, text, torch.tensor(5.0), chunk=2)
    value.backward()
    assert image.grad is not None
    step = 1e-6
    for i in range(4):
        moved = []
        for sign in (1, -1):
            shifted = image.detach().double().clone()
            shifted[i, 1] += sign * step
            logits = 5.0 * shifted @ text.detach().double().T
            labels = torch.arange(4)
            moved.append(float(F.cross_entropy(logits, labels) + F.cross_entropy(logits.T, labels)) / 2)
        assert image.grad[i, 1].item() == pytest.approx((moved[0] - moved[1]) / (2 * step), rel=1e-3, abs=1e-5)


def run_caption(loss: Loss, target: Tensor, dtype: torch.dtype = torch.float32) -> tuple[Tensor, ...]:
    generator = torch.Generator().manual_seed(2)
    hidden = torch.randn(*target.shape, 8, generator=generator).to(dtype).requires_grad_()
    head = torch.randn(11, 8, generator=generator).requires_grad_()
    value = loss(hidden, head, target)
    (3 * value).backward()
    assert hidden.grad is not None and head.grad is not None
    return value.detach(), hidden.grad.float(), head.grad


@pytest.mark.parametrize("chunk", [1, 3, 7, 4096])
def test_chunked_caption_loss_equals_the_plain_one(chunk: int) -> None:
    torch.manual_seed(1)
    target = torch.randint(0, 11, (4, 6)) * (torch.rand(4, 6) < 0.6)
    plain = run_caption(caption_loss_plain, target)
    chunked = run_caption(lambda h, w, t: caption_loss(h, w, t, chunk), target)
    assert max(difference(a, b) for a, b in zip(chunked, plain, strict=True)) <= 1e-6


def test_caption_loss_in_bf16() -> None:
    torch.manual_seed(1)
    target = torch.randint(1, 11, (16, 6))
    plain = run_caption(caption_loss_plain, target)
    low = run_caption(lambda h, w, t: caption_loss(h, w, t, 10), target, torch.bfloat16)
    assert [difference(a, b) for a, b in zip(low, plain, strict=True)] == pytest.approx([0, 0, 0], abs=2e-2)


def test_caption_loss_holds_no_more_than_chunk_rows_of_logits() -> None:
    rows, width, vocabulary, chunk = 512, 16, 4000, 32
    hidden, head = torch.randn(1, rows, width, requires_grad=True), torch.randn(vocabulary, width, requires_grad=True)
    target = torch.randint(1, vocabulary, (1, rows))
    chunked = peak_bytes(lambda: caption_loss(hidden, head, target, chunk).backward())
    weights = 4 * vocabulary * width
    assert chunked <= 2.2 * 4 * chunk * vocabulary + 4 * weights  # the logits and one temporary of their size
    assert peak_bytes(lambda: caption_loss_plain(hidden, head, target).backward()) > 4 * rows * vocabulary


def test_caption_loss_without_a_target_is_zero_and_connected() -> None:
    value, *gradients = run_caption(caption_loss, torch.zeros(2, 3, dtype=torch.long))
    assert value.item() == 0.0 and not any(gradient.any() for gradient in gradients)


def test_caption_loss_of_a_frozen_head_or_state() -> None:
    target = torch.randint(1, 11, (2, 3))
    hidden, head = torch.randn(2, 3, 8), torch.randn(11, 8)
    assert not summed_caption_loss(hidden, head, target).requires_grad
    for trained in (hidden, head):
        trained.requires_grad_()
        summed_caption_loss(hidden, head, target).backward()
        assert trained.grad is not None
        trained.requires_grad_(False)


def test_caption_loss_is_a_token_mean_not_a_sample_mean() -> None:
    torch.manual_seed(3)
    hidden, head = torch.randn(2, 4, 8), torch.randn(9, 8)
    target = torch.tensor([[1, 2, 3, 4], [5, 0, 0, 0]])
    terms = [
        -F.log_softmax(hidden[b, k] @ head.T, -1)[target[b, k]] for b in range(2) for k in range(4) if target[b, k]
    ]
    torch.testing.assert_close(caption_loss(hidden, head, target), torch.stack(terms).mean())
