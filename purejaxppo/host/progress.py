"""What a person sees while a run goes on: a live bar on a terminal, plain lines elsewhere."""

import io
import sys
import time
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console
from rich.progress import BarColumn, TextColumn, TimeRemainingColumn
from rich.progress import Progress as Bar

from purejaxppo.host.checkpoint import Checkpoint
from purejaxppo.host.configfile import Settings

_PLAIN_SECONDS = 5.0


class _Output:
    """Standard output; nothing once that cannot be written (a closed pipe, a full disk), since a
    run does not end for it."""

    def __init__(self) -> None:
        self._file: Any = sys.stdout

    def write(self, text: str) -> int:
        with self._forgiving():
            self._file.write(text)
        return len(text)

    def flush(self) -> None:
        with self._forgiving():
            self._file.flush()

    def __getattr__(self, name: str) -> Any:
        return getattr(self._file, name)

    @contextmanager
    def _forgiving(self) -> Iterator[None]:
        try:
            yield
        except OSError:
            self._file = io.StringIO()


def make_console(enabled: bool) -> Console:
    """Standard output in plain words; silent unless `enabled`."""
    output: Any = _Output()
    return Console(
        file=output,
        quiet=not enabled,
        highlight=False,
        markup=False,
        emoji=False,
        soft_wrap=True,
    )


class Progress:
    """Reports of one run, that begins after `done` updates and ends after `last`, or all; silent
    unless `enabled`."""

    def __init__(self, settings: Settings, done: int, enabled: bool, last: int | None = None):
        self._settings, self._config, self._done = settings, settings.config, done
        self._last = settings.config.num_updates if last is None else last
        self._num_trainings = settings.num_trainings
        self._console = make_console(enabled)
        self._live = enabled and self._console.is_terminal
        self._bar: Bar | None = None
        self._returns = np.full(self._num_trainings, np.nan)
        self._began = self._last_line = time.perf_counter()

    def starting(self, checkpoint: Checkpoint | None, again: bool) -> None:
        """Say what is to be done, and from where."""
        config = self._config
        steps = config.num_updates * config.batch_size
        rounded = f" (total_timesteps = {config.total_timesteps:,} rounded up)"
        self._console.print(
            f"{config.env_id}: {self._num_trainings} seed{'s' if self._num_trainings > 1 else ''}, "
            f"{config.num_updates:,} updates of {config.num_envs} x {config.num_steps} steps = "
            f"{steps:,} environment steps each{rounded if steps > config.total_timesteps else ''}"
        )
        if checkpoint is None:
            if again:
                self._console.print("there is no checkpoint yet: from the start")
            return
        self._console.print(f"going on after update {self._done:,}: {checkpoint.path}")
        old, new = vars(checkpoint.settings.hparams), vars(self._settings.hparams)
        for name in (name for name in old if old[name] != new[name]):
            self._console.print(f"from here on {name} = {new[name]} (was {old[name]})")

    def working(self, what: str) -> AbstractContextManager[Any]:
        """A sign of life, on a terminal, while something of unknown length goes on."""
        return self._console.status(what) if self._live else nullcontext()

    def training(self, compile_seconds: float) -> None:
        """The bar appears."""
        self._console.print(f"compiled in {compile_seconds:.1f} s")
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

    def update(self, done: int, episode_returns: np.ndarray) -> None:
        """`episode_returns[u, S]` of the updates since the last call."""
        for row in episode_returns:
            self._returns = np.where(np.isfinite(row), row, self._returns)
        now = time.perf_counter()
        speed_in_updates = (done - self._done) / (now - self._began)
        rate = speed_in_updates * self._config.batch_size * self._num_trainings
        speed, returns = f"{_short(rate)} steps/s", f"return {self._mean_return()}"
        if self._bar is not None:
            self._bar.update(self._bar.task_ids[0], completed=done, speed=speed, returns=returns)
        elif now - self._last_line > _PLAIN_SECONDS or done == self._last:
            left = (self._last - done) / speed_in_updates
            self._console.print(
                f"update {done:,}/{self._last:,}  {speed}  {returns}  {left:.0f} s left"
            )
            self._last_line = now

    def failed(self, seed: int, update: int) -> None:
        """The loss of `seed` is not finite at `update`."""
        hparams = self._settings.hparams
        self._console.print(
            f"seed {seed}: the loss is not finite at update {update}. The state before it is kept. "
            f"Try a lower learning_rate (now {hparams.learning_rate:g}) or "
            f"max_grad_norm (now {hparams.max_grad_norm:g}), or normalize_reward, and check that "
            "the environment's rewards and observations are finite"
        )

    def stopped(self, resume_command: str | None) -> None:
        """It was asked to stop, and has saved."""
        how = f"; go on by: {resume_command}" if resume_command else ""
        self._console.print(f"stopped{how}")

    def close(self) -> None:
        """The bar stays as it is; also after an error."""
        if self._bar is not None:
            self._bar.stop()
            self._bar = None

    def finished(self, summary: dict[str, Any], directory: Path | None) -> None:
        mean, interval = summary["eval_return_mean"], summary["eval_return_interval_95"]
        between = f" (95% interval {interval[0]:.2f} to {interval[1]:.2f})" if interval else ""
        self._console.print(
            f"trained {summary['env_steps']:,} environment steps per seed in "
            f"{summary['run_seconds']:.1f} s, {_short(summary['steps_per_second'])} steps/s"
        )
        if mean is not None:
            self._console.print(
                f"evaluation return {mean:.2f}{between}, mean over seeds of "
                f"{summary['eval_episodes']} episodes each"
            )
        if directory is not None:
            self._console.print(f"learning curve: {directory / 'learning_curve.png'}")

    def _mean_return(self) -> str:
        seen = self._returns[np.isfinite(self._returns)]
        return f"{seen.mean():.1f}" if seen.size else "-"


def _short(rate: float) -> str:
    return f"{rate / 1e6:.2f}M" if rate >= 1e6 else f"{rate / 1e3:.1f}k"
