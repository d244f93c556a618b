"""The `purejaxppo` command: parse arguments, run a command, report errors in one line."""

import contextlib
import dataclasses
import io
import os
import sys
import traceback
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from importlib.metadata import version
from pathlib import Path
from typing import Annotated, Any

import tyro

from purejaxppo.checks import HostCallError, RunWarning, nearest
from purejaxppo.cli import commands, options
from purejaxppo.cli.arguments import find_config, kind_of_file, read_arguments
from purejaxppo.cli.options import (
    COMMANDS,
    GENERATED,
    SETTINGS_OF,
    TEXT_SWEEPS,
    RLHFSweep,
    Sweep,
)
from purejaxppo.config import AUTO, Chosen, ConfigError, TaskConfig
from purejaxppo.host.configfile import Settings, load_settings, train_command
from purejaxppo.host.rundir import LostError, StorageError
from purejaxppo.rlhf.config import TASKS
from purejaxppo.sweeps.settings import RUN_ONLY, Definition, SweepSettings, load_definition
from purejaxppo.sweeps.space import swept_setting

_CLOSED_PIPE = 141


def main(argv: list[str] | None = None) -> int:
    """Run a command and return the exit status.

    The status is 0 on success; 1 if a run failed or output could not be written; 2 for bad input;
    130 or 143 if stopped by SIGINT or SIGTERM; 141 if the reader closed the output pipe.
    """
    args = sys.argv[1:] if argv is None else argv
    try:
        if "--version" in args[:1]:
            commands.say(f"purejaxppo {version('purejaxppo')}")
            return 0
        command = _parse(args)
        with _plain_warnings():
            return commands.run_command(command)
    except ConfigError as error:
        print(f"purejaxppo: {error}", file=sys.stderr)
        return 2
    except (StorageError, LostError, HostCallError) as error:
        print(f"purejaxppo: {error}", file=sys.stderr)
        return 1
    except BrokenPipeError:
        return _CLOSED_PIPE
    except KeyboardInterrupt:
        return 130


@contextmanager
def _plain_warnings() -> Iterator[None]:
    """Show this package's warnings as one line each, without the source location."""

    def show(message: Any, category: Any, *place: Any, **more: Any) -> None:
        if category is RunWarning:
            print(f"purejaxppo: warning: {message}", file=sys.stderr)
        else:
            usual(message, category, *place, **more)

    with warnings.catch_warnings():
        usual, warnings.showwarning = warnings.showwarning, show
        # A save that failed leaves one behind.
        warnings.filterwarnings("ignore", "coroutine .* was never awaited", RuntimeWarning)
        yield


def _parse(args: Sequence[str]) -> Any:
    """Parse arguments into an instance of one of the classes in `COMMANDS`, or a
    `commands.TrainCommand` or `commands.SweepCommand`."""
    wants_help = bool({"-h", "--help"} & set(args))
    if wants_help:
        options.join_help_lines()
    name = args[0] if args else ""
    if " " in (two := " ".join(args[:2])) and two in COMMANDS:
        name, args = two, args[1:]
    if name not in COMMANDS:
        return _all_commands(args)
    kind = COMMANDS[name]
    if kind is Sweep:
        kind = _kind_of_sweep(args[1:])
    if wants_help:
        default = options.with_defaults(kind, {}) if kind in GENERATED else None
        return _tyro(kind, name, ["--help"], default)
    given = read_arguments(name, args[1:], options.flags_of(kind))
    if kind not in GENERATED:
        _check_positional(name, given.positional)
        return _tyro(kind, name, [*given.positional, *given.options], None)
    return _with_settings(name, kind, given)


def _kind_of_sweep(args: Sequence[str]) -> Any:
    """The sweep of the kind of config that the first argument names."""
    kind = "rlhf" if args and args[0] in TASKS else kind_of_file(args)
    return {None: Sweep, "rlhf": RLHFSweep, **TEXT_SWEEPS}[kind]


def _check_positional(name: str, given: Sequence[str]) -> None:
    special = {
        "export": ["RUN_DIR", "FILE"],
        "render": ["RUN_DIR", "FILE"],
        "envs": ["[PATTERN]"],
        "rlhf refresh": ["POLICY", "REWARD"],
    }
    accepted = special.get(name, ["RUN_DIR"])
    usage = " ".join(["purejaxppo", name, *accepted])
    missing = [x for x in accepted[len(given) :] if not x.startswith("[")]
    if missing:
        raise ConfigError(f"{name} needs {missing[0]}, as in `{usage}`")
    if len(given) > len(accepted):
        raise ConfigError(f"{given[len(accepted)]!r}: one argument too many for `{usage}`")


def _with_settings(name: str, kind: Any, given: Any) -> Any:
    """Parse a command in `GENERATED`, whose options override the config file."""
    if len(given.positional) > 1:
        raise ConfigError(
            f"{given.positional[1]!r}: {name} takes one config or environment, but "
            f"{given.positional[0]!r} is already given"
        )
    config_type, hparams_type = SETTINGS_OF[kind]
    settings = Settings(config_type(), hparams_type())
    search, source = SweepSettings(), None
    if given.positional:
        source = find_config(given.positional[0], type(settings.config))
    if isinstance(source, TaskConfig):
        settings = dataclasses.replace(settings, config=source)
    elif source is not None and name == "sweep":
        definition = load_definition(source)
        settings, search = definition.settings, definition.sweep
    elif source is not None:
        settings = load_settings(source)
    _check_kind(name, settings.config, config_type, given.positional)
    defaults: dict[str, Any] = {}
    for part in (settings.config, settings.hparams, settings.run, search):
        defaults |= {k: AUTO if isinstance(v, Chosen) else v for k, v in vars(part).items()}
    parsed = _tyro(kind, name, given.options, options.with_defaults(kind, defaults))
    values = options.values_of(parsed)
    if name == "sweep":
        values |= _merged(search, values)
    values |= {
        table: {**getattr(settings.config, table), **given.params}
        for table in ("task_params", "env_params")
        if hasattr(settings.config, table)
    }
    values["passed"] = settings.run.passed
    if name != "sweep":
        return commands.TrainCommand(commands.settings_from_values(values, settings), values)
    sweep = SweepSettings(**options.pick(values, SweepSettings))
    unused = {name: getattr(settings.run, name) for name in RUN_ONLY}
    of_file = unused | {"keep": 1}  # a sweep keeps one checkpoint of each wave
    definition = Definition(commands.settings_from_values(values | of_file, settings), sweep)
    return commands.SweepCommand(definition, values)


def _check_kind(name: str, config: Any, wanted: Any, given: Sequence[str]) -> None:
    """Raise `ConfigError` if the config file is not of the command's kind."""
    if isinstance(config, wanted):
        return
    if name == "sweep":
        raise ConfigError(
            f"{given[0]!r}: trains a language model; give it directly after sweep, before all "
            "options"
        )
    raise ConfigError(f"{given[0]!r}: is not for {name}; use `{train_command(config)} {given[0]}`")


def _merged(search: SweepSettings, values: dict[str, Any]) -> dict[str, Any]:
    """Merge the search spaces of file and command line; the command line overrides single settings.

    tyro has appended the entries of the command line to those of the file.
    """
    new = {kind: values[kind][len(getattr(search, kind)) :] for kind in ("grid", "sample")}
    overridden = {swept_setting(text) for texts in new.values() for text in texts}
    return {
        kind: (*(x for x in getattr(search, kind) if swept_setting(x) not in overridden), *texts)
        for kind, texts in new.items()
    }


def _tyro(kind: Any, name: str, args: list[str], default: Any) -> Any:
    """Parse with tyro; raise `ConfigError` instead of printing its box of errors."""
    errors = io.StringIO()
    options_: dict[str, Any] = {} if default is None else {"default": default}
    try:
        with contextlib.redirect_stderr(errors):
            return tyro.cli(kind, prog=f"purejaxppo {name}", args=args, config=_MARKERS, **options_)
    except SystemExit as stop:
        if not stop.code:
            raise
    lines = [line.strip("│╭╮╰╯─ ") for line in errors.getvalue().splitlines()[1:]]
    said = " ".join(lines[: next((i for i, x in enumerate(lines) if not x), None)])
    raise ConfigError(f"{said.rstrip('.')}; `purejaxppo {name} --help` lists the options")


def _all_commands(args: Sequence[str]) -> Any:
    """Print help for all commands or a shell completion script; refuse anything else."""
    listed = f"the commands are {', '.join(COMMANDS)}"
    if not args:
        raise ConfigError(f"no command given; {listed} (`purejaxppo --help` describes them)")
    if args[0] not in ("-h", "--help") and not args[0].startswith("--tyro-"):
        near = nearest(args[0], COMMANDS)
        hint = f"did you mean {near}?" if near else listed
        raise ConfigError(f"{args[0]!r}: no such command; {hint}")
    every: Any = None
    for name, kind in COMMANDS.items():
        default = options.with_defaults(kind, {}) if kind in GENERATED else tyro.MISSING
        one: Any = Annotated[kind, tyro.conf.subcommand(name, default=default, prefix_name=False)]
        every = one if every is None else every | one
    tyro.cli(every, prog="purejaxppo", args=list(args), config=_MARKERS)
    raise SystemExit(2)


_MARKERS = (tyro.conf.OmitArgPrefixes,)


def entry() -> None:
    """Console script: call `main`, then exit immediately.

    It does not wait for threads that are still evaluating or failed to write.
    """
    for name in ("stdout", "stderr"):
        if getattr(sys, name) is None:  # closed by the shell, as in `>&-`
            setattr(sys, name, Path(os.devnull).open("w"))  # noqa: SIM115
    try:
        status = main()
    except SystemExit as left:
        status = left.code if isinstance(left.code, int) else int(left.code is not None)
    except BrokenPipeError:
        status = _CLOSED_PIPE
    except BaseException:
        traceback.print_exc()
        status = 1
    for stream in (sys.stdout, sys.stderr):
        with suppress(OSError, ValueError):
            stream.flush()
    os._exit(status)
