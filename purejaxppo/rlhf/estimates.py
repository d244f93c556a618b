"""Unbiased estimates from samples of responses, and their intervals over prompts."""

from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Float

from purejaxppo.checks import ConfigError
from purejaxppo.host.stats import mean_interval
from purejaxppo.inputs import whole_number

_ROUNDING = 1e-6
"""Scores that differ by less, relative to the larger of them and 1, are ties: float32 sums of the
same numbers in another order differ by as much."""


class Estimate(NamedTuple):
    """An estimate and its 95% interval. The interval is over prompts, since responses to the same
    prompt are not independent."""

    mean: float
    low: float
    """NaN with one prompt."""
    high: float


def mean_over_prompts(values: Any, *, share: bool = False) -> Estimate:
    """The mean over prompts, with a Student's t interval.

    Args:
        values: `[P]`, one mean per prompt.
        share: clip the interval to [0, 1].
    """
    mean, low, high = (float(x) for x in mean_interval(np.asarray(values, np.float64)))
    return Estimate(mean, max(low, 0.0), min(high, 1.0)) if share else Estimate(mean, low, high)


def of_means(
    function: Callable[[Float[np.ndarray, " D"]], float], values: Float[np.ndarray, "P D"]
) -> Estimate:
    """A function of means over prompts, with a jackknife interval (Efron and Stein 1981): the
    standard error is computed from the values without one prompt each. For the mean itself, the
    interval is that of `mean_over_prompts`."""
    from scipy.stats import t  # slow to import

    count, mean = len(values), float(function(values.mean(axis=0)))
    if count < 2:
        return Estimate(mean, float("nan"), float("nan"))
    without = (values.sum(axis=0) - values) / (count - 1)
    each = np.array([function(row) for row in without])
    error = np.sqrt((count - 1) / count * np.square(each - each.mean()).sum())
    half = float(t.ppf(0.975, count - 1) * error)
    return Estimate(mean, mean - half, mean + half)


def pass_at_k(n: int, c: Any, k: int) -> Float[np.ndarray, "..."]:
    """Estimate the probability that at least one of k responses is exact, without bias, from n
    responses of which c are:

        1 - C(n - c, k) / C(n, k)

    (Chen et al. 2021, arXiv:2107.03374, eq. 1).

    Args:
        c: a number or an array, such as one count per prompt.

    Raises:
        ConfigError: if k is above n, or c is not from 0 to n.
    """
    n, k = whole_number("n", n, 1), whole_number("k", k, 1)
    count = np.asarray(c)
    if k > n:
        raise ConfigError(f"k = {k}: must be at most n = {n}, the number of responses")
    if not np.all((count >= 0) & (count <= n)):
        raise ConfigError(f"c = {c}: must be from 0 to n = {n}")
    drawn = np.arange(k)
    wrong = np.maximum(n - count[..., None] - drawn, 0) / (n - drawn)
    return 1.0 - np.prod(wrong, axis=-1)


def best_of_n(
    scores: Float[np.ndarray, "*batch N"],
    n: int,
    judged: Float[np.ndarray, "*batch N"] | None = None,
) -> Float[np.ndarray, "*batch"]:
    """Estimate the expected score of the best of n responses, without bias, from N responses.

    It is the mean over all choices of n of the N responses: the i-th lowest of the scores is the
    best of C(i - 1, n - 1) of the C(N, n) choices.

    Args:
        scores: scores by which the best response is selected.
        judged: scores to report for the selected response; None reports `scores`. Among responses
            with equal `scores`, one is selected at random.

    Raises:
        ConfigError: if n is not from 1 to N.
    """
    total = scores.shape[-1]
    if whole_number("n", n, 1) > total:
        raise ConfigError(f"n = {n}: must be at most {total}, the number of responses")
    return best_of_each(scores, judged, n)[..., n - 1]


def best_of_each(
    scores: Float[np.ndarray, "*batch N"],
    judged: Float[np.ndarray, "*batch N"] | None,
    largest: int,
) -> Float[np.ndarray, "*batch M"]:
    """`best_of_n` for n from 1 to `largest` (M)."""
    total = scores.shape[-1]
    order = np.argsort(scores, axis=-1, kind="stable")
    ranked = np.take_along_axis(np.asarray(scores, np.float64), order, axis=-1)
    values = ranked
    if judged is not None:
        values = np.take_along_axis(np.asarray(judged, np.float64), order, axis=-1)
        values = _mean_of_ties(ranked, values)
    drawn = np.arange(largest)[:, None]
    # C(i, n) / C(N, n) for the i lowest: the share of choices that have no response above them.
    factors = np.maximum(np.arange(1, total + 1) - drawn, 0) / (total - drawn)
    below = np.cumprod(factors, axis=0)
    return values @ np.diff(below, axis=1, prepend=0.0).T


def _mean_of_ties(
    ranked: Float[np.ndarray, "*batch N"], values: Float[np.ndarray, "*batch N"]
) -> Float[np.ndarray, "*batch N"]:
    """Replace the values of equal ranks by their mean."""
    rows = ranked.reshape(-1, ranked.shape[-1])
    found = np.array(values.reshape(rows.shape))
    for row, own in zip(rows, found, strict=True):
        group = np.cumsum(np.diff(row, prepend=row[0]) > 0)
        own[:] = (np.bincount(group, own) / np.bincount(group))[group]
    return found.reshape(values.shape)


def kl_bound(n: Any) -> Any:
    """The largest KL divergence of best-of-n from the policy that it samples from: log n - (n - 1)
    / n (Beirami et al. 2024, arXiv:2401.01879)."""
    return np.log(n) - (n - 1) / np.asarray(n, np.float64)


class Wins(NamedTuple):
    """Shares of pairs of responses to the same prompt."""

    win_rate: Float[np.ndarray, " P"]
    """Pairs in which the first has the higher score; ties count half."""
    ties: Float[np.ndarray, " P"]


def wins(first: Float[np.ndarray, "P K"], second: Float[np.ndarray, "P M"]) -> Wins:
    """Compare all pairs of two sets of responses by their scores."""
    won, tied = np.zeros(len(first)), np.zeros(len(first))
    for column in first.T:
        one = column[:, None]
        near = np.abs(one - second) <= _ROUNDING * np.maximum(
            1.0, np.maximum(np.abs(one), np.abs(second))
        )
        tied += near.mean(axis=1)
        won += ((one > second) & ~near).mean(axis=1)
    return Wins((won + 0.5 * tied) / first.shape[1], tied / first.shape[1])
