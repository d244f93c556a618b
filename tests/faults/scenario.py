"""A short run and a short sweep for fault injection, and a comparison of their results.

python scenario.py run|sweep DIRECTORY             once, watched by interpose.c
python scenario.py run|sweep DIRECTORY CALL ...    once for each CALL:KIND:ERRNO, with that call
                                                   failing, then resumed; prints what differs
python scenario.py run|sweep DIRECTORY --from SNAPSHOT CALL ...   the same, resuming a copy of
                                                                  SNAPSHOT instead of starting
"""

import ctypes
import json
import os
import shutil
import sys
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import numpy as np
from matplotlib.figure import Figure

sys.path.insert(0, str(Path(__file__).parents[1]))

from commands import evaluated, logged
from kept import keep_programs
from regression import LineConfig, line_task

import purejaxppo as ppo
from purejaxppo.host.rundir import StorageError
from purejaxppo.sweeps import report
from purejaxppo.sweeps.engine import resume_sweep

TASK = line_task(LineConfig(total_timesteps=4 * 8))
"""A task that compiles quickly, since these tests are about the host."""
HPARAMS = ppo.HParams(learning_rate=0.3)
KINDS = {"once": 1, "lasting": 2}


def speed_up(replace: Callable[[Any, str, Any], None]) -> None:
    """Make a trial take a fraction of a second: keep compiled programs, which do not depend on the
    disk, and draw one small plot for the report.

    Args:
        replace: `setattr`, or `monkeypatch.setattr`.
    """
    keep_programs(replace)
    small = {"picture": ("Picture", lambda _: Figure(figsize=(0.2, 0.2)), "")}
    replace(report, "_pictures", lambda _: small)


def start(what: str, directory: Path) -> None:
    if what == "run":
        ppo.run(
            TASK, HPARAMS, run_dir=directory, eval_episodes=2, checkpoint_every=2, keep=1,
            checkpoint_unit="updates", progress=False,
        )  # fmt: skip
    else:
        ppo.sweep(
            TASK, {"rows": [8, 4]}, hparams=HPARAMS, run_dir=directory, eval_episodes=2,
            progress=False, checkpoint_every=1e-9,
        )  # fmt: skip


def resume(what: str, directory: Path) -> None:
    """Resume, or start again if nothing was written yet."""
    if not (directory / ("config.toml" if what == "run" else "sweep.toml")).exists():
        shutil.rmtree(directory, ignore_errors=True)
        start(what, directory)
    elif what == "run":
        ppo.resume(directory, TASK, progress=False)
    else:
        resume_sweep(directory, TASK, progress=False)


def outcome(what: str, directory: Path) -> dict[str, Any]:
    """Read all results that a user sees, without dates and durations."""
    if what == "run":
        state = ppo.load(directory, TASK, seed=None).state
        summary = json.loads((directory / "summary.json").read_text())
        names = ("eval_return_per_seed", "failed_seeds", "env_steps", "best_checkpoint")
        leaves = [
            x
            for x in jax.tree.leaves(state)
            if not jax.dtypes.issubdtype(x.dtype, jax.dtypes.prng_key)
        ]
        return {
            "metrics": logged(directory),
            "evaluations": evaluated(directory),
            "state": [np.asarray(x).tolist() for x in leaves],
            "picture": (directory / "learning_curve.png").exists(),
        } | {name: summary[name] for name in names}
    names = ("results.csv", "winner.json", "winner.toml")
    found: dict[str, Any] = {name: (directory / name).read_text() for name in names}
    with np.load(directory / "curves.npz") as curves:
        return found | {name: curves[name].tobytes().hex() for name in curves}


def resume_and_compare(
    what: str, directory: Path, wanted: dict[str, Any], failed: bool = False
) -> list[str]:
    """Resume, and return the results that differ from `wanted`, or the exception.

    Args:
        failed: whether a call failed before, which may lose an evaluation.
    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            resume(what, directory)
        found = outcome(what, directory)
    except Exception as error:
        return [f"resumed: {error!r}"]
    different = [name for name in wanted if found[name] != wanted[name]]
    return [] if failed and _only_evaluations_missing(different, found, wanted) else different


def _only_evaluations_missing(
    different: list[str], found: dict[str, Any], wanted: dict[str, Any]
) -> bool:
    """A checkpoint that could not be saved is not evaluated, so it cannot be the best one."""
    if not different or not set(different) <= {"evaluations", "best_checkpoint"}:
        return False
    rows, all_rows = found["evaluations"], wanted["evaluations"]
    return len(rows) < len(all_rows) and all(row in all_rows for row in rows)


def main() -> None:
    what, directory, calls = sys.argv[1], Path(sys.argv[2]), sys.argv[3:]
    snapshot = None
    if calls[:1] == ["--from"]:
        snapshot, calls = Path(calls[1]), calls[2:]
    if not calls:
        resume(what, directory)
        return
    speed_up(setattr)
    start(what, directory)
    wanted, library = outcome(what, directory), ctypes.CDLL(None)
    shutil.rmtree(directory)
    for call in calls:
        number, kind, error = call.split(":")
        if snapshot is not None:
            shutil.copytree(snapshot, directory)
        library.fault_arm(KINDS[kind], int(error), ctypes.c_long(int(number)))
        different = []
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                resume(what, directory)
        except (StorageError, ppo.ConfigError):
            pass  # reported in one message
        except Exception as error:
            different.append(f"first process: {error!r}")
        library.fault_arm(0, 0, ctypes.c_long(0))
        different += resume_and_compare(what, directory, wanted, failed=True)
        print(json.dumps([call, different]), flush=True)
        shutil.rmtree(directory, ignore_errors=True)


if __name__ == "__main__":
    os.environ.setdefault("MPLBACKEND", "agg")
    main()
