"""A cache of compiled programs for all tests of a worker with the same settings."""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax

from purejaxppo.host import conduct, run
from purejaxppo.host.configfile import Settings, dump_settings
from purejaxppo.host.session import Session
from purejaxppo.sweeps import plan, winner
from purejaxppo.task import Task

_programs: dict[Any, Any] = {}
_COMPILE, _COMPILE_PROGRAM = jax.stages.Lowered.compile, conduct.compile_program


def keep_programs(replace: Callable[[Any, str, Any], None]) -> None:
    """Have `run`, `resume` and `sweep` compile each program once.

    Args:
        replace: `setattr`, or that of a test's `monkeypatch`.
    """
    compile_run, prepare, kind = run.compile_run, plan.prepare, winner.Evaluation

    def compiled(session: Session) -> Any:
        begins = session.start.states is None
        name = f"run {begins and 'begins'}"
        return _cached(name, session.settings, session.task, lambda: compile_run(session))

    def prepared(settings: Settings, task: Task, population: Any = None) -> Any:
        name = f"wave {population}"
        return _cached(name, settings, task, lambda: prepare(settings, task, population))

    def evaluation(settings: Settings, task: Task) -> Any:
        return _cached("winner", settings, task, lambda: kind(settings, task))

    replace(run, "compile_run", compiled)
    replace(plan, "prepare", prepared)
    replace(winner, "Evaluation", evaluation)


def _cached(name: str, settings: Settings, task: Task, make: Callable[[], Any]) -> Any:
    patched = (
        jax.stages.Lowered.compile is not _COMPILE
        or conduct.compile_program is not _COMPILE_PROGRAM
    )
    given = _parts(task)
    if patched or given is None:
        return make()
    # The program does not depend on these settings.
    host = dataclasses.replace(
        settings.run, checkpoint_every=1.0, checkpoint_unit="seconds", eval_every=float("inf"),
        eval_unit="updates", keep=1, tensorboard=False,
    )  # fmt: skip
    hparams = settings.trials[0] if settings.trials else settings.hparams
    relevant = dataclasses.replace(settings, run=host, hparams=_none_pattern(hparams), trials=())
    key = (name, dump_settings(relevant), len(settings.trials), given)
    if key not in _programs:
        _programs[key] = make()
    return _programs[key]


def _none_pattern(hparams: Any) -> Any:
    """Default hyperparameters, changed only to be None exactly where `hparams` are None."""
    default = type(hparams)()
    changes = {
        f.name: None if getattr(hparams, f.name) is None else 2.0
        for f in dataclasses.fields(hparams)
        if (getattr(hparams, f.name) is None) != (getattr(default, f.name) is None)
    }
    return dataclasses.replace(default, **changes)


def _parts(task: Task) -> Any:
    """A key for the parts that were passed; None if they cannot be compared."""
    if task.passed == ("task",):
        return (task.with_config,)
    found = []
    given = getattr(task.with_config, "args", ({},))[0]  # no parts for the config of another kind
    for name, part in given.items():
        if name == "hparams":
            continue
        if name not in ("env", "env_params"):
            return None
        found.append((name, type(part), repr(getattr(part, "__dict__", part))))
    return tuple(found)
