"""The training loop: chunks of updates, and logging, checkpoints and evaluations between them."""

import math
import time
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import jax
import numpy as np

from purejaxppo.checks import HostCallError, RunWarning
from purejaxppo.host.checkpoint import Checkpoint, Position
from purejaxppo.host.hostcalls import InterruptedChunkError
from purejaxppo.host.loggers import SECONDS, AppendedLogger, HostMetrics, RowLogger
from purejaxppo.host.parallel import needs_all_threads
from purejaxppo.host.processes import agree
from purejaxppo.host.program import CHUNK_CAPACITY, Prepared, stacked_hparams
from purejaxppo.host.saver import Saver
from purejaxppo.host.session import Session, cannot_log
from purejaxppo.host.signals import StopRequest
from purejaxppo.host.summary import Training
from purejaxppo.types import MUST_BE_FINITE, TrainState

CHUNK_SECONDS = 0.5
_NOTHING, _SAVE, _SAVE_AND_EVALUATE = range(3)

Callback = Callable[[int, HostMetrics, TrainState], bool | None]
"""`(updates done, metrics[u, S] of the last u updates, states[S, ...]) -> whether to stop`."""


@dataclass
class Loop:
    """Trains a session's states."""

    session: Session
    prepared: Prepared
    loggers: Sequence[RowLogger]
    saver: Saver | None
    stop: StopRequest
    callback: Callback | None = None

    def __post_init__(self) -> None:
        start = self.session.start
        self.done, self.failed = start.position.updates, dict(start.position.failed)
        self._middle = self.session.settings.config.num_updates // 2
        """A task's samples are logged after this many updates too."""
        self.parts = [] if start.metrics is None else [start.metrics]
        self.error: HostCallError | None = None
        """Why Python code between updates failed, if it did. Training stops before that update."""

    def train(self) -> Training:
        """Train until the end, until every seed has failed, or until a stop is requested. Trains at
        least one chunk if any updates are left."""
        start, num_updates = self.session.start, self.session.last
        hparams = stacked_hparams(self.session.settings)
        states = start.states if start.states is not None else self.prepared.program.begin(hparams)
        if not self.done and self.session.task.samples is not None:
            self._sample(states)
        self.last_save = self.last_evaluation = time.perf_counter()
        self.began = self.last_save - start.position.run_seconds
        found = start.checkpoint
        if found is not None and found.eval_return is None and self.done < num_updates:
            self._evaluate_if_missing(found, states)
        count, alone = 1, needs_all_threads(self.prepared.program.spread)
        while self.done < num_updates and self._alive().any():
            if alone and self.parts and self._stopped_while_evaluating():
                break
            count = min(count, num_updates - self.done, CHUNK_CAPACITY, self._until_due())
            first = self.done == start.position.updates
            began = time.perf_counter()
            states, metrics = self._chunk(states, hparams, count)
            seconds = time.perf_counter() - began
            if metrics:
                self._record(metrics, states)
            fitting = max(1, int(count * CHUNK_SECONDS / seconds))
            count = min(fitting, 2) if first else fitting  # the first call has one-off overhead
            # Clocks and signals differ between processes, but all must take the same action.
            count, due = map(int, agree(count, self._action_due())[0])
            if agreed(self.stop) or self.error is not None:
                break
            if due:
                self._save(states, evaluate=due == _SAVE_AND_EVALUATE)
            if self.done == self._middle and self.session.task.samples is not None:
                self._sample(states)
            if self._callback_stops(states):
                break
        names = [*self.prepared.program.columns, SECONDS]
        names = [name for name in names if all(name in part for part in self.parts)]
        joined = {
            n: np.concatenate([part[n] for part in self.parts]).T for n in names if self.parts
        }
        gathered = self.prepared.program.gather(states)
        self.states = states if jax.process_count() > 1 else gathered
        """The states to save: with several processes, only this process's part."""
        return Training(gathered, joined, self._position())

    def _chunk(
        self, states: TrainState, hparams: Any, count: int
    ) -> tuple[TrainState, HostMetrics]:
        """Do `count` updates; fewer if Python code between them fails, which sets `error`."""
        try:
            states, rows = self.prepared.program.chunk(states, hparams, count)
        except InterruptedChunkError as stopped:
            states, rows, count = stopped.states, stopped.metrics, stopped.count
            self.error = stopped.reason
        return states, {name: np.asarray(values)[:count] for name, values in rows.items()}

    def _sample(self, states: TrainState) -> None:
        if self.saver is not None:
            self.saver.sample(self.done, self.prepared.program.gather(states))

    def _stopped_while_evaluating(self) -> bool:
        """Wait for a checkpoint's evaluation; return True if a stop was requested meanwhile."""
        if self.saver is not None:
            self.saver.wait()
        return agreed(self.stop)

    def _callback_stops(self, states: TrainState) -> bool:
        """Whether the callback stops training here."""
        if self.callback is None:
            return False
        gathered = self.prepared.program.gather(states)
        return bool(agree(int(bool(self.callback(self.done, self.parts[-1], gathered)))).any())

    def _alive(self) -> np.ndarray:
        alive = np.ones(self.session.settings.num_runs, bool)
        alive[list(self.failed)] = False
        return alive

    def _record(self, metrics: HostMetrics, states: TrainState) -> None:
        """Check, log and display the metrics `[u, S]` of the latest chunk."""
        if self.prepared.population:
            written = self._record_population(metrics)
        else:
            written, bad = _finite_rows(metrics, self._alive())
            for seed, row in bad.items():
                self.failed[seed] = self.done + row + 1
                reason = self._reason(seed, states)
                self.session.progress.failed(seed, self.failed[seed], reason)
        seconds = time.perf_counter() - self.began
        metrics[SECONDS] = np.full(written.shape, round(seconds, 3))
        self.parts.append({k: np.where(written, v, np.nan) for k, v in metrics.items()})
        try:
            for logger in self.loggers:
                logger.write(self.done + 1, metrics, written)
        except OSError as error:
            raise cannot_log(self.session.directory, error) from error
        if (warning := self.session.task.warning(metrics)) is not None:
            warnings.warn(warning, RunWarning, stacklevel=2)
        self.done += len(written)
        task = self.session.task
        names = [name for name in (task.curve, *task.progress) if name in self.parts[-1]]
        self.session.progress.update(self.done, {name: self.parts[-1][name] for name in names})

    def _reason(self, seed: int, states: TrainState) -> str | None:
        """Why a seed failed, if its task can tell from its last good state."""
        task = self.session.task
        if task.explain is None or jax.process_count() > 1:
            return None
        gathered = self.prepared.program.gather(states)
        hparams = stacked_hparams(self.session.settings)
        return task.explain(*jax.tree.map(lambda x: x[seed], (gathered, hparams)))

    def _record_population(self, metrics: HostMetrics) -> np.ndarray:
        """Return which updates `[u, S]` were kept. A member of a population counts as failed only
        until an exchange replaces it."""
        kept = _kept_rows(metrics)
        before = np.vstack([self._alive(), kept])[:-1]
        for row, seed in zip(*np.nonzero(before & ~kept), strict=True):
            self.failed[int(seed)] = self.done + int(row) + 1
            self.session.progress.failed(int(seed), self.failed[int(seed)])
        self.failed = {seed: update for seed, update in self.failed.items() if not kept[-1, seed]}
        return kept

    def _until_due(self) -> int:
        """Updates until the next checkpoint or evaluation whose interval is in updates."""
        run = self.session.settings.run
        left = [CHUNK_CAPACITY]
        if self.session.task.samples is not None and self.done < self._middle:
            left.append(self._middle - self.done)
        for every, unit in (
            (run.checkpoint_every, run.checkpoint_unit), (run.eval_every, run.eval_unit)
        ):  # fmt: skip
            if unit == "updates" and math.isfinite(every):
                left.append(int(every - self.done % every))
        return min(left)

    def _evaluate_if_missing(self, found: Checkpoint, states: TrainState) -> None:
        """Evaluate the checkpoint that training resumes from, if the run was killed before that."""
        run = self.session.settings.run
        regular = math.isfinite(run.eval_every) and run.eval_unit == "updates"
        if self.saver is not None and (not regular or self.done % run.eval_every == 0):
            self.saver.evaluate(found, states)

    def _action_due(self) -> int:
        """Whether a checkpoint, or one with evaluation, is due. At the end both happen anyway."""
        saver = self.saver
        if saver is None:
            return _NOTHING
        saver.report()
        if self.done == self.session.last:
            return _NOTHING
        run, now = self.session.settings.run, time.perf_counter()

        def due(every: float, unit: str, last: float) -> bool:
            if unit == "updates":
                return self.done % every == 0
            return not saver.busy and now - last >= every

        if due(run.eval_every, run.eval_unit, self.last_evaluation):
            return _SAVE_AND_EVALUATE
        if not due(run.checkpoint_every, run.checkpoint_unit, self.last_save):
            return _NOTHING
        return _SAVE if math.isfinite(run.eval_every) else _SAVE_AND_EVALUATE

    def _save(self, states: TrainState, evaluate: bool) -> None:
        gathered = self.prepared.program.gather(states)
        if self.saver is not None:
            several = jax.process_count() > 1
            self.saver.start(self._position(), states if several else gathered, gathered, evaluate)
        self.last_save = time.perf_counter()
        if evaluate:
            self.last_evaluation = self.last_save

    def _position(self) -> Position:
        start = self.session.start.position
        seconds = time.perf_counter() - self.began
        rows = next((x for x in self.loggers if isinstance(x, AppendedLogger)), None)
        try:
            size, digest = rows.sync() if rows else (0, "")
        except OSError as error:
            raise cannot_log(self.session.directory, error) from error
        columns = self.prepared.program.columns
        return Position(
            self.done, size, digest, columns, seconds, dict(self.failed), start.extended,
            self.session.data,
        )  # fmt: skip


def agreed(stop: StopRequest) -> bool:
    """Whether any process was asked to stop; if so, all processes stop. A signal that arrives
    during this exchange counts at the next one."""
    asked = int(agree(stop.signum or 0).max())
    stop.signum = stop.signum or asked or None
    return bool(asked)


def _finite_rows(metrics: HostMetrics, alive: np.ndarray) -> tuple[np.ndarray, dict[int, int]]:
    """Return which updates `[u, S]` to log: those of seeds that have not failed, up to and
    including the first failed update. Also returns the first failed row of each seed that fails
    in this chunk."""
    finite = _kept_rows(metrics)
    good_before = np.cumsum(~finite, axis=0) - ~finite == 0
    bad = {int(s): int(np.argmin(finite[:, s])) for s in np.flatnonzero(alive & ~finite.all(0))}
    return good_before & alive, bad


def _kept_rows(metrics: HostMetrics) -> np.ndarray:
    """Return which updates `[u, S]` the learner kept: those whose metrics are finite."""
    kept = np.ones(next(iter(metrics.values())).shape, bool)
    for name in MUST_BE_FINITE:
        kept &= np.isfinite(metrics[name]) if name in metrics else True
    return kept
