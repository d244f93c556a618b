"""Implementations of the commands."""

import dataclasses
import importlib
import importlib.util
import json
import os
import time
import warnings
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext, suppress
from importlib.metadata import version
from pathlib import Path
from typing import Any, NamedTuple, cast

from purejaxppo.checks import RunWarning
from purejaxppo.cli.arguments import find_config
from purejaxppo.cli.options import (
    SETTINGS_OF,
    Envs,
    Eval,
    Evaluate,
    Export,
    Generate,
    Plot,
    ProcessFlags,
    Refresh,
    Render,
    Resume,
    Score,
    pick,
)
from purejaxppo.config import Config, ConfigError, Words
from purejaxppo.host.configfile import (
    RunSettings,
    Settings,
    dump_settings,
    kind_of,
    load_settings,
)
from purejaxppo.host.rundir import REFRESH, SWEEP, StorageError, holds, write_output
from purejaxppo.host.signals import exit_at_second_signal
from purejaxppo.host.video import FPS, FPS_OF_GAMES, check_video, gif, write_video
from purejaxppo.rlhf.config import RLHFConfig, RLHFHParams
from purejaxppo.rlhf.text_config import RewardConfig, TextHParams
from purejaxppo.sweeps.settings import Definition, dump_definition


class TrainCommand(NamedTuple):
    """`train`, with its settings and the values of its other options."""

    settings: Settings
    values: Mapping[str, Any]


class SweepCommand(NamedTuple):
    """`sweep`, with its definition and the values of its other options."""

    definition: Definition
    values: Mapping[str, Any]


def settings_from_values(values: Mapping[str, Any], base: Settings) -> Settings:
    """Build settings from values by name, from all tables.

    Args:
        base: settings of the config file, which may have a custom class of hyperparameters.

    Raises:
        ConfigError: if they are of a custom task, which only Python can build.
    """
    kind = type(base.config)
    known = {config: hparams for config, hparams in SETTINGS_OF.values()}
    if kind not in known:
        raise ConfigError(
            f"types.config = {kind.__name__}: belongs to a custom task; train it from Python"
        )
    return Settings(
        kind(**pick(values, kind)),
        dataclasses.replace(base.hparams, **pick(values, known[kind])),
        RunSettings(**pick(values, RunSettings)),
    )


def run_command(command: Any) -> int:
    """Run a parsed command and return the exit status."""
    training = {TrainCommand: _train, SweepCommand: _sweep, Resume: _resume, Refresh: _refresh}
    others = {
        Eval: _eval, Plot: _plot, Generate: _generate, Score: _score, Export: _export,
        Render: _render,
        Evaluate: _evaluate, Envs: _envs,
    }  # fmt: skip
    kind = type(command)
    with exit_at_second_signal() if kind in training else nullcontext():
        return (training | others)[kind](command)


def _print_loading() -> None:
    """Report that JAX is being imported, which takes seconds; ignore a closed standard output."""
    with suppress(OSError):
        print(f"purejaxppo {version('purejaxppo')}: loading JAX", flush=True)


def say(text: str, end: str = "\n") -> None:
    """Print output that the user asked for. Raises `StorageError` if it cannot be written."""
    try:
        print(text, end=end, flush=True)
    except BrokenPipeError:
        raise
    except OSError as error:
        raise StorageError(f"standard output: cannot be written: {error.strerror}") from error


def _train(command: TrainCommand) -> int:
    settings, values = command
    _refuse_passed(settings.run, "trained")
    if values["print_config"]:
        say(dump_settings(settings), end="")
        return 0
    flags = ProcessFlags(**pick(values, ProcessFlags))
    _print_loading()
    from purejaxppo.host.processes import joined  # only after the arguments are checked
    from purejaxppo.host.run import Extras, run_settings

    stamp = time.strftime("%Y%m%d-%H%M%S")
    with joined(_processes(flags), dump_settings(settings)):
        result = run_settings(
            settings,
            values["run_dir"] or Path("runs", settings.config.label, stamp),
            extras=Extras(compilation_cache=values["compilation_cache"]),
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
            f"num_processes = {flags.num_processes}, process_id = {flags.process_id}: several "
            "processes need a coordinator; give --coordinator HOST:PORT"
        )
    return None


def _sweep(command: SweepCommand) -> int:
    definition, values = command
    _refuse_passed(definition.settings.run, "swept")
    if values["print_config"]:
        say(dump_definition(definition), end="")
        return 0
    _print_loading()
    from purejaxppo.sweeps.engine import start_sweep

    stamp = time.strftime("%Y%m%d-%H%M%S")
    found = start_sweep(
        definition,
        values["run_dir"] or Path("runs", definition.settings.config.label, f"sweep-{stamp}"),
        dry_run=values["dry_run"],
        compilation_cache=values["compilation_cache"],
    )
    return 1 if found is not None and found.best is None else 0


def _resume(command: Resume) -> int:
    if command.seed is not None and command.trial is None:
        raise ConfigError(f"seed = {command.seed}: needs --trial; a run resumes all its seeds")
    _print_loading()
    from purejaxppo.host.processes import joined
    from purejaxppo.host.run import resume

    run_dir = command.run_dir
    if holds(run_dir, REFRESH):
        return _resume_refresh(command)
    if holds(run_dir, SWEEP) and command.trial is None:
        return _resume_sweep(command)
    if command.trial is not None:
        if command.processes != ProcessFlags():
            raise ConfigError(
                "coordinator: cannot be used with --trial; resume the trial in one process first"
            )
        from purejaxppo.host.parallel import use_all_cores
        from purejaxppo.sweeps.trials import extract_trial

        use_all_cores()
        run_dir = extract_trial(run_dir, _parse_trial(command.trial), command.seed)
    task = f"{run_dir.absolute()} {command.total_timesteps}"
    with joined(_processes(command.processes), task):
        result = resume(
            run_dir,
            total_timesteps=command.total_timesteps,
            compilation_cache=command.compilation_cache,
        )
    return 1 if result.failed else 0


def _resume_refresh(command: Resume) -> int:
    from purejaxppo.rlhf.rounds import resume_refresh

    if command.total_timesteps is not None or command.trial is not None:
        raise ConfigError(
            "total_timesteps, trial: have no effect on a refresh; resume one of its runs instead"
        )
    if command.processes != ProcessFlags():
        raise ConfigError("coordinator: a refresh runs in one process; leave it out")
    return _until_labels_are_needed(lambda: resume_refresh(command.run_dir))


def _resume_sweep(command: Resume) -> int:
    from purejaxppo.sweeps.engine import resume_sweep

    if command.total_timesteps is not None:
        raise ConfigError(
            "total_timesteps: the trials of a sweep keep their length; extend one of them with "
            "--trial best"
        )
    if command.processes != ProcessFlags():
        raise ConfigError("coordinator: a sweep runs in one process; leave it out")
    found = resume_sweep(command.run_dir, compilation_cache=command.compilation_cache)
    return 0 if found.best else 1


def _score(command: Score) -> int:
    one = (command.prompt is not None, command.response is not None)
    if any(one) == (command.data is not None) or one[0] != one[1]:
        raise ConfigError("score: give either --prompt and --response, or --data FILE")
    from purejaxppo.rlhf.records import Demonstration, read_demonstrations
    from purejaxppo.rlhf.reward import load_reward

    if command.data is not None:
        texts = read_demonstrations(command.data)
    else:
        texts = [Demonstration(command.prompt or "", command.response or "")]
    found = load_reward(command.run_dir, command.combine).score(
        [x.prompt for x in texts], [x.completion for x in texts]
    )
    for text, score in zip(texts, found, strict=True):
        if command.json:
            say(json.dumps({**text._asdict(), "score": float(score)}))
        else:
            say(f"{float(score):8.4f}  {text.prompt}{text.completion}")
    return 0


def _evaluate(command: Evaluate) -> int:
    from purejaxppo.host.program import enable_compilation_cache
    from purejaxppo.rlhf import evaluate_policy

    if command.compilation_cache:
        enable_compilation_cache()
    found = evaluate_policy(
        command.run_dir, command.against, reward=command.reward, combine=command.combine,
        prompts=command.prompts, num_prompts=command.num_prompts,
        num_responses=command.num_responses, k=command.k, best_of=command.best_of,
        temperature=command.temperature, max_tokens=command.max_tokens, seed=command.seed,
        generation_seed=command.generation_seed, which=_parse_checkpoint(command.checkpoint),
    )  # fmt: skip
    say(json.dumps(found.as_json(), ensure_ascii=False) if command.json else found.table())
    return 0


def _refresh(command: Refresh) -> int:
    configs = (command.policy, RLHFConfig), (command.reward, RewardConfig)
    policy, reward = (_settings_for(text, kind) for text, kind in configs)
    config, data = policy.config, reward.config
    if command.init:
        config = dataclasses.replace(config, init=command.init)
    if command.data:
        data = dataclasses.replace(data, data=command.data)
    _print_loading()
    from purejaxppo.rlhf.rounds import refresh

    return _until_labels_are_needed(
        lambda: refresh(
            config, data, run_dir=command.run_dir, label=command.label, rounds=command.rounds,
            pairs=command.pairs, policy_hparams=cast(RLHFHParams, policy.hparams),
            reward_hparams=cast(TextHParams, reward.hparams), seed=command.seed,
            num_reward_seeds=command.num_reward_seeds,
        )
    )  # fmt: skip


def _until_labels_are_needed(run: Callable[[], Any]) -> int:
    from purejaxppo.rlhf.rounds import LabelsNeededError

    try:
        run()
    except LabelsNeededError as error:
        say(str(error))
    return 0


def _settings_for(text: str, kind: Any) -> Settings:
    """Settings of a config file, or defaults for the data or task of that name."""
    found = find_config(text, kind)
    settings = load_settings(found) if isinstance(found, Path) else None
    if settings is None:
        hparams = next(x for config, x in SETTINGS_OF.values() if config is kind)
        settings = Settings(found, hparams())
    if not isinstance(settings.config, kind):
        raise ConfigError(
            f"{text!r}: has kind = {kind_of(settings.config)}, but refresh needs the config of a "
            "policy (kind = rlhf) and that of a reward model (kind = reward)"
        )
    return settings


def _generate(command: Generate) -> int:
    prompts = _read_prompts(command)
    from purejaxppo.host.program import enable_compilation_cache
    from purejaxppo.rlhf import load_generator

    if command.compilation_cache:
        enable_compilation_cache()
    generator = load_generator(
        command.run_dir, seed=command.seed, which=_parse_checkpoint(command.checkpoint)
    )
    found = generator(
        prompts, num_responses=command.num_responses, greedy=command.greedy,
        temperature=command.temperature, top_k=command.top_k, top_p=command.top_p,
        max_tokens=command.max_tokens, best_of=command.best_of, seed=command.generation_seed,
    )  # fmt: skip
    for prompt, completions in zip(prompts, found, strict=True):
        for one in completions:
            if command.json:
                say(json.dumps({"prompt": prompt, **one._asdict()}, ensure_ascii=False))
                continue
            score = "" if one.score is None else f"  score {one.score:.2f}"
            say(f"{prompt} {one.text}{score}{'' if one.stopped else '  (no stop token)'}")
    return 0


def _read_prompts(command: Generate) -> list[str]:
    if (command.prompt is None) == (command.prompts is None):
        raise ConfigError("generate needs prompts: give either --prompt TEXT or --prompts FILE")
    if command.prompt is not None:
        return [command.prompt]
    assert command.prompts is not None
    try:
        lines = command.prompts.read_text(encoding="utf-8").splitlines()
    except OSError as error:
        raise ConfigError(
            f"prompts {str(command.prompts)!r}: {error.strerror}; check the path"
        ) from error
    except ValueError as error:
        raise ConfigError(
            f"prompts {str(command.prompts)!r}: is not UTF-8 text; convert it to UTF-8"
        ) from error
    found = [line for line in lines if line.strip()]
    if not found:
        raise ConfigError(f"prompts {str(command.prompts)!r}: has no prompts; write one per line")
    return found


def _plot(command: Plot) -> int:
    from purejaxppo.sweeps.report import write_report

    say(str(write_report(command.run_dir)))
    return 0


def _refuse_passed(settings: RunSettings, what: str) -> None:
    if settings.passed:
        raise ConfigError(
            f"{', '.join(settings.passed)}: passed from Python, so the run can only be {what} from "
            "there; for the command line, name parts as package.module:name"
        )


def _parse_checkpoint(checkpoint: str) -> Any:
    if checkpoint in ("newest", "best"):
        return checkpoint
    if not checkpoint.isdecimal() or len(checkpoint) > 18:
        raise ConfigError(
            f"checkpoint = {checkpoint!r}: must be newest, best, or a number of updates"
        )
    return int(checkpoint)


class _Trained(NamedTuple):
    """Trained states that `eval`, `export` and `render` load from a directory."""

    task: Any
    states: Any
    """Leaves `[S, ...]`."""
    seeds: list[int]
    """`[S]` seed numbers."""
    failed: list[int]
    """Seeds whose loss turned non-finite; their state is the last good one."""


def _load_trained(command: Eval | Export | Render, what: str) -> _Trained:
    """Load the states of a run's checkpoint, or of a sweep's trial."""
    if holds(command.run_dir, SWEEP):
        return _load_from_sweep(command, what)
    if command.trial is not None:
        raise ConfigError(
            f"trial = {command.trial}: {str(command.run_dir)!r} is not a sweep; leave out --trial"
        )
    from purejaxppo.host.load import find_states, task_of

    def task(settings: Settings) -> Any:
        _refuse_passed(settings.run, what)
        return task_of(settings, None, {})

    found, states = find_states(command.run_dir, _parse_checkpoint(command.checkpoint), task)
    seeds = list(range(found.settings.num_runs))
    trained = _Trained(task(found.settings), states, seeds, sorted(found.position.failed))
    return trained if command.seed is None else _select_seed(trained, command.seed)


def _load_from_sweep(command: Eval | Export | Render, what: str) -> _Trained:
    from purejaxppo.sweeps.settings import load_definition
    from purejaxppo.sweeps.trials import load_trial

    if command.checkpoint != "newest":
        raise ConfigError(
            f"checkpoint = {command.checkpoint}: a sweep keeps only the last checkpoint of each "
            "trial; leave out --checkpoint"
        )
    settings = load_definition(command.run_dir / SWEEP).settings
    _refuse_passed(settings.run, what)
    config, _, states = load_trial(command.run_dir, _parse_trial(command.trial), command.seed)
    import jax

    from purejaxppo.task import own_class, task_of_config

    task = task_of_config(config, hparams=own_class(settings.hparams))
    if command.seed is None:
        return _Trained(task, states, list(range(settings.run.num_seeds)), [])
    return _Trained(task, jax.tree.map(lambda x: x[None], states), [command.seed], [])


def _select_seed(trained: _Trained, seed: int) -> _Trained:
    import jax

    if seed not in trained.seeds:
        raise ConfigError(f"seed = {seed}: the seeds are 0 to {len(trained.seeds) - 1}")
    one = jax.tree.map(lambda x: x[seed : seed + 1], trained.states)
    return trained._replace(states=one, seeds=[seed])


def _parse_trial(text: str | None) -> Any:
    if text is None or text == "best":
        return "best"
    if not text.isdecimal() or len(text) > 18:
        raise ConfigError(f"trial = {text!r}: must be best, or the number of a trial")
    return int(text)


def _eval(command: Eval) -> int:
    if command.episodes < 1:
        raise ConfigError(f"episodes = {command.episodes}: must be at least 1")
    RunSettings(seed=command.eval_seed)
    import numpy as np

    from purejaxppo.evaluation import LATER_EVALUATION, evaluation_keys
    from purejaxppo.host.hostcalls import Returns
    from purejaxppo.host.program import enable_compilation_cache

    if command.compilation_cache:
        enable_compilation_cache()
    trained = _load_trained(command, "evaluated")
    keys = evaluation_keys(command.eval_seed, max(trained.seeds) + 1, LATER_EVALUATION)

    rows = np.asarray(trained.seeds)
    if command.grid is not None:
        return _eval_grid(command, trained, keys[rows])
    returns = Returns(trained.task, command.episodes)
    episodes = returns(trained.states, keys[rows], np.full(len(rows), command.deterministic))
    _report(command, trained, episodes)
    return 0


def _eval_grid(command: Eval, trained: _Trained, keys: Any) -> int:
    from purejaxppo.host.grid import draw_grid, grid_returns, parse_grid
    from purejaxppo.host.stats import mean_interval

    grid = parse_grid(command.grid or "")
    returns = grid_returns(
        trained.task, trained.states, keys, grid, episodes=command.episodes,
        deterministic=command.deterministic,
    )  # fmt: skip
    path = command.run_dir / f"grid_{grid.name}.png"
    draw_grid(path, trained.task.config, grid, returns)
    if command.json:
        say(json.dumps({"parameter": grid.name, "values": grid.values,
                        "return_per_seed": returns.tolist()}))  # fmt: skip
        return 0
    mean, low, high = mean_interval(returns)
    rows = [(grid.name, "return", "95% interval")]
    for value, *x in zip(grid.values, mean, low, high, strict=True):
        interval = "" if x[1] != x[1] else f"{x[1]:.2f} to {x[2]:.2f}"
        rows.append((f"{value:g}", f"{x[0]:.2f}", interval))
    _print_table(rows)
    say(f"picture: {path}")
    return 0


def _report(command: Eval, trained: _Trained, episodes: Any) -> None:
    """Print the returns `episodes[S, E]`, NaN for unfinished episodes.

    Seeds that failed are left out of the mean.
    """
    import numpy as np

    from purejaxppo.host.stats import describe_interval, episode_mean, mean_interval

    per_seed = episode_mean(episodes)
    failed = np.isin(trained.seeds, trained.failed)
    mean, low, high = (float(x) for x in mean_interval(np.where(failed, np.nan, per_seed)))
    interval = None if np.isnan(low) else [low, high]
    unfinished = int(np.isnan(episodes).sum())
    if command.json:
        result = {
            "env_id": trained.task.config.label,
            "episodes": command.episodes,
            "unfinished_episodes": unfinished,
            "actions": "deterministic" if command.deterministic else "sampled",
            "seeds": trained.seeds,
            "return_per_seed": [None if np.isnan(x) else float(x) for x in per_seed],
            "return_mean": None if np.isnan(mean) else mean,
            "return_interval_95": interval,
            "failed_seeds": trained.failed,
        }
        say(json.dumps(result))
        return
    words = trained.task.config.words
    for seed, ended, bad in zip(trained.seeds, episodes, failed, strict=True):
        returns = ended[np.isfinite(ended)]
        note = "; this seed failed: evaluated its last good state" if bad else ""
        shown = f"{returns.mean():.2f} (standard deviation {returns.std():.2f})"
        say(f"seed {seed}: {words.result} {shown if returns.size else '-'}{note}")
    between = describe_interval(interval, int((~failed).sum()))
    actions = "deterministic" if command.deterministic else "sampled"
    if not np.isnan(mean):
        say(
            f"mean: {mean:.2f}{between}, {command.episodes} {words.episodes} per seed, {actions} "
            "actions"
        )
    if unfinished and words == Words():
        say(f"{unfinished} of {episodes.size} episodes did not finish and are left out")
    elif unfinished:
        say(
            f"{unfinished} of {episodes.size} {words.episodes} are left out: they "
            f"{words.unfinished}"
        )


def _export(command: Export) -> int:
    if os.path.lexists(command.file):
        raise ConfigError(f"file {str(command.file)!r}: already exists; choose another name")
    import jax

    from purejaxppo.export import export_policy

    task, states, _, failed = _load_trained(command, "exported")
    if command.seed in failed:
        warnings.warn(
            f"seed {command.seed} failed: exporting its last good state", RunWarning, stacklevel=2
        )
    state = jax.tree.map(lambda x: x[0], states)
    exported = export_policy(task, state, sample=command.sample)
    write_output(command.file, exported.serialize())
    takes = ", ".join(str(x) for x in exported.in_avals)
    gives = ", ".join(str(x) for x in exported.out_avals)
    say(f"{command.file}: takes {takes}; gives {gives}")
    return 0


def _render(command: Render) -> int:
    check_video(command.file, FPS if command.fps is None else command.fps)
    for name, value in (("episodes", command.episodes), ("max_steps", command.max_steps)):
        if value is not None and value < 1:
            raise ConfigError(f"{name} = {value}: must be at least 1")
    RunSettings(seed=command.rollout_seed)
    import jax

    from purejaxppo.host.program import enable_compilation_cache
    from purejaxppo.host.render import frames_of, rollout_key, use_offscreen_gl

    use_offscreen_gl()
    if command.compilation_cache:
        enable_compilation_cache()
    task, states, _, failed = _load_trained(command, "rendered")
    if command.seed in failed:
        warnings.warn(
            f"seed {command.seed} failed: rendering its last good state", RunWarning, stacklevel=2
        )
    state = jax.tree.map(lambda x: x[0], states)
    frames = frames_of(
        task, state, rollout_key(command.rollout_seed, command.seed), command.episodes,
        max_steps=command.max_steps, deterministic=command.deterministic,
    )  # fmt: skip
    fps = command.fps
    if fps is None:
        fps = FPS if task.parts(None).env.game is None else FPS_OF_GAMES
    if command.file.suffix.lower() == ".html":
        _write_page(command, task.config, int(state.learner.updates), gif(frames, fps))
        say(f"{command.file}")
        return 0
    count = write_video(command.file, frames, fps)
    say(f"{command.file}: {count} images")
    return 0


def _write_page(command: Render, config: Any, updates: int, animation: bytes) -> None:
    from purejaxppo.host.report import write_policy_page

    episodes = "1 episode" if command.episodes == 1 else f"{command.episodes} episodes"
    actions = "deterministic" if command.deterministic else "sampled"
    caption = f"{episodes} of seed {command.seed} after {updates:,} updates, {actions} actions."
    run_dir = None if holds(command.run_dir, SWEEP) else command.run_dir
    write_policy_page(command.file, config, animation, caption, run_dir)


def _envs(command: Envs) -> int:
    from purejaxppo.envs import available_environments, make_environment

    names = available_environments(command.pattern or "gymnax/")
    if not names:
        if "/" in command.pattern and "*" not in command.pattern:
            make_environment(Config(env_id=command.pattern))  # says why there is none
        raise ConfigError(
            f"no environment matches {command.pattern!r}; `purejaxppo envs` lists gymnax's and the "
            "suites"
        )
    if command.pattern in names:
        return _one_env(command.pattern)
    rows, failed = [("environment", "observation", "action", "time limit")], []
    if command.pattern:
        _silence_mujoco()
    for name in names:
        try:
            env = make_environment(Config(env_id=name))
        except ConfigError:
            failed.append(name)
            continue
        spaces = (_brief(env.observation_space), _space(env.action_space))
        rows.append((name, *spaces, str(env.max_episode_steps or "none")))
    _print_table(rows)
    if failed:
        say(f"\ncannot be made here (train one to see why): {', '.join(failed)}")
    if not command.pattern:
        _print_suites()
    return 0


def _silence_mujoco() -> None:
    """Do not print MuJoCo's warnings, nor write them to MUJOCO_LOG.TXT in the working directory."""
    if importlib.util.find_spec("mujoco") is not None:
        importlib.import_module("mujoco").set_mju_user_warning(lambda text: None)


def _print_table(rows: Sequence[Sequence[str]]) -> None:
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    for row in rows:
        say("  ".join(f"{x:{n}}" for x, n in zip(row, widths, strict=True)).rstrip())


def _print_suites() -> None:
    from purejaxppo.envs import envpool
    from purejaxppo.envs.suites import is_installed
    from purejaxppo.suites import SUITES

    say("")
    rows = [("suite", "")]
    for prefix, suite in SUITES.items():
        listing = f"purejaxppo envs {prefix}/"
        installing = f"not installed: pip install 'purejaxppo[{suite.extra}]'"
        rows.append((f"{prefix}/", listing if is_installed(prefix) else installing))
    rows.append(("gymnasium/", "purejaxppo envs gymnasium/ (stepped in Python)"))
    listing = "purejaxppo envs envpool/ (stepped in Python)"
    installing = "not installed: pip install 'purejaxppo[envpool]'"
    rows.append(("envpool/", listing if envpool.installed() else installing))
    _print_table(rows)


def _one_env(name: str) -> int:
    """Print all about one environment."""
    from purejaxppo.envs.params import numbers_of
    from purejaxppo.envs.registry import make_environment, parameters_of
    from purejaxppo.suites import SUITES

    env = make_environment(Config(env_id=name))
    prefix = name.partition("/")[0]
    numbers = numbers_of(parameters_of(name))
    rows = [
        ("environment", name),
        ("observation", _space(env.observation_space)),
        ("action", _space(env.action_space)),
        ("time limit", f"{env.max_episode_steps or 'none'}"),
        ("renderer", "none" if env.render is None else "yes"),
        ("parameters", ", ".join(f"{key} = {x}" for key, x in numbers.items()) or "none"),
    ]
    if prefix in SUITES:
        rows.append(("extra", f"pip install 'purejaxppo[{SUITES[prefix].extra}]'"))
    _print_table(rows)
    say(f"\npurejaxppo train {name}")
    return 0


def _brief(space: Any) -> str:
    """A space; of a dictionary only the number of its parts."""
    from purejaxppo.envs.base import parts_of
    from purejaxppo.masks import ACTION_MASK, is_masked, without_mask

    parts = parts_of(space)
    if is_masked(parts):
        return f"{_brief(without_mask(parts))} + {ACTION_MASK}"
    return f"{len(parts)} parts" if isinstance(parts, dict) else _space(space)


def _space(space: Any) -> str:
    from purejaxppo.envs.base import parts_of

    parts = parts_of(space)
    if isinstance(parts, dict):
        return "{" + ", ".join(f"{name}: {_space(part)}" for name, part in parts.items()) + "}"
    if hasattr(space, "n"):
        return f"Discrete({space.n})"
    if hasattr(space, "num_categories"):
        return f"MultiDiscrete{list(space.num_categories)}"
    return f"Box{list(space.shape)}" if hasattr(space, "shape") else repr(space)
