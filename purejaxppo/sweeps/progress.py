"""Progress output of a sweep."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from purejaxppo.host.checkpoint import Checkpoint
from purejaxppo.host.configfile import train_command
from purejaxppo.host.progress import Progress, make_console
from purejaxppo.sweeps.files import WINNER, PlannedWave
from purejaxppo.sweeps.plan import Group, Wave
from purejaxppo.sweeps.settings import Definition
from purejaxppo.sweeps.strategies import Trial, describe
from purejaxppo.sweeps.winner import describe_winner

SHOWN_TRIALS = 5


class SweepProgress:
    """Prints the progress of a sweep; silent unless `enabled`."""

    def __init__(self, definition: Definition, enabled: bool):
        self.enabled, self._settings, self._sweep = enabled, definition.settings, definition.sweep
        self._console = make_console(enabled)

    def batch(self, trials: int, share: float, groups: Sequence[tuple[Group, int, int]]) -> None:
        """Print the plan of a batch.

        Args:
            share: fraction of its updates up to which each trial is trained.
            groups: each group with its number of waves and bytes per device.
        """
        config, seeds = self._settings.config, self._settings.run.num_seeds
        steps = "" if share == 1 else f", up to {share:.3g} of their updates"
        self._console.print(
            f"{config.label}: {_count(trials, 'trial')} x {_count(seeds, 'seed')} = "
            f"{_count(trials * seeds, 'run')}{steps}"
        )
        for number, (group, waves, size) in enumerate(groups, 1):
            config = group.settings.config
            first = group.members[0][0].values
            static = ", ".join(f"{k} = {v}" for k, v in first.items() if hasattr(config, k))
            self._console.print(
                f"  group {number}{f' ({static})' if static else ''}: "
                f"{_count(len(group.members), 'trial')} of {config.num_updates:,} updates in "
                f"{_count(waves, 'wave')}, {size / 1e9:.3g} GB per device"
            )

    def compiling(self) -> Any:
        return self._console.status("compiling")

    def wave(self, index: int, planned: PlannedWave, wave: Wave) -> "WaveProgress":
        return WaveProgress(wave, planned, f"wave {index}", self.enabled, self._sweep.strategy)

    def training(self) -> Any:
        """Show a spinner while other machines train."""
        return self._console.status("training")

    def waves_left(self, status: Any, left: int) -> None:
        status.update(f"training; {_count(left, 'wave')} left")

    def trained(
        self, index: int, planned: PlannedWave, wave: Wave, summary: dict[str, Any], machine: str
    ) -> None:
        """Report a wave that another process trained, from the summary of its run."""
        trials = _count(len(wave.trials), "trial")
        self._console.print(f"wave {index}: {trials}, on {machine}")
        progress = self.wave(index, planned, wave)
        for row, entry in summary["failed_seeds"].items():
            progress.failed(int(row), entry["update"])
        progress.finished(summary, None)

    def wave_restarted(self, index: int, why: str) -> None:
        self._console.print(f"wave {index}: its machine was lost ({why}); resuming on another")

    def stopped(self, how: str) -> None:
        self._console.print(f"stopped; to resume: {how}")

    def evaluating(self) -> Any:
        return self._console.status("evaluating the best trial")

    def best(self, rows: Sequence[tuple[Trial, float, float]]) -> None:
        """Print the best trials, with the mean and lowest return of their seeds."""
        run = self._settings.run
        words = self._settings.config.words
        title = (
            f"best trials by selection {words.result} ({run.eval_episodes} {words.episodes} per "
            "seed):"
        )
        self._console.print(title if rows else "every trial failed")
        for trial, mean, least in rows[:SHOWN_TRIALS]:
            worst = f", worst seed {least:.2f}" if run.num_seeds > 1 else ""
            self._console.print(f"  trial {trial.number}: {mean:.2f}{worst}; {describe(trial)}")

    def finished(self, directory: Path | None, winner: dict[str, Any] | None) -> None:
        if winner is not None:
            self._console.print(f"winner: {describe_winner(winner)}")
        if directory is not None:
            self._console.print(f"report: {directory / 'report.html'}")
        if directory is not None and winner is not None:
            command = train_command(self._settings.config)
            self._console.print(f"to train the winner again: {command} {directory / WINNER}")


class WaveProgress(Progress):
    """Prints the progress of one wave."""

    def __init__(self, wave: Wave, planned: PlannedWave, title: str, enabled: bool, strategy: str):
        super().__init__(wave.settings, planned.first, enabled, planned.last)
        self._population = strategy == "pbt"
        self._trials, self._title = wave.trials, title
        self._seeds = wave.settings.run.num_seeds

    def starting(self, checkpoint: Checkpoint | None, resumed: bool, where: str) -> None:
        done = f", resuming from update {checkpoint.position.updates:,}" if checkpoint else ""
        if checkpoint is not None:
            self._done = checkpoint.position.updates
        self._console.print(f"{self._title}: {_count(len(self._trials), 'trial')} on {where}{done}")

    def training(self, compile_seconds: float) -> None:
        self._show_bar()

    _usual = "the loss is not finite"

    def failed(self, seed: int, update: int, reason: str | None = None) -> None:
        index = seed // self._seeds
        if index < len(self._trials):
            trial = self._trials[index]
            # A member of a population may still be replaced, and its values have changed.
            result = "" if self._population else f"; recorded as failed ({describe(trial)})"
            self._console.print(
                f"trial {trial.number}, seed {seed % self._seeds}: {reason or self._usual} at "
                f"update {update}{result}"
            )

    def finished(self, summary: dict[str, Any], directory: Path | None) -> None:
        rate = summary["steps_per_second"]
        self._console.print(
            f"trained in {summary['run_seconds']:.1f} s, {rate:,.0f} {self._words.rate}/s"
        )

    def _means(self) -> str:
        name, result = next(iter(self._shown)), self._words.result
        rows = self._shown[name].reshape(-1, self._seeds)[: len(self._trials)]
        seen = rows[np.isfinite(rows).all(axis=1)].mean(axis=1)
        digits = 1 if result == "return" else 2
        if not seen.size:
            return f"{result} -"
        return f"{result} median {np.median(seen):.{digits}f}, best {seen.max():.{digits}f}"


def _count(number: int, what: str) -> str:
    return f"{number:,} {what}{'' if number == 1 else 's'}"
