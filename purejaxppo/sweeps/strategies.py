"""Search strategies: choose the trials of a sweep, and learn from their returns."""

import itertools
import math
from typing import Any, NamedTuple, Protocol

import numpy as np

from purejaxppo.config import ConfigError
from purejaxppo.sweeps.settings import SweepSettings
from purejaxppo.sweeps.space import Range, Space, Values, short


class Trial(NamedTuple):
    """One set of values, trained with every seed."""

    number: int
    values: Values


def describe(trial: Trial) -> str:
    """The values of a trial, rounded for display."""
    return ", ".join(f"{name} = {short(value)}" for name, value in trial.values.items())


class Batch(NamedTuple):
    """Trials that may run in parallel."""

    trials: list[Trial]
    share: float = 1.0
    """Fraction of its updates up to which each trial is trained; trials of an earlier batch
    continue from there."""


class Strategy(Protocol):
    """Proposes batches of trials and is told their returns, until there are no more."""

    def ask(self) -> Batch | None:
        """The next batch, which may depend on earlier returns; None at the end."""
        ...

    def tell(self, batch: Batch, returns: np.ndarray) -> None:
        """Record the mean return of each trial, NaN if a seed failed.

        After a resume, the batches of earlier processes are told first, in order, before the first
        call of `ask`.
        """
        ...


def make_strategy(sweep: SweepSettings, seed: int) -> Strategy:
    """The strategy of a sweep.

    Its batches depend only on the settings, the seed and the returns it was told, so that a resumed
    sweep proposes the same trials as an uninterrupted one.
    """
    if sweep.strategy == "optuna":
        return Optuna(sweep.space, sweep.trials, sweep.batch, seed)
    trials = all_trials(sweep.space, sweep.strategy, sweep.trials, seed)
    return Halving(trials, sweep.eta, sweep.rungs) if sweep.strategy == "halving" else Fixed(trials)


def all_trials(space: Space, method: str, count: int, seed: int) -> list[Trial]:
    """Every point of the grid, each with the same `count` samples.

    The samples are independent, or, with the method `sobol`, spread evenly by a scrambled Sobol
    sequence (Sobol 1967, Owen 1998).
    """
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
    """Successive halving (Jamieson and Talwalkar 2016, arXiv:1502.07943).

    All trials are trained for a fraction of their updates. The best 1 / `eta` of them continue for
    `eta` times as many, and so on to the end, with at most `rungs` selections.
    """

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
    """Optuna's tree-structured Parzen estimator (Bergstra et al. 2011), `batch` trials at a time.

    Its draws depend only on the seed and the returns it was told.

    Raises:
        ConfigError: if Optuna is not installed.
    """

    def __init__(self, space: Space, count: int, batch: int, seed: int):
        try:
            import optuna
        except ImportError as error:
            raise ConfigError(
                "strategy = optuna: Optuna is not installed; pip install 'purejaxppo[optuna]'"
            ) from error
        optuna.logging.set_verbosity(optuna.logging.WARNING)
        self._optuna, self._space = optuna, space
        self._count, self._batch, self._seed = count, batch, seed
        self._told: list[Any] = []

    def ask(self) -> Batch | None:
        done = len(self._told)
        (number,) = np.random.SeedSequence([self._seed, done]).generate_state(1)
        startup = max(10, self._batch)
        sampler = self._optuna.samplers.TPESampler(seed=int(number), n_startup_trials=startup)
        study = self._optuna.create_study(direction="maximize", sampler=sampler)
        study.add_trials(self._told)
        distributions = self._distributions()
        numbers = range(done, min(done + self._batch, self._count))
        trials = [Trial(n, self._values(study.ask(distributions).params)) for n in numbers]
        return Batch(trials) if trials else None

    def tell(self, batch: Batch, returns: np.ndarray) -> None:
        states, distributions = self._optuna.trial.TrialState, self._distributions()
        for trial, value in zip(batch.trials, returns, strict=True):
            good = bool(np.isfinite(value))
            told = self._optuna.trial.create_trial(
                state=states.COMPLETE if good else states.FAIL,
                value=float(value) if good else None,
                params=self._params(trial.values),
                distributions=distributions,
            )
            self._told.append(told)

    def _distributions(self) -> dict[str, Any]:
        kinds, found = self._optuna.distributions, {}
        for name, choices in self._lists():
            found[name] = kinds.CategoricalDistribution(list(range(len(choices))))
        for name, wanted in self._space.sample:
            if isinstance(wanted, Range):
                log = wanted.kind == "loguniform"
                found[name] = kinds.FloatDistribution(wanted.low, wanted.high, log=log)
        return found

    def _lists(self) -> list[tuple[str, tuple[Any, ...]]]:
        """Settings with a list of values; Optuna chooses an index into it."""
        drawn = [(n, x.values) for n, x in self._space.sample if not isinstance(x, Range)]
        return [*self._space.grid, *drawn]

    def _values(self, params: dict[str, Any]) -> Values:
        lists = dict(self._lists())
        return {name: lists[name][x] if name in lists else x for name, x in params.items()}

    def _params(self, values: Values) -> dict[str, Any]:
        lists = dict(self._lists())
        return {name: lists[name].index(x) if name in lists else x for name, x in values.items()}


def _shares(method: str, count: int, dimensions: int, seed: int) -> np.ndarray:
    """Samples `[count, dimensions]` in [0, 1)."""
    if method == "sobol" and dimensions:
        from scipy.stats import qmc  # slow to import

        power = (count - 1).bit_length()
        return qmc.Sobol(dimensions, rng=seed).random_base2(power)[:count]
    return np.random.default_rng(seed).random((count, dimensions))
