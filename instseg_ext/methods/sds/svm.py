"""Linear support vector machines with hard negatives (Sec. 4 of SDS, as the authors' code does).

Shapes: N samples of D features, P positives.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np

__all__ = ["LinearSvm", "MinedSvm", "SvmOptions", "fit_svm"]

# Samples that are updated together: their products fit into a cache, and the steps among them cost
# as much as their number instead of as many as there are features.
_BLOCK = 128
# Steps inside a block before the next one has its turn, in units of its samples; and the part of
# the largest violation at which it has its turn earlier.
_STEPS = 2
_CARE = 0.1


class LinearSvm(NamedTuple):
    """A fitted classifier: a sample scores ``features @ weight + bias``.

    Attributes:
        weight: (D,) float64.
        bias: the bias.
        duals: (N,) float64, the dual variables, from which a later fit may start.
        objective: value of what is minimised.
    """

    weight: np.ndarray
    bias: float
    duals: np.ndarray
    objective: float


@dataclass(frozen=True)
class SvmOptions:
    """Settings of training; see the config keys of the same names.

    Attributes:
        c: weight of the loss of a negative (C).
        positive_weight: that of a positive, in units of ``c``.
        bias_value: the constant feature whose weight, times this, is the bias; 0.0 = no bias.
        tolerance: largest violation of the optimality conditions that is left, in units of scores.
        max_passes: over all samples.
        hard: negatives that score this or more join those in training.
        evict: those that score this or less leave again.
        retrain: a fit follows when more new negatives than this have joined.
    """

    c: float = 1e-3
    positive_weight: float = 2.0
    bias_value: float = 10.0
    tolerance: float = 1e-3
    max_passes: int = 1000
    hard: float = -1.0001
    evict: float = -1.2
    retrain: int = 2000


def fit_svm(
    features: np.ndarray,
    positive: np.ndarray,
    options: SvmOptions,
    duals: np.ndarray | None = None,
) -> LinearSvm:
    """Minimise ``|w|^2 / 2 + C (2 * hinge of positives + hinge of negatives)``, sums, not means.

    The dual is solved by coordinate descent, as LIBLINEAR's solver 3 does, which SDS uses. Instead
    of in random order, the sample that violates its condition most is moved, within blocks that
    take turns: nothing is drawn, and equal input gives equal output.

    Args:
        features: (N, D) float of any precision; computed with as float64.
        positive: (N,) bool.
        options: settings.
        duals: (N,) to start from, such as those of an earlier fit with fewer samples and zeros.

    Returns:
        The classifier. Without samples it is 0.
    """
    num, dim = features.shape
    sign = np.where(positive, 1.0, -1.0)
    upper = options.c * np.where(positive, options.positive_weight, 1.0)
    duals = np.zeros(num) if duals is None else np.clip(duals, 0, upper)
    count = max(1, -(-num // _BLOCK))
    # Every block gets positives and negatives: only between them is there something to balance.
    blocks = [np.arange(start, num, count) for start in range(count)] if num else []
    products = [_products(features[rows], sign[rows], options.bias_value) for rows in blocks]
    weight = _weight(features, sign * duals, options.bias_value)
    for _ in range(options.max_passes):
        worst = 0.0
        for rows, product in zip(blocks, products, strict=True):
            part = _with_bias(features[rows], options.bias_value)
            gradient = sign[rows] * (part @ weight) - 1
            moved, violation = _solve_block(
                product, gradient, duals[rows], upper[rows], options.tolerance
            )
            worst = max(worst, violation)
            if violation > options.tolerance:
                weight += (sign[rows] * (moved - duals[rows])) @ part
                duals[rows] = moved
        if worst <= options.tolerance:
            break
    # From the duals alone, without the rounding of many steps.
    weight = _weight(features, sign * duals, options.bias_value)
    hinge = np.zeros(num)
    for rows in blocks:
        part = _with_bias(features[rows], options.bias_value)
        hinge[rows] = np.maximum(1 - sign[rows] * (part @ weight), 0)
    objective = float(weight @ weight / 2 + upper @ hinge)
    return LinearSvm(weight[:dim], float(weight[dim] * options.bias_value), duals, objective)


def _with_bias(features: np.ndarray, bias_value: float) -> np.ndarray:
    """Return (n, D + 1) float64: the features and the constant one."""
    constant = np.full((len(features), 1), bias_value)
    return np.concatenate([features.astype(np.float64), constant], axis=1)


def _weight(features: np.ndarray, coefficients: np.ndarray, bias_value: float) -> np.ndarray:
    """Return (D + 1,): the sum of the samples times their (N,) coefficients."""
    weight = np.zeros(features.shape[1] + 1)
    used = np.flatnonzero(coefficients)
    for start in range(0, len(used), _BLOCK):
        rows = used[start : start + _BLOCK]
        weight += coefficients[rows] @ _with_bias(features[rows], bias_value)
    return weight


def _products(features: np.ndarray, sign: np.ndarray, bias_value: float) -> np.ndarray:
    """Return (n, n): products of samples, each with its sign."""
    part = _with_bias(features, bias_value) * sign[:, None]
    return part @ part.T


def _solve_block(
    product: np.ndarray,
    gradient: np.ndarray,
    duals: np.ndarray,
    upper: np.ndarray,
    tolerance: float,
) -> tuple[np.ndarray, float]:
    """Move the duals of a block until each is as good as the others allow.

    Args:
        product: (n, n).
        gradient: (n,) of the dual objective.
        duals: (n,), in [0, upper].
        upper: (n,).
        tolerance: see ``SvmOptions``.

    Returns:
        (n,) new duals; and the largest violation at the beginning.
    """
    duals, gradient = duals.copy(), gradient.copy()
    # A sample of zeros has nothing to say about the weights: its dual goes to its bound at once.
    curvature = np.maximum(product.diagonal(), 1e-12)
    first = None
    for _ in range(_STEPS * len(duals)):
        # A dual at a bound may only move away from it.
        violation = np.where(duals <= 0, np.minimum(gradient, 0), gradient)
        violation = np.abs(np.where(duals >= upper, np.maximum(violation, 0), violation))
        row = int(violation.argmax())
        first = violation[row] if first is None else first
        # What the other blocks will do undoes greater care.
        if violation[row] <= max(tolerance, _CARE * first):
            break
        new = min(max(duals[row] - gradient[row] / curvature[row], 0.0), upper[row])
        gradient += (new - duals[row]) * product[row]
        duals[row] = new
    return duals, float(first or 0.0)


@dataclass
class MinedSvm:
    """One class's classifier and the negatives that it is trained with, which come by and by.

    Attributes:
        options: settings.
        positives: (P, D) float, in whose precision negatives are kept, too.
        negatives: (N, D) float, those of the last fit.
        keys: int64, which samples of the data set they and those that have joined since are.
        model: of the last fit; None before it.
        pending: negatives that have joined since.
    """

    options: SvmOptions
    positives: np.ndarray
    negatives: np.ndarray = field(init=False)
    keys: np.ndarray = field(init=False)
    model: LinearSvm | None = field(default=None, init=False)
    pending: int = field(default=0, init=False)
    _duals: np.ndarray = field(init=False)
    _joining: list[np.ndarray] = field(default_factory=list, init=False)

    def __post_init__(self) -> None:
        """Start without negatives."""
        self.negatives = self.positives[:0]
        self.keys = np.zeros(0, dtype=np.int64)
        self._duals = np.zeros(0)

    def add(self, features: np.ndarray, keys: np.ndarray, among: np.ndarray | None = None) -> int:
        """Let those negatives join that are hard and not there yet.

        Before the first fit all are hard. Fits if enough have joined.

        Args:
            features: (n, D) float.
            keys: (n,) int64.
            among: (n,) bool, which of them are negatives; None = all.

        Returns:
            How many have joined.
        """
        new = ~np.isin(keys, self.keys)
        new = new if among is None else new & among
        if self.model is not None:
            new &= self._scores(features) >= self.options.hard
        count = int(new.sum())
        if count:
            self._joining.append(features[new].astype(self.positives.dtype))
            self.keys = np.concatenate([self.keys, keys[new]])
            self.pending += count
        if self.model is None or self.pending > self.options.retrain:
            self.fit()
        return count

    def _scores(self, features: np.ndarray) -> np.ndarray:
        """Return (n,) float32 scores of the last model."""
        weight = self.model.weight.astype(np.float32)
        return features.astype(np.float32, copy=False) @ weight + np.float32(self.model.bias)

    def replace_positives(self, positives: np.ndarray) -> None:
        """Take other positives; what follows from them waits for the next fit."""
        self.positives = positives
        if self.model is not None:
            self.model = self.model._replace(duals=np.zeros(0))

    def fit(self) -> LinearSvm:
        """Fit to what is there, from the last fit on, and let easy negatives leave."""
        num = len(self.positives)
        before = np.zeros(num)
        if self.model is not None and len(self.model.duals) >= num:
            before = self.model.duals[:num]
        self.negatives = np.concatenate([self.negatives, *self._joining])
        features = np.concatenate([self.positives, self.negatives])
        positive = np.arange(len(features)) < num
        duals = np.concatenate([before, self._duals, np.zeros(self.pending)])
        self.model = fit_svm(features, positive, self.options, duals)
        stay = self._scores(self.negatives) > self.options.evict
        self.negatives, self.keys = self.negatives[stay], self.keys[stay]
        self._duals = self.model.duals[num:][stay]
        self._joining, self.pending = [], 0
        return self.model
