"""What can be read off frozen features: a linear probe (logistic regression by L-BFGS) and the vote of the nearest neighbours."""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from tqdm import tqdm

from clips_core.zero_shot import ranks_by_score, recall
from eval_suites.towers.config import KnnConfig, ProbeConfig

LOGITS = 2**26  # numbers that are held at a time: 256 MiB in fp32
TOLERANCE = 1e-4  # a fit has converged when no entry of its gradient is above this share of the largest at the start


class Linear(NamedTuple):
    """A linear classifier: logits = x @ weight.T + bias."""

    weight: Tensor  # [C, E]
    bias: Tensor  # [C]
    converged: bool


class Probe(NamedTuple):
    """A linear probe, and how its penalty was chosen."""

    linear: Linear  # of features that `scale` was applied to
    l2: float
    held_out: dict[float, float]  # top-1 accuracy on the held-out pictures by strength of the penalty
    fitted: int  # pictures that each strength was fitted on


class Scale(NamedTuple):
    """Training features are centred and divided by one number, so that an L2 strength means the same for every tower.

    A probe's bias is free, so centring changes no optimum.
    """

    mean: Tensor  # [E]
    spread: Tensor  # scalar: root of the mean variance of the features' entries

    @classmethod
    def of(cls, features: Tensor) -> "Scale":
        mean = features.mean(dim=0)
        spread = (features - mean).square().mean().sqrt()
        return cls(mean, torch.where(spread > 0, spread, torch.ones_like(spread)))

    def __call__(self, features: Tensor) -> Tensor:
        return (features - self.mean) / self.spread


# -------------------------------------------------------------------------------------------------------- linear probe


def linear_probe(features: Tensor, labels: Tensor, classes: int, config: ProbeConfig) -> Probe:
    """Choose the penalty on a held-out part of the training pictures, then fit all of them with it.

    Of penalties that do equally well, the strongest is taken.

    Args:
        features: scaled, [N, E].
        labels: int64 [N], below `classes`.
    """
    kept, held_out = split(labels, config.held_out, config.seed)
    accuracies: dict[float, float] = {}
    start: Linear | None = None
    for l2 in tqdm(sorted(config.l2, reverse=True), desc="linear probe", unit="fit", delay=1):
        if len(config.l2) > 1:  # from the solution with a stronger penalty to the next
            start = fit(features[kept], labels[kept], classes, l2, config.max_iterations, start)
            rank = ranks(scores(start, features[held_out]), labels[held_out])
            accuracies[l2] = recall(rank, 1)
    best = max(config.l2, key=lambda l2: (accuracies.get(l2, 0.0), l2))
    linear = fit(features, labels, classes, best, config.max_iterations)
    return Probe(linear, best, accuracies, len(kept))


def split(labels: Tensor, share: float, seed: int) -> tuple[Tensor, Tensor]:
    """Rows that are kept, and those held out: `share` of each class's, at least one where it has two. Sorted, int64."""
    rng = np.random.default_rng(seed)
    own = labels.cpu().numpy()
    held_out = np.zeros(len(own), dtype=bool)
    for label in np.unique(own):
        rows = np.flatnonzero(own == label)
        count = min(len(rows) - 1, max(1, round(share * len(rows))))
        held_out[rng.permutation(rows)[:count]] = True
    indices = torch.arange(len(own), device=labels.device)
    mask = torch.from_numpy(held_out).to(labels.device)
    return indices[~mask], indices[mask]


@torch.no_grad()
def fit(
    features: Tensor,
    labels: Tensor,
    classes: int,
    l2: float,
    max_iterations: int = 1000,
    start: Linear | None = None,
    tolerance: float = TOLERANCE,
) -> Linear:
    """Minimise mean cross-entropy + l2 / 2 · |weight|² by full-batch L-BFGS; the bias is not penalised.

    In scikit-learn's terms, l2 = 1 / (C · N). The gradient is written out, so that memory holds one chunk of logits, never [N, C].

    Args:
        features: [N, E], of the dtype and on the device to compute in.
        labels: int64 [N].
        start: where to begin; zero when left out.
        tolerance: see `TOLERANCE`.
    """
    samples, width = features.shape
    parameters = torch.zeros(classes, width + 1, dtype=features.dtype, device=features.device)  # bias last
    chunk = max(1, LOGITS // classes)

    def gradient(unit: float) -> float:
        """Set the gradient of the objective in units of `unit`, and return its value."""
        weight, bias = parameters[:, :-1], parameters[:, -1]
        loss = 0.5 * l2 * weight.square().sum()
        slope = torch.zeros_like(parameters)
        slope[:, :-1] = l2 * weight
        for x, y in zip(features.split(chunk), labels.split(chunk), strict=True):
            log_p = F.log_softmax(x @ weight.T + bias, dim=-1)
            loss -= log_p.gather(1, y[:, None]).sum() / samples
            error = log_p.exp()
            error[torch.arange(len(y), device=y.device), y] -= 1
            slope[:, :-1] += error.T @ x / samples
            slope[:, -1] += error.sum(dim=0) / samples
        parameters.grad = slope / unit
        return loss.item() / unit

    def largest() -> float:
        assert parameters.grad is not None
        return parameters.grad.abs().max().item()

    gradient(1.0)
    # In units of the first gradient, the optimizer's absolute thresholds fit any number of classes and widths.
    unit = largest() or 1.0
    if start is not None:
        parameters[:, :-1], parameters[:, -1] = start.weight, start.bias
    optimizer = torch.optim.LBFGS(
        [parameters],
        max_iter=max_iterations,
        max_eval=2 * max_iterations,
        tolerance_grad=tolerance,
        tolerance_change=0,
        history_size=20,
        line_search_fn="strong_wolfe",
    )
    optimizer.step(lambda: gradient(unit))
    gradient(unit)
    return Linear(parameters[:, :-1].clone(), parameters[:, -1].clone(), largest() <= 2 * tolerance)


def scores(linear: Linear, features: Tensor) -> Tensor:
    """Logits, [N, C]."""
    return features @ linear.weight.T + linear.bias


# ---------------------------------------------------------------------------------------------------------- neighbours


def knn_scores(queries: Tensor, train: Tensor, labels: Tensor, classes: int, config: KnnConfig) -> Tensor:
    """Votes for each class, [Q, C]: each of the k nearest training pictures votes exp(cosine / temperature) for its class.

    Args:
        queries, train: L2-normalised features [Q, E], [N, E].
        labels: of `train`, int64 [N].
    """
    k = min(config.k, len(train))
    votes = torch.zeros(len(queries), classes, dtype=queries.dtype, device=queries.device)
    chunk = max(1, LOGITS // len(train))
    for part, own in zip(queries.split(chunk), votes.split(chunk), strict=True):
        nearest = (part @ train.T).topk(k, dim=1)
        own.scatter_add_(1, labels[nearest.indices], (nearest.values / config.temperature).exp())
    return votes


def ranks(scores: Tensor, labels: Tensor) -> Tensor:
    """Rank of each row's own class, 0 best, int64 [N] on the CPU; a class that ties with it counts as before it."""
    found = []
    for part, own in zip(scores.split(1024), labels.split(1024), strict=True):
        found.append(ranks_by_score(part, F.one_hot(own, scores.shape[1]).bool()).cpu())
    return torch.cat(found)


def at_edge(l2: float, strengths: Sequence[float]) -> bool:
    """Whether the chosen penalty is the weakest or strongest of several: a better one may lie beyond."""
    return len(strengths) > 1 and l2 in (min(strengths), max(strengths))
