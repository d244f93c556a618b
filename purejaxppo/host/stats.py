"""Means over seeds and their confidence intervals."""

from collections.abc import Callable, Sequence

import numpy as np
from jaxtyping import Float

FEW_SEEDS = 5
"""Intervals over fewer seeds than this are only rough, and are marked as such."""


def mean_interval(
    values: Float[np.ndarray, "*batch S"], confidence: float = 0.95
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Mean over the last axis and its Student's t interval; NaNs are left out.

    With fewer than two values there is no interval: its bounds are NaN.

    Returns:
        mean, lower and upper bound, each `[*batch]`.
    """
    from scipy.stats import t  # slow to import

    seen = np.isfinite(values)
    count = seen.sum(axis=-1)
    mean = np.where(seen, values, 0.0).sum(axis=-1) / np.where(count, count, np.nan)
    squares = np.where(seen, np.square(values - mean[..., None]), 0.0).sum(axis=-1)
    freedom = np.where(count > 1, count - 1, np.nan)
    half = t.ppf(0.5 + confidence / 2, freedom) * np.sqrt(squares / freedom / np.maximum(count, 1))
    return np.asarray(mean), np.asarray(mean - half), np.asarray(mean + half)


def describe_interval(interval: Sequence[float] | None, seeds: int) -> str:
    """Format a 95% interval over seeds, with their number if they are few; empty for None."""
    if interval is None:
        return ""
    few = f", only {seeds} seeds" if seeds < FEW_SEEDS else ""
    return f" (95% interval {interval[0]:.2f} to {interval[1]:.2f}{few})"


def episode_mean(returns: Float[np.ndarray, "*batch E"]) -> np.ndarray:
    """Mean over the episodes that ended (with a finite return); NaN if none did."""
    ended = np.isfinite(returns)
    count = ended.sum(axis=-1)
    total = np.where(ended, returns, 0.0).sum(axis=-1)
    return np.asarray(np.where(count, total / np.maximum(count, 1), np.nan))


def bootstrap_mean_interval(
    values: Float[np.ndarray, "P S"], confidence: float = 0.95, resamples: int = 1000
) -> tuple[Float[np.ndarray, " P"], Float[np.ndarray, " P"]]:
    """Percentile bootstrap interval (Efron 1979) of the mean over the last axis, which lies within
    the range of the values; NaNs are left out.

    All P means use the same resamples of the S columns, so a band over curves is smooth. With fewer
    than two values there is no interval: its bounds are NaN.

    Returns:
        lower and upper bound.
    """
    seen = np.isfinite(values)
    size = values.shape[1]
    drawn = np.random.default_rng(0).multinomial(size, np.full(size, 1 / size), resamples)
    count = seen @ drawn.T
    total = np.where(seen, values, 0.0) @ drawn.T
    means = np.divide(total, count, out=np.full(total.shape, np.nan), where=count > 0)
    bounds, enough = np.full((2, len(values)), np.nan), seen.sum(axis=1) > 1
    if enough.any():
        shares = [0.5 - confidence / 2, 0.5 + confidence / 2]
        bounds[:, enough] = np.nanquantile(means[enough], shares, axis=1)
    return bounds[0], bounds[1]


def interquartile_mean(values: Float[np.ndarray, "*batch S"]) -> np.ndarray:
    """Interquartile mean over the last axis: as robust as a median, with less variance (Agarwal et
    al. 2021, arXiv:2108.13264)."""
    from scipy.stats import trim_mean  # slow to import

    return np.asarray(trim_mean(values, 0.25, axis=-1))


def bootstrap_interval(
    values: Float[np.ndarray, " S"],
    statistic: Callable[[np.ndarray], np.ndarray],
    confidence: float = 0.95,
    resamples: int = 2000,
) -> tuple[float, float]:
    """Percentile bootstrap interval (Efron 1979) of a statistic over the last axis."""
    drawn = np.random.default_rng(0).integers(len(values), size=(resamples, len(values)))
    low, high = np.quantile(statistic(values[drawn]), [0.5 - confidence / 2, 0.5 + confidence / 2])
    return float(low), float(high)
