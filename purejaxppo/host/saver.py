"""Saves and evaluates checkpoints in background threads while training continues."""

import warnings
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor, wait
from pathlib import Path
from threading import Lock
from typing import Any

import jax
import numpy as np

from purejaxppo.checks import RunWarning
from purejaxppo.host import checkpoint, checkpoints
from purejaxppo.host.checkpoint import Checkpoint, Position
from purejaxppo.host.configfile import Settings
from purejaxppo.host.evaluations import DETERMINISTIC, SAMPLED, EvalLog
from purejaxppo.host.processes import is_first
from purejaxppo.host.rundir import GoneError, Held, StorageError, resume_command
from purejaxppo.host.samples import SampleLog
from purejaxppo.host.signals import StopRequest
from purejaxppo.host.stats import episode_mean
from purejaxppo.types import TrainState

_POLL_SECONDS = 0.05


class Saver:
    """Saves, evaluates and removes checkpoints, one at a time.

    Args:
        evaluate: `states[S, ...] -> returns[S, E]`; None leaves checkpoints unevaluated.
        saved: the checkpoint from which training continues, if any.
        stop: once set, evaluations are no longer awaited, started or recorded.
        sample: `state of one seed -> rows` for `samples.jsonl`, if the task has samples.
        held: the locked directory; once it is removed or renamed, nothing more is written.
    """

    def __init__(
        self,
        run_dir: Path,
        settings: Settings,
        evaluate: Callable[[TrainState], np.ndarray] | None,
        saved: Checkpoint | None,
        stop: StopRequest,
        *,
        held: Held | None,
        sample: Callable[[TrainState], list[dict[str, Any]]] | None = None,
    ):
        self._held, self._sample = held, sample if is_first() else None
        self._run_dir, self._settings, self._evaluate = run_dir, settings, evaluate
        self._saved, self._stop = saved, stop
        self._log, after = None, 0 if saved is None else saved.position.updates
        self._samples = None if self._sample is None else SampleLog(run_dir, after)
        if evaluate is not None and is_first():
            batch_size = settings.config.batch_size
            self._log = EvalLog(
                run_dir, batch_size, after, saved is not None and saved.eval_return is not None
            )
        self._saves = ThreadPoolExecutor(1, thread_name_prefix="save")
        self._evaluations = ThreadPoolExecutor(1, thread_name_prefix="evaluate")
        self._writing = Lock()
        self._saving: Future[None] | None = None
        self._evaluating: Future[None] | None = None

    @property
    def busy(self) -> bool:
        return any(f is not None and not f.done() for f in (self._saving, self._evaluating))

    def start(
        self, position: Position, states: TrainState, gathered: TrainState, evaluate: bool = True
    ) -> None:
        """Save `states` and evaluate `gathered` (all of them on one device), in the background.

        Waits for an earlier save and evaluation first. Does nothing once a stop is requested. With
        several processes, which save together, only the evaluation runs in the background.
        """
        self.wait()
        if jax.process_count() > 1:
            self._saving = Future()
            try:
                self._save(position, states, gathered, evaluate)
                self._saving.set_result(None)
            except StorageError as error:
                self._saving.set_exception(error)
        elif not self._stop:
            self._saving = self._saves.submit(self._save, position, states, gathered, evaluate)

    def evaluate(self, saved: Checkpoint, states: TrainState) -> None:
        """Evaluate a checkpoint in the background, and record the result."""
        if not self._stop and self._evaluate is not None and is_first():
            self._evaluating = self._evaluations.submit(
                self._evaluate_saved, self._evaluate, saved, states
            )

    def report(self) -> None:
        """Warn of saves and evaluations that failed in the background; training continues.

        Raises:
            GoneError: if the directory was removed or renamed.
        """
        for future in (self._saving, self._evaluating):
            if future is None or not future.done() or future.exception() is None:
                continue
            error = future.exception()
            if isinstance(error, GoneError):
                raise error
            remedy = ": free space" if isinstance(error, StorageError) else ""
            warnings.warn(
                f"{error}; training continues, and earlier checkpoints are intact{remedy}",
                RunWarning,
                stacklevel=2,
            )
        if self._saving is not None and self._saving.done():
            self._saving = None
        if self._evaluating is not None and self._evaluating.done():
            self._evaluating = None

    def wait(self) -> None:
        """Wait until nothing is in progress; after a stop request, only for a save."""
        while self._saving is not None:
            wait([self._saving])
            self.report()
        while self._evaluating is not None and not self._stop:
            wait([self._evaluating], _POLL_SECONDS)
            self.report()

    def finish(self, position: Position, states: TrainState) -> Checkpoint:
        """Save now, without an evaluation, unless already saved.

        Raises:
            StorageError: if it cannot be written.
        """
        self.wait()
        try:
            with self._writing:
                if self._saved is None or self._saved.position.updates != position.updates:
                    self._saved = self._write(position, states)
                self._check()
                self._prune(self._saved)
        except GoneError:
            raise
        except StorageError as error:
            raise self._with_remedy(error) from error
        return self._saved

    def record(
        self, saved: Checkpoint, returns: np.ndarray, deterministic: np.ndarray | None = None
    ) -> None:
        """Log the returns `[S, E]` of an evaluation, and keep the best checkpoint.

        Does nothing once a stop is requested.

        Args:
            deterministic: returns `[S, E]` with deterministic actions, if they were evaluated too.

        Raises:
            StorageError: if it cannot be written.
        """
        good = [s for s in range(len(returns)) if s not in saved.position.failed]
        mean = float(episode_mean(episode_mean(returns[good])))
        with self._writing:
            if self._stop:
                return
            self._check()
            try:
                if self._log is not None:
                    both = {SAMPLED: returns, DETERMINISTIC: deterministic}
                    evaluated = {name: x for name, x in both.items() if x is not None}
                    self._log.add(saved.position, evaluated)
                checkpoint.record_evaluation(saved, mean if np.isfinite(mean) else None)
            except OSError as error:
                raise self._with_remedy(
                    f"the evaluation of checkpoint {str(saved.path)!r} cannot be written: "
                    f"{error.strerror}"
                ) from error
            self._prune(saved)

    def sample(self, update: int, states: TrainState) -> None:
        """Log samples of the first seed after `update` updates, if the task has any. Does nothing
        once a stop is requested.

        Raises:
            StorageError: if they cannot be written.
        """
        if self._sample is None or self._samples is None or self._stop:
            return
        try:
            rows = self._sample(jax.tree.map(lambda x: x[0], states))
        except Exception as error:  # a user's tokenizer; samples must not end a run
            warnings.warn(f"no samples are logged: {error}", RunWarning, stacklevel=2)
            self._sample = None
            return
        with self._writing:
            self._check()
            self._samples.add(update, rows)

    def close(self) -> None:
        """Start nothing more; does not wait for an evaluation in progress."""
        self._saves.shutdown()
        self._evaluations.shutdown(wait=False, cancel_futures=True)

    def _save(
        self, position: Position, states: TrainState, gathered: TrainState, evaluate: bool
    ) -> None:
        self._saved = self._write(position, states)
        if evaluate and self._evaluate is not None:
            self.evaluate(self._saved, gathered)  # prunes, once it is known whether it is the best
            return
        with self._writing:
            self._prune(self._saved)

    def _write(self, position: Position, states: TrainState) -> Checkpoint:
        self._check()
        try:
            return checkpoint.save(self._run_dir, position, self._settings, states)
        finally:
            try:
                self._check()
            except GoneError:  # orbax makes the folders that it misses
                checkpoint.remove_remains(self._run_dir, position.updates)
                raise

    def _evaluate_saved(
        self,
        evaluate: Callable[[TrainState], np.ndarray],
        saved: Checkpoint,
        states: TrainState,
    ) -> None:
        self.record(saved, evaluate(states))
        self.sample(saved.position.updates, states)

    def _check(self) -> None:
        if self._held is not None:
            self._held.check()

    def _prune(self, newest: Checkpoint) -> None:
        if not is_first():
            return
        try:
            checkpoints.prune(self._run_dir, newest.position.updates, self._settings.run.keep)
        except OSError as error:
            raise StorageError(
                f"checkpoints in {str(self._run_dir)!r}: cannot be removed: {error.strerror}"
            ) from error

    def _with_remedy(self, error: object) -> StorageError:
        return StorageError(f"{error}; free space, then: {resume_command(self._run_dir)}")
