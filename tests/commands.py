"""Helpers: command lines in separate processes, and checks of the files they write."""

import csv
import json
import random
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest

import purejaxppo as ppo
from purejaxppo.normalize import normalize_obs
from purejaxppo.sweeps import files

PATIENCE = 120.0


class Process:
    """`purejaxppo ARGUMENTS`, with its output in files."""

    def __init__(self, folder: Path, *arguments: Any, prefix: tuple[str, ...] = ()):
        self.out, self.err = folder / "stdout", folder / "stderr"
        with self.out.open("w") as out, self.err.open("w") as err:
            self.popen = subprocess.Popen(
                [*prefix, sys.executable, "-u", "-m", "purejaxppo", *map(str, arguments)],
                stdout=out, stderr=err, cwd=folder
            )  # fmt: skip

    def until(self, condition: Callable[[], Any]) -> Any:
        """Wait until the condition holds; fail if the process ends first."""
        give_up = time.monotonic() + PATIENCE
        while not (value := condition()):
            assert self.popen.poll() is None, self.text()
            assert time.monotonic() < give_up, self.text()
            time.sleep(0.005)
        return value

    def end(self) -> int:
        return self.popen.wait(PATIENCE)

    def text(self) -> str:
        """The output, which must not contain a traceback."""
        text = self.out.read_text() + self.err.read_text()
        assert "Traceback" not in text, text
        return text


some_or_all = pytest.mark.parametrize(
    "count", [3, pytest.param(None, marks=pytest.mark.faults)], ids=["some", "all"]
)
"""`make test` tries a few cases, `make test-faults` all of them."""


def some(found: list[Any], count: int | None) -> list[Any]:
    """`count` random cases with a fixed seed, or all if `count` is None."""
    return found if count is None else random.Random(0).sample(found, min(count, len(found)))


def accept_results(sweep: Path) -> None:
    """Mark results that a test changed as the ones the sweep wrote."""
    names = (files.RESULTS, files.CURVES, files.WINNER_JSON)
    existing = {name: sweep / name for name in names if (sweep / name).exists()}
    files.write_finished(sweep, {name: path.read_bytes() for name, path in existing.items()})


@contextmanager
def fusing() -> Iterator[Callable[..., Any]]:
    """Compile with XLA's default loop fusion, to compare different programs bit for bit.

    Applies to `run` and to calls through the function `(function, *arguments)` that it yields.
    Compiling takes several times as long.
    """
    compiled, options = jax.stages.Lowered.compile, {"xla_cpu_use_fusion_emitters": True}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(jax.stages.Lowered, "compile", lambda lowered: compiled(lowered, options))
        yield lambda function, *given: jax.jit(function).lower(*given).compile()(*given)


def parts_of(config: ppo.Config, env: Any = None) -> ppo.Parts:
    """The parts of one update, on one device."""
    parts = ppo.make_task(config, env=env).parts
    assert parts is not None
    return parts(None)


def collected(parts: ppo.Parts, state: ppo.TrainState, hparams: Any = None) -> Any:
    """Collect a rollout: the next actors, the rollout with observations as the network reads them,
    and the environment's raw observations."""
    actors, raw = parts.actor.collect(*state, hparams, ())
    return actors, raw._replace(obs=normalize_obs(state.learner.obs_stats, raw.obs)), raw.obs


def rows(directory: Path) -> int:
    path = directory / "metrics.csv"
    return path.read_bytes().count(b"\n") - 1 if path.exists() else 0


def logged(directory: Path) -> list[str]:
    """The lines of `metrics.csv` without their last column, the seconds."""
    lines = (directory / "metrics.csv").read_text().splitlines()
    assert lines[0].endswith(",seconds")
    return [line.rpartition(",")[0] for line in lines]


def evaluated(directory: Path) -> list[list[str]]:
    """The rows of `eval.csv` without the seconds."""
    with (directory / "eval.csv").open() as file:
        return [row[:3] + row[4:] for row in csv.reader(file)]


def assert_same_end(one: Path, other: Path) -> None:
    """Compare parameters, the rest of the state, metrics and evaluation bit for bit."""
    assert logged(one) == logged(other)
    states = [ppo.load(directory, seed=None).state for directory in (one, other)]
    for x, y in zip(*map(jax.tree.leaves, states), strict=True):
        assert x.dtype == y.dtype
        assert bool(np.all(np.asarray(x == y)))
    summaries = [json.loads((d / "summary.json").read_text()) for d in (one, other)]
    for name in ("eval_return_per_seed", "failed_seeds", "env_steps", "extended"):
        assert summaries[0][name] == summaries[1][name]
