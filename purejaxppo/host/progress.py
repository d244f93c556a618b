"""Progress reports of a run: a live bar on a terminal, plain lines elsewhere."""

import io
import sys
import time
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from rich.console import Console
from rich.progress import BarColumn, TextColumn, TimeRemainingColumn
from rich.progress import Progress as Bar

from purejaxppo.host.configfile import Settings
from purejaxppo.host.rundir import CURVE, REPORT
from purejaxppo.host.stats import describe_interval

if TYPE_CHECKING:  # imports JAX, and this must work before JAX is loaded
    from purejaxppo.host.checkpoint import Checkpoint

_PLAIN_SECONDS = 5.0


class _Output:
    """Standard output, discarded once it cannot be written (a closed pipe, a full disk), since that
    must not end a run."""

    def __init__(self) -> None:
        self._file: Any = sys.stdout

    def write(self, text: str) -> int:
        with self._ignoring_errors():
            self._file.write(text)
        return len(text)

    def flush(self) -> None:
        with self._ignoring_errors():
            self._file.flush()

    def __getattr__(self, name: str) -> Any:
        return getattr(self._file, name)

    @contextmanager
    def _ignoring_errors(self) -> Iterator[None]:
        try:
            yield
        except OSError:
            self._file = io.StringIO()


def make_console(enabled: bool) -> Console:
    """Make a console for plain text on standard output; silent unless `enabled`."""
    output: Any = _Output()
    return Console(
        file=output,
        quiet=not enabled,
        highlight=False,
        markup=False,
        emoji=False,
        soft_wrap=True,
    )


def describe_run(settings: Settings) -> str:
    """Describe a run in one line."""
    config, count = settings.config, settings.num_runs
    steps = config.num_updates * config.batch_size
    rounded = f" (total_timesteps = {config.total_timesteps:,} rounded up to whole updates)"
    seeds = f"{count} seed{'s' if count > 1 else ''}"
    return (
        f"{config.title}, {seeds}: {config.num_updates:,} updates of {config.batch_in_words} = "
        f"{steps:,} {config.words.samples}"
        f"{' per seed' if count > 1 else ''}{rounded if steps > config.total_timesteps else ''}"
    )


class Progress:
    """Reports progress of one run; silent unless `enabled`.

    Args:
        done: number of updates at the start.
        last: number of updates at the end; None takes all.
    """

    def __init__(self, settings: Settings, done: int, enabled: bool, last: int | None = None):
        self._settings, self._config, self._done = settings, settings.config, done
        self._words = settings.config.words
        self._last = settings.config.num_updates if last is None else last
        self._num_runs = settings.num_runs
        self._console = make_console(enabled)
        self._live = enabled and self._console.is_terminal
        self._bar: Bar | None = None
        self._shown: dict[str, np.ndarray] = {}
        self._began = self._last_line = time.perf_counter()

    def starting(self, checkpoint: "Checkpoint | None", resumed: bool, where: str) -> None:
        """Report what is trained, on which devices, and from which checkpoint."""
        self._console.print(f"{describe_run(self._settings)}; on {where}")
        if checkpoint is None:
            if resumed:
                self._console.print("no checkpoint yet: starting from the beginning")
            return
        self._console.print(f"resuming from update {self._done:,}: {checkpoint.path}")
        old, new = vars(checkpoint.settings.hparams), vars(self._settings.hparams)
        for name in (name for name in old if old[name] != new[name]):
            self._console.print(f"{name} = {new[name]} from here on (was {old[name]})")

    def working(self, what: str) -> AbstractContextManager[Any]:
        """Show work of unknown duration, described by `what`."""
        if self._live:
            return self._console.status(what)
        self._console.print(what)
        return nullcontext()

    def training(self, compile_seconds: float) -> None:
        """Report the compile time and show the bar."""
        self._console.print(f"compiled in {compile_seconds:.1f} s (training and evaluation)")
        self._show_bar()

    def _show_bar(self) -> None:
        self._began = self._last_line = time.perf_counter()
        if not self._live:
            return
        self._bar = Bar(
            BarColumn(bar_width=None),
            TextColumn("{task.completed:,.0f}/{task.total:,.0f} updates"),
            TextColumn("{task.fields[speed]}", style="cyan"),
            TextColumn("{task.fields[returns]}", style="green"),
            TimeRemainingColumn(),
            console=self._console,
            expand=True,
        )
        self._bar.add_task("train", total=self._last, completed=self._done, speed="", returns="")
        self._bar.start()

    def update(self, done: int, metrics: dict[str, np.ndarray]) -> None:
        """Show progress, given the metrics to show, `[u, S]` of the updates since the last call.
        The first is shown under the name that results have."""
        for name, values in metrics.items():
            latest = self._shown.setdefault(name, np.full(self._num_runs, np.nan))
            for row in values:
                latest = np.where(np.isfinite(row), row, latest)
            self._shown[name] = latest
        now = time.perf_counter()
        speed_in_updates = (done - self._done) / (now - self._began)
        rate = speed_in_updates * self._config.batch_size * self._num_runs
        speed, returns = self._speed(rate), self._means()
        if self._bar is not None:
            self._bar.update(self._bar.task_ids[0], completed=done, speed=speed, returns=returns)
        elif now - self._last_line > _PLAIN_SECONDS or done == self._last:
            left = (self._last - done) / speed_in_updates
            self._console.print(
                f"update {done:,}/{self._last:,}  {speed}  {returns}  {_duration(left)} left"
            )
            self._last_line = now

    def failed(self, seed: int, update: int, reason: str | None = None) -> None:
        """Report that the loss of `seed` is not finite at `update`, and why, if that is known."""
        hparams = self._settings.hparams
        if reason is not None:
            self._console.print(
                f"seed {seed}: stopped at update {update}: {reason}. The last good state is kept"
            )
            return
        self._console.print(
            f"seed {seed}: the loss is not finite at update {update}. The last good state is kept. "
            f"Try a lower learning_rate (now {hparams.learning_rate:g}) or "
            f"max_grad_norm (now {hparams.max_grad_norm:g}){self._more_advice()}"
        )

    def _more_advice(self) -> str:
        if not hasattr(self._config, "normalize_reward"):
            return ""
        return (
            ", or normalize_reward, and check that the environment's rewards and observations are "
            "finite"
        )

    def stopped(self, resume_command: str | None) -> None:
        """Report that the run has stopped and saved."""
        how = f"; to resume: {resume_command}" if resume_command else ""
        self._console.print(f"stopped{how}")

    def already_finished(self, summary: dict[str, Any], resume_command: str) -> None:
        """Report that there is nothing to resume."""
        self._console.print(
            f"already finished: {summary['env_steps']:,} of {summary['env_steps_planned']:,} "
            f"{self._words.samples} per seed; nothing to do"
        )
        if self._all_failed(summary):
            return
        self._print_returns(summary)
        self._console.print(f"to train longer: {resume_command} --total-timesteps N")

    def close(self) -> None:
        """Stop the bar and leave it on the terminal, also after an error."""
        if self._bar is not None:
            self._bar.stop()
            self._bar = None

    def finished(self, summary: dict[str, Any], directory: Path | None) -> None:
        self._console.print(
            f"trained {summary['env_steps']:,} {self._words.samples} per seed in "
            f"{summary['run_seconds']:.1f} s, {self._speed(summary['steps_per_second'])}"
        )
        if not self._all_failed(summary):
            self._print_returns(summary)
        if directory is not None:
            report = directory / REPORT
            self._console.print(f"learning curve: {directory / CURVE}")
            if report.exists():
                self._console.print(f"report: {report}")

    def _all_failed(self, summary: dict[str, Any]) -> bool:
        """Return whether every seed failed, and report it."""
        if len(summary["failed_seeds"]) < self._num_runs:
            return False
        self._console.print(f"every seed failed, so there is no {self._words.result} to report")
        return True

    def _print_returns(self, summary: dict[str, Any]) -> None:
        names = ("eval_return", "eval_return_deterministic")
        for name, what in zip(names, self._words.evaluations, strict=True):
            mean, interval = summary.get(f"{name}_mean"), summary.get(f"{name}_interval_95")
            if mean is None:
                continue
            seeds = self._num_runs - len(summary["failed_seeds"])
            described = describe_interval(interval, seeds)
            self._console.print(
                f"evaluation {what}: {mean:.2f}{described}, "
                f"{summary['eval_episodes']} {self._words.episodes} per seed"
            )
        if "exact" in summary:
            sampled = summary.get("exact_sampled")
            also = "" if sampled is None else f" deterministic, {sampled:.1%} sampled"
            self._console.print(f"exact: {summary['exact']:.1%}{also}")
        if "accuracy" in summary:
            best = summary.get("bayes_accuracy")
            also = "" if best is None else f" (Bayes rate {best:.1%})"
            self._console.print(f"accuracy: {summary['accuracy']:.1%}{also}")

    def _speed(self, rate: float) -> str:
        """Format samples per second over all seeds."""
        count = self._num_runs
        return f"{_short(rate)} {self._words.rate}/s{f' over {count} seeds' if count > 1 else ''}"

    def _means(self) -> str:
        """Means over seeds of the metrics to show."""
        names = [self._words.result, *list(self._shown)[1:]]
        found = []
        for name, latest in zip(names, self._shown.values(), strict=True):
            seen = latest[np.isfinite(latest)]
            digits = 1 if name == "return" else 2
            found.append(f"{_label(name)} {f'{seen.mean():.{digits}f}' if seen.size else '-'}")
        return "  ".join(found)


_LABELS = {"reference_kl": "KL", "response_length": "length"}


def _label(metric: str) -> str:
    return _LABELS.get(metric, metric)


def _short(rate: float) -> str:
    return f"{rate / 1e6:.2f}M" if rate >= 1e6 else f"{rate / 1e3:.1f}k"


def _duration(seconds: float) -> str:
    """Seconds, or hours, minutes and seconds from one minute on."""
    whole = round(seconds)
    return f"{whole} s" if whole < 60 else str(timedelta(seconds=whole))
