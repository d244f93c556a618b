"""Results of trials, and their ranking."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np

from purejaxppo.config import Config, ConfigError, HParams
from purejaxppo.host.configfile import Settings, toml
from purejaxppo.host.loggers import HostMetrics
from purejaxppo.sweeps.settings import Definition
from purejaxppo.sweeps.space import apply
from purejaxppo.sweeps.strategies import Trial
from purejaxppo.types import TrainState


class Outcome(NamedTuple):
    """Result of a trial, of S seeds."""

    trial: Trial
    returns: np.ndarray
    """`[S]` mean returns in the final evaluation, by which the best trial is selected; NaN for a
    seed that failed."""
    failed: dict[int, int]
    """Update at which the loss turned non-finite, by seed. A member of a population that was
    replaced later does not count as failed."""
    updates: int
    """Updates trained."""
    wave: int
    """Index of the wave that trained it last."""

    @property
    def score(self) -> float:
        """Selection return, by which trials are ranked: mean over seeds, NaN if one failed."""
        return float(np.mean(self.returns))

    def num_updates(self, settings: Settings) -> int:
        """Number of updates of the trial at full length."""
        return apply(self.trial.values, settings.config, settings.hparams)[0].num_updates

    def is_whole(self, settings: Settings) -> bool:
        """Whether it was trained to the end and no seed failed."""
        return np.isfinite(self.score) and self.updates == self.num_updates(settings)


@dataclass(frozen=True)
class SweepResult:
    """Result of `sweep`, for K trials of S seeds."""

    outcomes: list[Outcome]
    """Ordered by trial number."""
    best: Outcome | None
    """The trial with the highest selection return among those trained to the end (ties: the lowest
    number); None if every trial failed."""
    tied: list[int]
    """Numbers of the trials whose selection return equals the best one's."""
    best_returns: np.ndarray
    """`[S, E]` returns of the best trial on fresh episodes, at least 1,024 over all seeds; empty
    if every trial failed."""
    config: Config
    """Config of the best trial."""
    hparams: HParams
    """Hyperparameters of the best trial; of a member of a population, those it ended with."""
    _states: Callable[[int], TrainState] = field(repr=False)

    @property
    def returns(self) -> np.ndarray:
        """`[K, S]` selection returns, by which trials are ranked. The highest of them is
        optimistic; `best_return` is not."""
        return np.stack([outcome.returns for outcome in self.outcomes])

    @property
    def best_return(self) -> float:
        """Mean return of the best trial on fresh episodes; NaN if every trial failed."""
        return float(np.mean(self.best_returns)) if self.best_returns.size else np.nan

    def states(self, trial: int | None = None) -> TrainState:
        """Trained states of a trial; for a seed that failed, its last good state.

        Args:
            trial: number of the trial; None gives the best.

        Returns:
            leaves `[S, ...]`.

        Raises:
            ConfigError: if the trial does not exist, or `trial` is None and every trial failed.
        """
        if trial is None:
            if self.best is None:
                raise ConfigError(
                    "every trial failed, so there is no best one; give the number of a trial"
                )
            trial = self.best.trial.number
        if not 0 <= trial < len(self.outcomes):
            count = len(self.outcomes)
            raise ConfigError(f"trial = {trial}: the sweep has trials 0 to {count - 1}")
        return self._states(trial)


def ranked(outcomes: Mapping[int, Outcome], definition: Definition) -> list[Outcome]:
    """Trials that did not fail: longest trained first, then by highest selection return, then by
    number."""
    settings = definition.settings
    good = [outcome for outcome in outcomes.values() if np.isfinite(outcome.score)]
    return sorted(
        good, key=lambda o: (-o.updates / o.num_updates(settings), -o.score, o.trial.number)
    )


def result_rows(outcomes: Mapping[int, Outcome], definition: Definition) -> list[dict[str, Any]]:
    """The rows of `results.csv`, one per trial and seed.

    `eval_return` is the seed's mean return in the final evaluation, empty if it failed;
    `failed_at_update` is the update at which its loss turned non-finite.
    """
    names, rows = definition.sweep.space.names, []
    for number in sorted(outcomes):
        outcome = outcomes[number]
        config, _ = apply(
            outcome.trial.values, definition.settings.config, definition.settings.hparams
        )
        values = {name: _cell(outcome.trial.values[name]) for name in names}
        for seed, value in enumerate(outcome.returns):
            rows.append(
                {"trial": number, "seed": seed}
                | values
                | {
                    "eval_return": "" if np.isnan(value) else float(value),
                    "failed_at_update": outcome.failed.get(seed, ""),
                    "env_steps": outcome.updates * config.batch_size,
                    "wave": outcome.wave,
                }
            )
    return rows


def curve_columns(
    metrics: HostMetrics, numbers: Sequence[int], seeds: int, first: int
) -> dict[str, np.ndarray]:
    """Metrics `[U, S]` of a wave as columns with one row per run and update, without padding.

    Args:
        first: updates done before the wave.
    """
    kept = len(numbers) * seeds
    length = len(next(iter(metrics.values())))
    trial = np.repeat(np.asarray(numbers, np.int32), seeds * length)
    seed = np.tile(np.repeat(np.arange(seeds, dtype=np.int32), length), len(numbers))
    update = np.tile(np.arange(first + 1, first + length + 1, dtype=np.int32), kept)
    columns = {name: metrics[name][:, :kept].T.reshape(-1) for name in metrics}
    return {"trial": trial, "seed": seed, "update": update} | columns


def _cell(value: Any) -> Any:
    """A value as written to `results.csv`; `parse_values` reads it back."""
    return "none" if value is None else toml(value) if isinstance(value, tuple | bool) else value
