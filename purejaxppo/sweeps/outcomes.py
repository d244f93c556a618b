"""What came of trials, and which was best."""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from purejaxppo.host.configfile import Settings, toml
from purejaxppo.host.loggers import COLUMNS, HostMetrics
from purejaxppo.sweeps.settings import Definition
from purejaxppo.sweeps.space import apply
from purejaxppo.sweeps.strategies import Trial


class Outcome(NamedTuple):
    """What came of a trial, of S seeds."""

    trial: Trial
    returns: np.ndarray
    """`[S]` means over the episodes of the final evaluation; NaN where a training failed."""
    failed: dict[int, int]
    """Seeds whose loss turned non-finite, and the update at which it did."""
    updates: int
    """Of how many it was trained."""
    wave: int

    @property
    def score(self) -> float:
        """What trials are ranked by: the mean over seeds, NaN if one failed."""
        return float(np.mean(self.returns))

    def num_updates(self, settings: Settings) -> int:
        """Of the trial's whole training."""
        return apply(self.trial.values, settings.config, settings.hparams)[0].num_updates

    def is_whole(self, settings: Settings) -> bool:
        """Whether it was trained to the end, and no seed of it failed."""
        return np.isfinite(self.score) and self.updates == self.num_updates(settings)


def ranked(outcomes: Mapping[int, Outcome], definition: Definition) -> list[Outcome]:
    """Without those that failed: the ones trained farthest first, and of those the best."""
    settings = definition.settings
    good = [outcome for outcome in outcomes.values() if np.isfinite(outcome.score)]
    return sorted(good, key=lambda o: (o.updates / o.num_updates(settings), o.score), reverse=True)


def result_rows(outcomes: Mapping[int, Outcome], definition: Definition) -> list[dict[str, Any]]:
    """`results.csv`: a row per trial and seed."""
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
    """The metrics `[U, S]` of a wave that began after `first` updates, as columns with a row per
    training and update; without the trials that only fill it up."""
    kept = len(numbers) * seeds
    length = len(metrics["env_steps"])
    trial = np.repeat(np.asarray(numbers, np.int32), seeds * length)
    seed = np.tile(np.repeat(np.arange(seeds, dtype=np.int32), length), len(numbers))
    update = np.tile(np.arange(first + 1, first + length + 1, dtype=np.int32), kept)
    columns = {name: metrics[name][:, :kept].T.reshape(-1) for name in COLUMNS}
    return {"trial": trial, "seed": seed, "update": update} | columns


def _cell(value: Any) -> Any:
    return "none" if value is None else toml(value) if isinstance(value, tuple) else value
