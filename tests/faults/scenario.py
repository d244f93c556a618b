"""A short run and a short sweep, into which faults are injected, and their results.

python scenario.py run|sweep DIRECTORY             once, watched by interpose.c
python scenario.py run|sweep DIRECTORY CALL ...    once for each CALL:KIND:ERRNO, which fails,
                                                   and resumed; prints what differs
python scenario.py run|sweep DIRECTORY --from LEFT CALL ...   the same for the resume of a copy of
                                                              LEFT
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
"""A task that compiles in no time: what is tested here is the host."""
HPARAMS = ppo.HParams(learning_rate=0.3)
KINDS = {"once": 1, "lasting": 2}


def speed_up(replace: Callable[[Any, str, Any], None]) -> None:
    """Make a trial take a fraction of a second: keep compiled programs, which do not depend on the
    disk, and draw one small picture for the report.

    Args:
        replace: `setattr`, or a test's.
    """
    keep_programs(replace)
    small = {"picture": ("Picture", lambda _: Figure(figsize=(0.2, 0.2)), "")}
    replace(report, "_pictures", lambda _: small)


def begin(what: str, directory: Path) -> None:
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


def go_on(what: str, directory: Path) -> None:
    """Resume; start again if nothing had started."""
    if not (directory / ("config.toml" if what == "run" else "sweep.toml")).exists():
        shutil.rmtree(directory, ignore_errors=True)
        begin(what, directory)
    elif what == "run":
        ppo.resume(directory, TASK, progress=False)
    else:
        resume_sweep(directory, TASK, progress=False)


def outcome(what: str, directory: Path) -> dict[str, Any]:
    """Everything that a user reads, without dates and durations."""
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


def resumed(what: str, directory: Path, wanted: dict[str, Any], failed: bool = False) -> list[str]:
    """What differs from `wanted` after a resume, or what the resume raised.

    Args:
        failed: whether a call has failed before, which may cost an evaluation.
    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            go_on(what, directory)
        found = outcome(what, directory)
    except Exception as error:
        return [f"resumed: {error!r}"]
    different = [name for name in wanted if found[name] != wanted[name]]
    return [] if failed and _lacks_an_evaluation(different, found, wanted) else different


def _lacks_an_evaluation(
    different: list[str], found: dict[str, Any], wanted: dict[str, Any]
) -> bool:
    """A checkpoint that could not be saved is not evaluated, so it cannot be the best either."""
    if not different or not set(different) <= {"evaluations", "best_checkpoint"}:
        return False
    rows, all_rows = found["evaluations"], wanted["evaluations"]
    return len(rows) < len(all_rows) and all(row in all_rows for row in rows)


def main() -> None:
    what, directory, calls = sys.argv[1], Path(sys.argv[2]), sys.argv[3:]
    left = None
    if calls[:1] == ["--from"]:
        left, calls = Path(calls[1]), calls[2:]
    if not calls:
        go_on(what, directory)
        return
    speed_up(setattr)
    begin(what, directory)
    wanted, library = outcome(what, directory), ctypes.CDLL(None)
    shutil.rmtree(directory)
    for call in calls:
        number, kind, error = call.split(":")
        if left is not None:
            shutil.copytree(left, directory)
        library.fault_arm(KINDS[kind], int(error), ctypes.c_long(int(number)))
        different = []
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                go_on(what, directory)
        except (StorageError, ppo.ConfigError):
            pass  # one message
        except Exception as error:
            different.append(f"began: {error!r}")
        library.fault_arm(0, 0, ctypes.c_long(0))
        different += resumed(what, directory, wanted, failed=True)
        print(json.dumps([call, different]), flush=True)
        shutil.rmtree(directory, ignore_errors=True)


if __name__ == "__main__":
    os.environ.setdefault("MPLBACKEND", "agg")
    main()
