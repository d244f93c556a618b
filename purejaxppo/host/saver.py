"""Checkpoints while training goes on, in threads of their own."""

import warnings
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor, wait
from pathlib import Path
from threading import Lock

import jax
import numpy as np

from purejaxppo.host import checkpoint
from purejaxppo.host.checkpoint import Checkpoint, Position
from purejaxppo.host.configfile import Settings
from purejaxppo.host.processes import is_first
from purejaxppo.host.rundir import RunWarning, StorageError, resume_command
from purejaxppo.host.signals import StopRequest
from purejaxppo.types import TrainState

_POLL_SECONDS = 0.05


class Saver:
    """Saves, evaluates and removes checkpoints, one after the other.

    Args:
        evaluate: `states[S, ...] -> returns[S, E]`; None leaves checkpoints unevaluated.
        saved: the checkpoint that training starts from, if it does.
        stop: once it is set, evaluations are no longer waited for, nor begun, nor recorded.
    """

    def __init__(
        self,
        run_dir: Path,
        settings: Settings,
        evaluate: Callable[[TrainState], np.ndarray] | None,
        saved: Checkpoint | None,
        stop: StopRequest,
    ):
        self._run_dir, self._settings, self._evaluate = run_dir, settings, evaluate
        self._saved, self._stop = saved, stop
        self._saves = ThreadPoolExecutor(1, thread_name_prefix="save")
        self._evaluations = ThreadPoolExecutor(1, thread_name_prefix="evaluate")
        self._writing = Lock()
        self._saving: Future[None] | None = None
        self._evaluating: Future[None] | None = None

    @property
    def busy(self) -> bool:
        return any(f is not None and not f.done() for f in (self._saving, self._evaluating))

    def start(self, position: Position, states: TrainState, whole: TrainState) -> None:
        """Save `states` and evaluate `whole`, the same on this process's device, in the background,
        once what is under way is done, unless asked to stop before. With several processes, which
        save in step, only the evaluation is in the background."""
        self.wait()
        if jax.process_count() > 1:
            self._saving = Future()
            try:
                self._save(position, states, whole)
                self._saving.set_result(None)
            except StorageError as error:
                self._saving.set_exception(error)
        elif not self._stop:
            self._saving = self._saves.submit(self._save, position, states, whole)

    def evaluate(self, saved: Checkpoint, states: TrainState) -> None:
        """In the background, and record it."""
        if not self._stop and self._evaluate is not None and is_first():
            self._evaluating = self._evaluations.submit(
                self._evaluate_saved, self._evaluate, saved, states
            )

    def report(self) -> None:
        """Warn of what has failed in the background: training can go on."""
        for future in (self._saving, self._evaluating):
            if future is None or not future.done() or future.exception() is None:
                continue
            error = future.exception()
            remedy = ": free space" if isinstance(error, StorageError) else ""
            warnings.warn(
                f"{error}; training goes on, and earlier checkpoints are intact{remedy}",
                RunWarning,
                stacklevel=2,
            )
        if self._saving is not None and self._saving.done():
            self._saving = None
        if self._evaluating is not None and self._evaluating.done():
            self._evaluating = None

    def wait(self) -> None:
        """Until nothing is under way; for a save alone if asked to stop."""
        while self._saving is not None:
            wait([self._saving])
            self.report()
        while self._evaluating is not None and not self._stop:
            wait([self._evaluating], _POLL_SECONDS)
            self.report()

    def finish(self, position: Position, states: TrainState) -> Checkpoint:
        """Save now, without an evaluation, unless it was saved already.

        Raises:
            StorageError: if it cannot be written.
        """
        self.wait()
        try:
            with self._writing:
                if self._saved is None or self._saved.position.updates != position.updates:
                    self._saved = checkpoint.save(self._run_dir, position, self._settings, states)
                self._prune(self._saved)
        except StorageError as error:
            raise self._with_remedy(error) from error
        return self._saved

    def record(self, saved: Checkpoint, returns: np.ndarray) -> None:
        """Note the returns `[S, E]` of an evaluation, and keep the best; nothing if asked to stop.

        Raises:
            StorageError: if it cannot be written.
        """
        good = [s for s in range(len(returns)) if s not in saved.position.failed]
        mean = float(np.mean(returns[good])) if good else np.nan
        with self._writing:
            if self._stop:
                return
            try:
                checkpoint.record_evaluation(saved, mean if np.isfinite(mean) else None)
            except OSError as error:
                raise self._with_remedy(
                    f"checkpoint {str(saved.path)!r}: cannot be changed: {error.strerror}"
                ) from error
            self._prune(saved)

    def close(self) -> None:
        """Nothing more is begun; an evaluation under way is left to itself."""
        self._saves.shutdown()
        self._evaluations.shutdown(wait=False, cancel_futures=True)

    def _save(self, position: Position, states: TrainState, whole: TrainState) -> None:
        self._saved = checkpoint.save(self._run_dir, position, self._settings, states)
        self.evaluate(self._saved, whole)

    def _evaluate_saved(
        self,
        evaluate: Callable[[TrainState], np.ndarray],
        saved: Checkpoint,
        states: TrainState,
    ) -> None:
        self.record(saved, evaluate(states))

    def _prune(self, newest: Checkpoint) -> None:
        if not is_first():
            return
        try:
            checkpoint.prune(self._run_dir, newest.position.updates, self._settings.run.keep)
        except OSError as error:
            raise StorageError(
                f"checkpoints in {str(self._run_dir)!r}: cannot be removed: {error.strerror}"
            ) from error

    def _with_remedy(self, error: object) -> StorageError:
        return StorageError(f"{error}; free space, then: {resume_command(self._run_dir)}")
