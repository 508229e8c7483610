"""The objective as pure functions, each fast version beside the plain one that says what it computes.

L = 1 · L_con + 2 · L_cap (METHOD: arXiv 2411.16828, section 3.3).
"""

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from clips_core.tokenizer import PAD

CONTRASTIVE_WEIGHT, CAPTION_WEIGHT = 1.0, 2.0


def info_nce(image: Tensor, text: Tensor, logit_scale: Tensor) -> Tensor:
    """Symmetric InfoNCE of L2-normalised features, mean over both directions.

    Args:
        image, text: [B, E]; row i of one matches row i of the other.
        logit_scale: the inverse temperature itself (not its logarithm), scalar.
    """
    logits = logit_scale * image.float() @ text.float().T  # [B, B]
    labels = torch.arange(len(logits), device=logits.device)
    return (F.cross_entropy(logits, labels) + F.cross_entropy(logits.T, labels)) / 2


def caption_loss_plain(hidden: Tensor, head: Tensor, target: Tensor) -> Tensor:
    """Mean cross-entropy over all targets that are no pad, from the full logits [B, N, V]."""
    logits = hidden.float() @ head.float().T
    if not bool((target != PAD).any()):
        return 0.0 * logits.sum()
    return F.cross_entropy(logits.flatten(0, 1), target.flatten(), ignore_index=PAD)


def caption_loss(hidden: Tensor, head: Tensor, target: Tensor, chunk: int = 4096) -> Tensor:
    """`caption_loss_plain` with logits only where there is a target, `chunk` rows at a time, recomputed in the backward.

    Args:
        hidden: the decoder's states after its LayerNorm, [B, N, D].
        head: weight of the vocabulary head, [V, D].
        target: token ids, [B, N]; `PAD` is ignored.
        chunk: rows of logits that exist at once: memory is chunk × V, not B × N × V.

    Returns:
        A scalar; zero, still connected to the graph, where no target is left.
    """
    kept = target.flatten() != PAD
    rows, labels = hidden.flatten(0, 1)[kept], target.flatten()[kept]
    if len(labels) == 0:
        return 0.0 * (hidden.sum() + head.sum())
    total = hidden.new_zeros((), dtype=torch.float32)
    for part, part_labels in zip(rows.split(chunk), labels.split(chunk), strict=True):
        if (
            len(labels) <= chunk
        ):  # a single chunk: keeping its logits costs no more than computing them again would hold
            total = total + _summed_cross_entropy(part, head, part_labels)
        else:
            total = total + checkpoint(_summed_cross_entropy, part, head, part_labels, use_reentrant=False)
    return total / len(labels)


def _summed_cross_entropy(rows: Tensor, head: Tensor, labels: Tensor) -> Tensor:
    return F.cross_entropy(F.linear(rows, head.to(rows.dtype)).float(), labels, reduction="sum")
