"""The objective as pure functions, each fast version beside the plain one that says what it computes.

L = 1 · L_con + 2 · L_cap (METHOD: arXiv 2411.16828, section 3.3), both over the global batch: every process holds its own rows,
gets the loss of all, and in the backward pass the gradient of that loss for its own rows. What the processes' gradients of a
shared parameter add up to is therefore the gradient.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from clips_core.distributed import gather_rows, rank, sum_over_processes
from clips_core.tokenizer import PAD

CONTRASTIVE_WEIGHT, CAPTION_WEIGHT = 1.0, 2.0


def info_nce_plain(image: Tensor, text: Tensor, logit_scale: Tensor) -> Tensor:
    """Symmetric InfoNCE of L2-normalised features [B, E], mean over both directions, from the full logits [B, B]."""
    logits = logit_scale * image.float() @ text.float().T
    labels = torch.arange(len(logits), device=logits.device)
    return (F.cross_entropy(logits, labels) + F.cross_entropy(logits.T, labels)) / 2


def info_nce(image: Tensor, text: Tensor, logit_scale: Tensor, chunk: int = 1024) -> Tensor:
    """`info_nce_plain` over the pictures and texts of all processes, with at most `chunk` × B logits at a time.

    Args:
        image, text: this process's features, L2-normalised, [b, E]; row i of one matches row i of the other.
        logit_scale: the inverse temperature itself (not its logarithm), scalar.
        chunk: rows of logits that exist at once, forward and backward.

    Returns:
        The mean over the global batch of B = W · b, the same on every process.
    """
    result: Tensor = _InfoNCE.apply(image.float(), text.float(), logit_scale.float(), chunk)
    return result


class _InfoNCE(torch.autograd.Function):
    """With S = s · I Tᵀ, L = 1/2B Σ_i [lse_j S_ij + lse_j S_ji − 2 S_ii]: dL/dS_ij = 1/2B [softmax_row + softmax_column − 2δ_ij].

    Both softmaxes follow from S and its row-wise and column-wise log-sum-exps, and those are B numbers each: nothing larger than
    the features is kept for the backward pass, and no feature's gradient travels between processes.
    """

    @staticmethod
    def forward(ctx: Any, image: Tensor, text: Tensor, scale: Tensor, chunk: int) -> Tensor:
        all_image, all_text = gather_rows(image), gather_rows(text)  # [B, E]
        lse_image = _log_sum_exp(image, all_text, scale, chunk)  # [b]: of the rows of S that are ours
        lse_text = _log_sum_exp(text, all_image, scale, chunk)  # [b]: of its columns
        ctx.save_for_backward(image, text, scale, all_image, all_text, gather_rows(lse_image), gather_rows(lse_text))
        ctx.chunk = chunk
        diagonal = scale * (image * text).sum(dim=1)
        return sum_over_processes((lse_image + lse_text - 2 * diagonal).sum()) / (2 * len(all_image))

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, Tensor, Tensor, None]:
        image, text, scale, all_image, all_text, lse_image, lse_text = ctx.saved_tensors
        factor = gradients[0] / (2 * len(all_image))
        d_image = factor * _rows_gradient(image, all_text, text, scale, lse_image, lse_text, ctx.chunk)
        d_text = factor * _rows_gradient(text, all_image, image, scale, lse_text, lse_image, ctx.chunk)
        # dL/ds = Σ_ij dL/dS_ij (I_i · T_j): the rows' gradient, which already holds the sum over j, against the rows.
        return scale * d_image, scale * d_text, (d_image * image).sum(), None


def _log_sum_exp(rows: Tensor, others: Tensor, scale: Tensor, chunk: int) -> Tensor:
    """log Σ_j exp(s · rows_i · others_j), [b]."""
    parts = []
    for part in rows.split(max(1, chunk // 2)):  # half of it, since the exponentials exist beside the logits
        parts.append(torch.logsumexp((part * scale) @ others.T, dim=1))
    return torch.cat(parts)


def _rows_gradient(
    rows: Tensor, others: Tensor, own: Tensor, scale: Tensor, lse_rows: Tensor, lse_columns: Tensor, chunk: int
) -> Tensor:
    """Σ_j [softmax_row + softmax_column − 2δ]_ij others_j, for our rows i of the global batch, [b, E]."""
    first = rank() * len(rows)
    result = torch.empty_like(rows)
    for start in range(0, len(rows), step := max(1, chunk // 2)):
        part = rows[start : start + step]
        of_rows = lse_rows[first + start : first + start + len(part), None]
        logits = (part * scale) @ others.T
        weights = (logits - of_rows).exp_()
        weights += logits.sub_(lse_columns).exp_()
        result[start : start + step] = weights @ others
    return result - 2 * own


def caption_loss_plain(hidden: Tensor, head: Tensor, target: Tensor) -> Tensor:
    """Mean cross-entropy over all targets that are no pad, from the full logits [B, N, V]."""
    logits = hidden.float() @ head.float().T
    if not bool((target != PAD).any()):
        return 0.0 * logits.sum()
    return F.cross_entropy(logits.flatten(0, 1), target.flatten(), ignore_index=PAD)


def caption_loss(hidden: Tensor, head: Tensor, target: Tensor, chunk: int = 4096) -> Tensor:
    """`caption_loss_plain` from `summed_caption_loss`: zero, still connected to the graph, where no target is left."""
    return summed_caption_loss(hidden, head, target, chunk) / (target != PAD).sum().clamp(min=1)


def summed_caption_loss(hidden: Tensor, head: Tensor, target: Tensor, chunk: int = 4096) -> Tensor:
    """Sum of the cross-entropies at all targets that are no pad, with logits only there.

    Args:
        hidden: the decoder's states after its LayerNorm, [B, N, D].
        head: weight of the vocabulary head, [V, D].
        target: token ids, [B, N]; `PAD` is ignored.
        chunk: rows of logits that exist at once: memory is chunk × V, not B × N × V.
    """
    kept = target.flatten() != PAD
    rows, labels = hidden.flatten(0, 1)[kept], target.flatten()[kept]
    if torch.is_autocast_enabled(rows.device.type):  # the head is a matrix product like any other of the model
        rows = rows.to(torch.get_autocast_dtype(rows.device.type))
    result: Tensor = _SummedCrossEntropy.apply(rows, head, labels, chunk)
    return result


class _SummedCrossEntropy(torch.autograd.Function):
    """Σ cross_entropy(rows @ headᵀ, labels), the gradient taken chunk by chunk while the logits are there."""

    @staticmethod
    def forward(ctx: Any, rows: Tensor, head: Tensor, labels: Tensor, chunk: int) -> Tensor:
        weight = head.to(rows.dtype)
        needs_rows, needs_head = ctx.needs_input_grad[:2]
        d_rows = torch.empty_like(rows) if needs_rows else None
        d_head = torch.zeros_like(head, dtype=torch.float32) if needs_head else None
        total = rows.new_zeros((), dtype=torch.float32)
        for start in range(0, len(rows), chunk):
            part, part_labels = rows[start : start + chunk], labels[start : start + chunk, None]
            logits = (part @ weight.T).float()  # [chunk, V]
            lse = logits.logsumexp(dim=1, keepdim=True)
            total += (lse - logits.gather(1, part_labels)).sum()
            if needs_rows or needs_head:
                gradient = logits.sub_(lse).exp_().scatter_add_(1, part_labels, -torch.ones_like(lse)).to(rows.dtype)
                if d_rows is not None:
                    d_rows[start : start + chunk] = gradient @ weight
                if d_head is not None:
                    d_head += gradient.T @ part
        ctx.save_for_backward(d_rows, d_head)
        ctx.head_dtype = head.dtype
        return total

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, Tensor | None, None, None]:
        d_rows, d_head = ctx.saved_tensors
        return (
            None if d_rows is None else d_rows * gradients[0].to(d_rows.dtype),
            None if d_head is None else (d_head * gradients[0]).to(ctx.head_dtype),
            None,
            None,
        )
