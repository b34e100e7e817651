"""The PbKD game on the beds as convex programmes, in plain float64 numpy and scipy.

For tabular rewards both the inner problem (best reward in the confidence set) and the
value of the whole game are convex; SLSQP and linear programming solve them without the
library under test.
"""

from __future__ import annotations

import dataclasses
import functools

import numpy as np
from scipy.optimize import linprog, minimize

from tests.tabular.bed import (
    BED_E,
    MINI,
    MINI_PAIRS,
    MINI_REWARD,
    MINI_TEACHER,
    PAIRS,
    REWARD,
    STUDENT,
    TEACHER,
    Bed,
    preference_nll,
)


def sigmoid(u):
    return 1.0 / (1.0 + np.exp(-u))


@dataclasses.dataclass(frozen=True)
class Game:
    """min over policies, max over rewards with |r| <= 1 near the anchor r*."""

    bed: Bed
    teacher: np.ndarray  # [X, N], d_0(x) pi_E(y | x)
    true_rewards: np.ndarray  # [X, K, V], r*, the maximum-likelihood anchor
    pairs: np.ndarray  # [pairs, 3]: prompt, response, response

    @functools.cached_property
    def features(self) -> np.ndarray:
        """[X, N, R]: a response's return is its features times the reward vector."""
        units = np.eye(self.size).reshape(self.size, *self.bed.table_shape)
        return np.stack([self.bed.returns(unit) for unit in units], axis=-1)

    @property
    def size(self) -> int:
        return int(np.prod(self.bed.table_shape))

    @property
    def anchor(self) -> np.ndarray:
        return self.true_rewards.ravel()

    @functools.cached_property
    def differences(self) -> np.ndarray:
        """[pairs, R]."""
        x, i, j = self.pairs.T
        return self.features[x, i] - self.features[x, j]

    @functools.cached_property
    def labels(self) -> np.ndarray:
        return sigmoid(self.differences @ self.anchor)

    @functools.cached_property
    def anchor_nll(self) -> float:
        return preference_nll(self.differences @ self.anchor, self.labels)

    def excess(self, rewards: np.ndarray) -> float:
        """Mean NLL above the anchor's."""
        nll = preference_nll(self.differences @ rewards, self.labels)
        return nll - self.anchor_nll

    def excess_slope(self, rewards: np.ndarray) -> np.ndarray:
        error = sigmoid(self.differences @ rewards) - self.labels
        return error @ self.differences / len(self.pairs)

    def gap_slope(self, student: np.ndarray) -> np.ndarray:
        """[R]: the gap of a reward vector is its inner product with this."""
        return np.einsum("xn,xnr->r", self.teacher - student, self.features)

    def maximise(self, slope, epsilon, rows=None, more_start=()):
        """max slope . z with z = (rewards, more), rows z >= 0, excess <= epsilon."""
        more = len(slope) - self.size
        bounds = [(-1.0, 1.0)] * self.size + [(None, None)] * more
        if epsilon == 0:  # every pair difference is pinned: a linear programme
            pinned = np.hstack([self.differences, np.zeros((len(self.pairs), more))])
            result = linprog(
                -slope,
                A_ub=None if rows is None else -rows,
                b_ub=None if rows is None else np.zeros(len(rows)),
                A_eq=pinned,
                b_eq=self.differences @ self.anchor,
                bounds=bounds,
            )
            return -result.fun, result.x
        pad = np.zeros(more)
        inside = {
            "type": "ineq",
            "fun": lambda z: epsilon - self.excess(z[: self.size]),
            "jac": lambda z: -np.append(self.excess_slope(z[: self.size]), pad),
        }
        linear = {"type": "ineq", "fun": lambda z: rows @ z, "jac": lambda z: rows}
        start = np.append(self.anchor, more_start)
        for tolerance in (1e-13, 1e-11, 1e-9):  # a tight one may end in its line search
            result = minimize(
                lambda z: -slope @ z,
                start,
                jac=lambda z: -slope,
                bounds=bounds,
                constraints=[inside] if rows is None else [inside, linear],
                method="SLSQP",
                options={"ftol": tolerance, "maxiter": 500},
            )
            if result.success:
                return -result.fun, result.x
            start = result.x
        raise AssertionError(result.message)

    def inner(self, student, epsilon):
        """Largest gap in the set, and the reward vector that attains it."""
        return self.maximise(self.gap_slope(student), epsilon)

    def value(self, epsilon) -> float:
        """P2: -min over the set of SubOpt_r(pi_E), with optimal values as unknowns."""
        x, k, v = self.bed.table_shape
        rows = np.zeros((self.size, self.size + x * k))  # V(s) - r(s, a) - V(s') >= 0
        entries = enumerate(np.ndindex(x, k, v))
        for row, (prompt, prefix, action) in entries:
            rows[row, row] = -1.0
            rows[row, self.size + prompt * k + prefix] += 1.0
            following = 2 * prefix + 1 + action
            if action != self.bed.eos and following < k:
                rows[row, self.size + prompt * k + following] -= 1.0
        start = np.zeros((x, k))
        start[:, 0] = self.bed.prompt_weights
        teacher = np.einsum("xn,xnr->r", self.teacher, self.features)
        remaining = self.bed.horizon - np.floor(np.log2(np.arange(k) + 1))
        slope = np.append(teacher, -start)
        return self.maximise(slope, epsilon, rows, np.tile(remaining, x))[0]


BIG = Game(BED_E, BED_E.weights(TEACHER), 0.5 * REWARD, PAIRS)
BIG_STUDENT = BED_E.weights(STUDENT)
SMALL = Game(MINI, MINI_TEACHER[None], MINI_REWARD, MINI_PAIRS)
