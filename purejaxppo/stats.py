"""Intervals of means over seeds."""

import numpy as np
from jaxtyping import Float


def mean_interval(
    values: Float[np.ndarray, "*batch S"], confidence: float = 0.95
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Mean over the last axis and Student's t interval of it; NaNs are left out.

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
