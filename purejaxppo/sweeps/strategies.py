"""Which trials a sweep tries, and what it learns from their returns."""

import itertools
import math
from pathlib import Path
from typing import NamedTuple, Protocol

import numpy as np

from purejaxppo.config import ConfigError
from purejaxppo.sweeps.settings import SweepSettings
from purejaxppo.sweeps.space import Range, Space, Values, short


class Trial(NamedTuple):
    """One set of values, to be trained with every seed."""

    number: int
    values: Values


def describe(trial: Trial) -> str:
    """Its values, rounded to be read."""
    return ", ".join(f"{name} = {short(value)}" for name, value in trial.values.items())


class Batch(NamedTuple):
    """Trials that do not wait for each other."""

    trials: list[Trial]
    share: float = 1.0
    """Of its updates, up to where each trial is trained; those of an earlier batch go on from
    where they are."""


class Strategy(Protocol):
    """Asked for batches of trials, and told their returns, until it has no more."""

    def ask(self) -> Batch | None:
        """The next batch, which may depend on what was told of those before; None at the end."""
        ...

    def tell(self, batch: Batch, returns: np.ndarray) -> None:
        """The mean return of each trial, NaN where a training failed. Batches that an earlier
        process has asked for are told too, in their order, before the first is asked for."""
        ...


def make_strategy(sweep: SweepSettings, seed: int, directory: Path | None) -> Strategy:
    """The strategy that a sweep names; what it keeps, it keeps in `directory`."""
    if sweep.strategy == "optuna":
        file = None if directory is None else directory / "optuna.db"
        return Optuna(sweep.space, sweep.trials, sweep.batch, seed, file)
    trials = all_trials(sweep.space, sweep.strategy, sweep.trials, seed)
    return Halving(trials, sweep.eta, sweep.rungs) if sweep.strategy == "halving" else Fixed(trials)


def all_trials(space: Space, method: str, count: int, seed: int) -> list[Trial]:
    """Every point of the grid, each with the same `count` samples, which are independent, or for
    the method `sobol` spread evenly by a scrambled Sobol sequence (Sobol 1967, Owen 1998)."""
    names = [name for name, _ in space.grid]
    points = list(itertools.product(*(values for _, values in space.grid)))
    shares = _shares(method, count if space.sample else 1, len(space.sample), seed)
    drawn = [
        {name: wanted.at(u) for (name, wanted), u in zip(space.sample, row, strict=True)}
        for row in shares
    ]
    both = itertools.product(drawn, points)
    return [
        Trial(number, dict(zip(names, point, strict=True)) | sample)
        for number, (sample, point) in enumerate(both)
    ]


class Fixed:
    """All trials in one batch."""

    def __init__(self, trials: list[Trial]):
        self._left: Batch | None = Batch(trials)

    def ask(self) -> Batch | None:
        batch, self._left = self._left, None
        return batch

    def tell(self, batch: Batch, returns: np.ndarray) -> None:
        self._left = None


class Halving:
    """Successive halving (Jamieson and Talwalkar 2016, arXiv:1502.07943): all trials are trained a
    part of the way; the best 1 / `eta` of them go on, `eta` times as far; and so on to the end,
    `rungs` times at most."""

    def __init__(self, trials: list[Trial], eta: int, rungs: int):
        rungs = min(rungs, int(math.log(len(trials), eta) + 1e-9))
        self._eta, self._rung, self._rungs, self._alive = eta, 0, rungs, trials

    def ask(self) -> Batch | None:
        if self._rung > self._rungs:
            return None
        return Batch(self._alive, share=float(self._eta) ** (self._rung - self._rungs))

    def tell(self, batch: Batch, returns: np.ndarray) -> None:
        order = np.argsort(-np.where(np.isfinite(returns), returns, -np.inf), kind="stable")
        kept = sorted(order[: max(1, len(order) // self._eta)])
        self._alive = [batch.trials[i] for i in kept if np.isfinite(returns[i])]
        self._rung = self._rung + 1 if self._alive else self._rungs + 1


class Optuna:
    """Optuna's tree-structured Parzen estimator (Bergstra et al. 2011), asked for `batch` trials
    at a time; the study is kept in an SQLite file.

    Raises:
        ConfigError: if Optuna is not installed.
    """

    def __init__(self, space: Space, count: int, batch: int, seed: int, file: Path | None):
        try:
            import optuna
        except ImportError as error:
            raise ConfigError(
                "strategy = optuna: Optuna is not installed; pip install 'purejaxppo[optuna]'"
            ) from error
        optuna.logging.set_verbosity(optuna.logging.WARNING)
        self._space, self._count, self._batch, self._told = space, count, batch, 0
        self._failed = optuna.trial.TrialState.FAIL
        self._study = optuna.create_study(
            study_name="sweep",
            storage=None if file is None else f"sqlite:///{file.absolute()}",
            direction="maximize",
            load_if_exists=True,
            sampler=optuna.samplers.TPESampler(seed=seed, n_startup_trials=max(10, batch)),
        )

    def ask(self) -> Batch | None:
        for left in self._study.get_trials(deepcopy=False):
            if not left.state.is_finished():  # of a process that ended before it had noted them
                self._study.tell(left.number, state=self._failed)
        wanted = min(self._batch, self._count - self._told)
        trials = [self._one(self._told + i) for i in range(wanted)]
        return Batch(trials) if trials else None

    def tell(self, batch: Batch, returns: np.ndarray) -> None:
        known = self._study.get_trials(deepcopy=False)
        ours = {trial.user_attrs.get("trial"): trial for trial in known}
        for trial, value in zip(batch.trials, returns, strict=True):
            theirs = ours[trial.number]
            if theirs.state.is_finished():
                continue
            good = np.isfinite(value)
            self._study.tell(
                theirs.number, float(value) if good else None, state=None if good else self._failed
            )
        self._told += len(batch.trials)

    def _one(self, number: int) -> Trial:
        asked = self._study.ask()
        asked.set_user_attr("trial", number)
        values: Values = {}
        for name, choices in self._space.grid:
            values[name] = choices[asked.suggest_categorical(name, list(range(len(choices))))]
        for name, wanted in self._space.sample:
            if isinstance(wanted, Range):
                log = wanted.kind == "loguniform"
                values[name] = asked.suggest_float(name, wanted.low, wanted.high, log=log)
            else:
                indices = list(range(len(wanted.values)))
                values[name] = wanted.values[asked.suggest_categorical(name, indices)]
        return Trial(number, values)


def _shares(method: str, count: int, dimensions: int, seed: int) -> np.ndarray:
    """`[count, dimensions]` in [0, 1)."""
    if method == "sobol" and dimensions:
        from scipy.stats import qmc  # slow to import

        power = (count - 1).bit_length()
        return qmc.Sobol(dimensions, rng=seed).random_base2(power)[:count]
    return np.random.default_rng(seed).random((count, dimensions))
