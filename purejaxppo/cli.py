"""The command line: `purejaxppo train | sweep | resume | eval | export | plot | envs`."""

import dataclasses
import json
import os
import sys
import time
import traceback
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Annotated, Any

import tyro

from purejaxppo.config import Config, ConfigError, HParams
from purejaxppo.host.configfile import RunSettings, Settings, dump_settings, load_settings
from purejaxppo.host.rundir import SWEEP, LostError, RunWarning, StorageError, holds, write_whole
from purejaxppo.host.signals import exit_at_second_signal
from purejaxppo.sweeps.settings import Definition, SweepSettings, load_definition

_Flags = tyro.conf.arg(name="")
_Numbers = tyro.conf.arg(help="Numbers, each of which can be swept without compiling anew.")


@dataclass
class ProcessFlags:
    """Several processes, on one machine or many, that share a training."""

    coordinator: str | None = None
    """HOST:PORT of process 0, where the others find it; the same in all processes."""
    num_processes: int = 1
    """How many there are."""
    process_id: int = 0
    """Which of them this one is, from 0; process 0 writes and reports."""
    wait_seconds: float = 60.0
    """How long they wait for each other to come."""


@dataclass
class Train:
    """Train PPO and write what comes of it into a run directory.

    A config file, if there is one, is named first: purejaxppo train configs/cartpole.toml. What
    stands on the command line wins over the file.
    """

    config_file: Annotated[
        tyro.conf.Positional[Path | None], tyro.conf.arg(metavar="[CONFIG.toml]")
    ] = None
    """TOML file: settings at the top, then [hparams], and [run] with seed, num_seeds and
    what else concerns the host."""
    config: Annotated[Config, _Flags] = dataclasses.field(default_factory=Config)
    hparams: Annotated[HParams, _Numbers] = dataclasses.field(default_factory=HParams)
    run: Annotated[RunSettings, _Flags] = dataclasses.field(default_factory=RunSettings)
    run_dir: Path | None = None
    """Where to write; must not hold a run yet. None takes runs/ENV_ID/DATE-TIME."""
    compilation_cache: bool = True
    """Keep compiled programs in the user's cache folder."""
    processes: Annotated[ProcessFlags, _Flags] = dataclasses.field(default_factory=ProcessFlags)


@dataclass
class Sweep:
    """Train with many settings, each with several seeds, and find the best.

    purejaxppo sweep configs/cartpole.toml --num-seeds 4 --grid num_envs=4,16 --sample
    learning_rate=loguniform:1e-4,1e-2 --trials 8: 8 samples at each point of the grid. A config
    file is named first, and may have its own table [sweep]. What is printed first is the plan.
    """

    config_file: Annotated[
        tyro.conf.Positional[Path | None], tyro.conf.arg(metavar="[CONFIG.toml]")
    ] = None
    """TOML file: what the trials have in common, as for `train`."""
    sweep: Annotated[SweepSettings, _Flags, tyro.conf.UseAppendAction] = dataclasses.field(
        default_factory=SweepSettings
    )
    num_seeds: int = 1
    """Trainings of each trial, which differ in their random numbers alone."""
    seed: int = 0
    """Seed of all random numbers."""
    devices: int = 0
    """Devices to spread over; 0 takes all, where there are enough trainings."""
    eval_episodes: int = 128
    """Episodes of the final evaluation, per training, by which trials are ranked."""
    checkpoint_every: float = 300.0
    """Seconds between checkpoints of the trainings under way."""
    config: Annotated[Config, _Flags] = dataclasses.field(default_factory=Config)
    hparams: Annotated[HParams, _Numbers] = dataclasses.field(default_factory=HParams)
    run_dir: Path | None = None
    """Where to write; must not hold a run yet. None takes runs/ENV_ID/sweep-DATE-TIME."""
    dry_run: bool = False
    """Compile, print the plan, and stop."""
    compilation_cache: bool = True
    """Keep compiled programs in the user's cache folder."""


@dataclass
class Resume:
    """Go on with a run or sweep that was stopped or killed, or make a finished run longer.

    It ends as if nothing had happened, bit for bit. Damaged checkpoints are skipped.
    """

    run_dir: tyro.conf.Positional[Path]
    """A directory that `train` or `sweep` wrote."""
    total_timesteps: int | None = None
    """Another length of the whole training; schedules run over the new one from here on."""
    compilation_cache: bool = True
    """Keep compiled programs in the user's cache folder."""
    processes: Annotated[ProcessFlags, _Flags] = dataclasses.field(default_factory=ProcessFlags)


@dataclass
class Eval:
    """Evaluate a state of a run on fresh episodes."""

    run_dir: tyro.conf.Positional[Path]
    """A run directory that `train` wrote."""
    checkpoint: str = "newest"
    """The newest checkpoint, the best by evaluation, or the number of its updates."""
    episodes: int = 128
    """Episodes per seed."""
    deterministic: bool = False
    """Take the mode of the policy instead of sampling from it."""
    seed: int = 0
    """Seed of the evaluation's random numbers."""
    json: bool = False
    """Print one JSON object."""
    compilation_cache: bool = True
    """Keep compiled programs in the user's cache folder."""


@dataclass
class Export:
    """Write a policy as StableHLO, for programs that have jax but not this package."""

    run_dir: tyro.conf.Positional[Path]
    """A run directory that `train` wrote."""
    file: tyro.conf.Positional[Path]
    """The file to write; must not be there yet."""
    checkpoint: str = "newest"
    """The newest checkpoint, the best by evaluation, or the number of its updates."""
    seed: int = 0
    """Which of the trainings that ran side by side, counted from 0."""
    sample: bool = False
    """Sample actions, from a key that the caller gives, instead of taking the policy's mode."""


@dataclass
class Plot:
    """Draw a sweep's results again: pictures, and report.html, which holds them all."""

    run_dir: tyro.conf.Positional[Path]
    """A directory that `sweep` wrote."""


@dataclass
class Envs:
    """List the environments that can be trained."""


def _join_help_lines() -> None:
    """Each field's docstring as one line: tyro would keep its line breaks beside those it makes.

    It takes 0.15 s, so only where help is shown.
    """
    from docstring_parser import parse_from_object

    settings = (Config, HParams, RunSettings, SweepSettings)
    for table in (*settings, ProcessFlags, Train, Sweep, Resume, Eval, Export):
        texts = {p.arg_name: p.description for p in parse_from_object(table).params}
        for field in dataclasses.fields(table):
            text = " ".join((texts.get(field.name) or "").split())
            field.metadata = MappingProxyType({**field.metadata, "help": text})


def main(argv: list[str] | None = None) -> int:
    """Run a command; the exit status: 0, 1 if a training failed or something could not be written,
    2 for bad input, 130 or 143 if stopped by SIGINT or SIGTERM."""
    args = sys.argv[1:] if argv is None else argv
    try:
        command = _parse(args)
        with _plain_warnings():
            return _run(command)
    except ConfigError as error:
        print(f"purejaxppo: {error}", file=sys.stderr)
        return 2
    except (StorageError, LostError) as error:
        print(f"purejaxppo: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        return 130


def _run(command: Any) -> int:
    if isinstance(command, Train | Sweep | Resume):
        with exit_at_second_signal():
            if isinstance(command, Train):
                return _train(command)
            return _sweep(command) if isinstance(command, Sweep) else _resume(command)
    if isinstance(command, Eval):
        return _eval(command)
    if isinstance(command, Plot):
        return _plot(command)
    return _export(command) if isinstance(command, Export) else _envs()


@contextmanager
def _plain_warnings() -> Iterator[None]:
    """Ours in one line each, without the place in the code."""

    def show(message: Any, category: Any, *place: Any, **more: Any) -> None:
        if category is RunWarning:
            print(f"purejaxppo: warning: {message}", file=sys.stderr)
        else:
            usual(message, category, *place, **more)

    with warnings.catch_warnings():
        usual, warnings.showwarning = warnings.showwarning, show
        # What a save that failed has left undone.
        warnings.filterwarnings("ignore", "coroutine .* was never awaited", RuntimeWarning)
        yield


def _parse(args: list[str]) -> Any:
    if {"-h", "--help"} & set(args):
        _join_help_lines()
    settings, searched, file = Settings(), SweepSettings(), None
    if args[:1] in (["train"], ["sweep"]) and len(args) > 1 and not args[1].startswith("-"):
        file = Path(args[1])
        if args[0] == "sweep":
            definition = load_definition(file)
            settings, searched = definition.settings, definition.sweep
            _refuse_custom_env(settings.run, "swept")
        else:
            settings = load_settings(file)
    train = Train(None, settings.config, settings.hparams, settings.run)
    host = settings.run
    sweep = Sweep(
        None, searched, host.num_seeds, host.seed, host.devices, host.eval_episodes,
        host.checkpoint_every, settings.config, settings.hparams,
    )  # fmt: skip
    commands: Any = (
        Annotated[Train, tyro.conf.subcommand("train", default=train, prefix_name=False)]
        | Annotated[Sweep, tyro.conf.subcommand("sweep", default=sweep, prefix_name=False)]
        | Annotated[Resume, tyro.conf.subcommand("resume", prefix_name=False)]
        | Annotated[Eval, tyro.conf.subcommand("eval", prefix_name=False)]
        | Annotated[Export, tyro.conf.subcommand("export", prefix_name=False)]
        | Annotated[Plot, tyro.conf.subcommand("plot", prefix_name=False)]
        | Annotated[Envs, tyro.conf.subcommand("envs", prefix_name=False)]
    )
    command: Any = tyro.cli(commands, prog="purejaxppo", args=args)
    if isinstance(command, Train | Sweep) and command.config_file != file:
        raise ConfigError(
            f"config file {str(command.config_file)!r}: must stand right after `{args[0]}`, before "
            "any option"
        )
    return command


def _train(command: Train) -> int:
    from purejaxppo.host.processes import joined  # after the arguments are known to be good
    from purejaxppo.host.run import run_settings

    _refuse_custom_env(command.run, "trained")
    stamp = time.strftime("%Y%m%d-%H%M%S")
    settings = Settings(command.config, command.hparams, command.run)
    with joined(_processes(command.processes), dump_settings(settings)):
        result = run_settings(
            settings,
            command.run_dir or Path("runs", command.config.env_id, stamp),
            compilation_cache=command.compilation_cache,
        )
    return 1 if result.failed else 0


def _processes(flags: ProcessFlags) -> Any:
    from purejaxppo.host.processes import Processes

    if flags.coordinator is not None:
        return Processes(
            flags.coordinator, flags.num_processes, flags.process_id, flags.wait_seconds
        )
    if flags.num_processes != 1 or flags.process_id:
        raise ConfigError(
            f"num_processes = {flags.num_processes}, process_id = {flags.process_id}: without "
            "coordinator there is one process; give --coordinator HOST:PORT"
        )
    return None


def _sweep(command: Sweep) -> int:
    from purejaxppo.sweeps.engine import start_sweep

    host = RunSettings(
        command.seed, command.num_seeds, command.devices, command.eval_episodes,
        command.checkpoint_every, keep=1,
    )  # fmt: skip
    settings = Settings(command.config, command.hparams, host)
    stamp = time.strftime("%Y%m%d-%H%M%S")
    found = start_sweep(
        Definition(settings, command.sweep),
        command.run_dir or Path("runs", command.config.env_id, f"sweep-{stamp}"),
        dry_run=command.dry_run,
        compilation_cache=command.compilation_cache,
    )
    return 1 if found is not None and found.best is None else 0


def _resume(command: Resume) -> int:
    from purejaxppo.host.processes import joined
    from purejaxppo.host.run import resume

    if holds(command.run_dir, SWEEP):
        return _resume_sweep(command)
    task = f"{command.run_dir.absolute()} {command.total_timesteps}"
    with joined(_processes(command.processes), task):
        result = resume(
            command.run_dir,
            total_timesteps=command.total_timesteps,
            compilation_cache=command.compilation_cache,
        )
    return 1 if result.failed else 0


def _resume_sweep(command: Resume) -> int:
    from purejaxppo.sweeps.engine import resume_sweep

    if command.total_timesteps is not None:
        raise ConfigError("total_timesteps: a sweep's trials are as long as they were begun")
    if command.processes != ProcessFlags():
        raise ConfigError("coordinator: a sweep runs in one process; leave it out")
    found = resume_sweep(command.run_dir, compilation_cache=command.compilation_cache)
    return 0 if found.best else 1


def _plot(command: Plot) -> int:
    from purejaxppo.sweeps.report import write_report

    print(write_report(command.run_dir))
    return 0


def _refuse_custom_env(settings: RunSettings, what: str) -> None:
    if settings.custom_env:
        raise ConfigError(
            "run.custom_env = true: the environment or its parameters were passed from Python, so "
            f"the run can only be {what} from there"
        )


def _which(checkpoint: str) -> Any:
    if checkpoint in ("newest", "best"):
        return checkpoint
    if not checkpoint.isdecimal() or len(checkpoint) > 18:
        raise ConfigError(
            f"checkpoint = {checkpoint!r}: must be newest, best, or a number of updates"
        )
    return int(checkpoint)


def _eval(command: Eval) -> int:
    import jax
    import numpy as np

    from purejaxppo.evaluation import LATER_EVALUATION, evaluate, evaluation_keys
    from purejaxppo.host.load import find_with_warnings, restore_states
    from purejaxppo.host.program import enable_compilation_cache
    from purejaxppo.learner import make_learner

    if command.episodes < 1:
        raise ConfigError(f"episodes = {command.episodes}: must be at least 1")
    RunSettings(seed=command.seed)
    found = find_with_warnings(command.run_dir, _which(command.checkpoint))
    config, num_seeds = found.settings.config, found.settings.num_trainings
    _refuse_custom_env(found.settings.run, "evaluated")
    if command.compilation_cache:
        enable_compilation_cache()
    states = restore_states(found, make_learner(config))
    keys = evaluation_keys(command.seed, num_seeds, LATER_EVALUATION)

    def returns(state: Any, key: jax.Array) -> jax.Array:
        return evaluate(config, state, key, command.episodes, deterministic=command.deterministic)

    episodes = np.asarray(jax.jit(jax.vmap(returns))(states, keys))
    failed = np.isin(np.arange(num_seeds), list(found.position.failed))
    _report(command, config, episodes, failed)
    return 0


def _export(command: Export) -> int:
    from purejaxppo.export import export_policy
    from purejaxppo.host.load import load

    if os.path.lexists(command.file):
        raise ConfigError(f"file {str(command.file)!r}: is there already; choose another name")
    which = _which(command.checkpoint)
    config, _, state = load(command.run_dir, seed=command.seed, which=which)
    exported = export_policy(config, state, sample=command.sample)
    try:
        write_whole(command.file, exported.serialize())
    except OSError as error:
        raise StorageError(
            f"file {str(command.file)!r}: cannot be written: {error.strerror}"
        ) from error
    takes = ", ".join(str(x) for x in exported.in_avals)
    gives = ", ".join(str(x) for x in exported.out_avals)
    print(f"{command.file}: takes {takes}; gives {gives}")
    return 0


def _report(command: Eval, config: Config, episodes: Any, failed: Any) -> None:
    """Print returns `episodes[S, E]`; seeds that `failed[S]` do not count in the mean."""
    import numpy as np

    from purejaxppo.host.stats import mean_interval

    per_seed = episodes.mean(axis=1)
    mean, low, high = mean_interval(np.where(failed, np.nan, per_seed))
    interval = None if np.isnan(low) else [float(low), float(high)]
    if command.json:
        result = {
            "env_id": config.env_id,
            "episodes": command.episodes,
            "deterministic": command.deterministic,
            "return_per_seed": per_seed.tolist(),
            "return_mean": None if np.isnan(mean) else float(mean),
            "return_interval_95": interval,
            "failed_seeds": np.flatnonzero(failed).tolist(),
        }
        print(json.dumps(result))
        return
    for seed, returns in enumerate(episodes):
        note = "; its training failed, this is its last good state" if failed[seed] else ""
        print(
            f"seed {seed}: return {returns.mean():.2f} (deviation over episodes "
            f"{returns.std():.2f}){note}"
        )
    between = f" (95% interval {interval[0]:.2f} to {interval[1]:.2f})" if interval else ""
    if not failed.all():
        print(f"mean: {mean:.2f}{between}, {command.episodes} episodes per seed")


def _envs() -> int:
    from purejaxppo.envs import available_environments, make_environment

    rows = []
    for name in available_environments():
        env = make_environment(Config(env_id=name))
        rows.append((name, _space(env.observation_space), _space(env.action_space)))
    widths = [max(len(row[i]) for row in rows) for i in range(2)]
    print(f"{'environment':{widths[0]}}  {'observation':{widths[1]}}  action")
    for name, observation, action in rows:
        print(f"{name:{widths[0]}}  {observation:{widths[1]}}  {action}")
    return 0


def _space(space: Any) -> str:
    if hasattr(space, "n"):
        return f"Discrete({space.n})"
    return f"Box{list(space.shape)}" if hasattr(space, "shape") else repr(space)


def entry() -> None:
    """The console script: `main`, and then out at once, without waiting for threads that evaluate
    or failed to write."""
    try:
        status = main()
    except SystemExit as left:
        status = left.code if isinstance(left.code, int) else int(left.code is not None)
    except BaseException:
        traceback.print_exc()
        status = 1
    for stream in (sys.stdout, sys.stderr):
        with suppress(OSError, ValueError):
            stream.flush()
    os._exit(status)


if __name__ == "__main__":
    entry()
