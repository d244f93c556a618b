"""Select the best trial of a sweep, and evaluate it again on fresh episodes."""

import dataclasses
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from purejaxppo.evaluation import FRESH_EVALUATION
from purejaxppo.host.configfile import Settings, dump_settings
from purejaxppo.host.program import Evaluation
from purejaxppo.host.stats import FEW_SEEDS, episode_mean, mean_interval
from purejaxppo.sweeps import files
from purejaxppo.sweeps.outcomes import Outcome, ranked
from purejaxppo.sweeps.settings import Definition
from purejaxppo.task import Task
from purejaxppo.types import TrainState

FRESH_EPISODES = 1024
"""Minimum number of episodes of the winner's second evaluation, over all seeds."""
SHOWN_TIES = 5


@dataclass(frozen=True)
class Winner:
    """The best trial of a sweep, of S seeds."""

    outcome: Outcome
    tied: list[int]
    """Other trials with the same selection return; the winner is the one with the lowest number."""
    settings: Settings
    """Settings of a run that trains it again."""
    returns: np.ndarray
    """`[S, E]` returns on fresh episodes."""

    def table(self) -> dict[str, Any]:
        """The content of `winner.json`."""
        per_seed = episode_mean(self.returns)
        over_seeds = len(per_seed) > 1
        mean, low, high = mean_interval(per_seed if over_seeds else self.returns[0])
        return {
            "trial": self.outcome.trial.number,
            "tied_with": self.tied,
            "values": self.outcome.trial.values,
            "return": float(mean),
            "return_interval_95": [float(low), float(high)],
            "interval_over": "seeds" if over_seeds else "episodes",
            "return_per_seed": per_seed.tolist(),
            "episodes_per_seed": self.returns.shape[1],
            "selection_return": self.outcome.score,
            "selection_episodes_per_seed": self.settings.run.eval_episodes,
        }


def best_trials(outcomes: Mapping[int, Outcome], definition: Definition) -> list[Outcome]:
    """The best trial trained to the end, and those tied with it; empty if every trial failed."""
    settings, order = definition.settings, ranked(outcomes, definition)
    whole = [outcome for outcome in order if outcome.is_whole(settings)]
    return [outcome for outcome in whole if outcome.score == whole[0].score]


def evaluate_on_fresh_episodes(settings: Settings, states: TrainState, task: Task) -> np.ndarray:
    """Evaluate states `[S, ...]` on fresh episodes; returns `[S, E]`.

    The return that selected the best trial is optimistic, since it is the largest of many noisy
    means.
    """
    run = settings.run
    episodes = max(run.eval_episodes, -(-FRESH_EPISODES // run.num_seeds))
    longer = dataclasses.replace(settings, run=dataclasses.replace(run, eval_episodes=episodes))
    return Evaluation(longer, task)(states, purpose=FRESH_EVALUATION)


def write_winner(directory: Path, winner: Winner | None) -> dict[str, bytes]:
    """Write `winner.json`, and `winner.toml`, which trains the winner again.

    If there is no winner, remove both.

    Returns:
        the content of `winner.json` by file name; empty if there is no winner.

    Raises:
        StorageError: if they cannot be written or removed.
    """
    if winner is None:
        for name in (files.WINNER_JSON, files.WINNER):
            files.remove(directory / name)
        return {}
    table = winner.table()
    content = (json.dumps(table, indent=2) + "\n").encode()
    files.write(directory / files.WINNER_JSON, content)
    note = f"# Winner: {describe_winner(table)}.\n"
    files.write(directory / files.WINNER, note + dump_settings(winner.settings))
    return {files.WINNER_JSON: content}


def describe_winner(table: Mapping[str, Any]) -> str:
    """Summarise `winner.json` in one sentence."""
    low, high = table["return_interval_95"]
    seeds = len(table["return_per_seed"])
    episodes = seeds * table["episodes_per_seed"]
    over = "episodes" if table["interval_over"] == "episodes" else count_seeds(seeds)
    return (
        f"trial {table['trial']}{describe_ties(table['tied_with'])}: return {table['return']:.2f} "
        f"on {episodes:,} fresh episodes, 95% interval {low:.2f} to {high:.2f} over {over}; "
        f"selection return {table['selection_return']:.2f}"
    )


def describe_ties(tied: Sequence[int]) -> str:
    """List the trials with the same selection return."""
    if not tied:
        return ""
    more = f" and {len(tied) - SHOWN_TIES} more" if len(tied) > SHOWN_TIES else ""
    named = ", ".join(map(str, tied[:SHOWN_TIES]))
    return f" (tied with trial{'s' if len(tied) > 1 else ''} {named}{more})"


def count_seeds(seeds: int) -> str:
    """Number of seeds, with "only" if they are too few for a reliable interval."""
    only = "only " if 1 < seeds < FEW_SEEDS else ""
    return f"{only}{seeds} seed{'' if seeds == 1 else 's'}"
