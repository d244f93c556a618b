"""The command line: `purejaxppo train | eval | envs`."""

import dataclasses
import json
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import tyro

from purejaxppo.config import Config, ConfigError, HParams
from purejaxppo.configfile import Seeds, Settings, load_settings

_Flags = tyro.conf.arg(name="")
_Numbers = tyro.conf.arg(help="Numbers, each of which can be swept without compiling anew.")


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
    eval_episodes."""
    config: Annotated[Config, _Flags] = dataclasses.field(default_factory=Config)
    hparams: Annotated[HParams, _Numbers] = dataclasses.field(default_factory=HParams)
    run: Annotated[Seeds, _Flags] = dataclasses.field(default_factory=Seeds)
    run_dir: Path | None = None
    """Where to write; must not hold a run yet. None takes runs/ENV_ID/DATE-TIME."""
    tensorboard: bool = False
    """Write TensorBoard event files too."""
    wandb: bool = False
    """Log to Weights & Biases too; WANDB_MODE=offline needs no network."""
    compilation_cache: bool = True
    """Keep compiled programs in the user's cache folder."""


@dataclass
class Eval:
    """Evaluate the final state of a run on fresh episodes."""

    run_dir: tyro.conf.Positional[Path]
    """A run directory that `train` wrote."""
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
class Envs:
    """List the environments that can be trained."""


def main(argv: list[str] | None = None) -> int:
    """Run a command; the exit status: 0, 1 if a training failed, 2 for bad input, 130 if
    interrupted."""
    args = sys.argv[1:] if argv is None else argv
    try:
        command = _parse(args)
        if isinstance(command, Train):
            return _train(command)
        return _eval(command) if isinstance(command, Eval) else _envs()
    except ConfigError as error:
        print(f"purejaxppo: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("purejaxppo: interrupted; the metrics so far are kept", file=sys.stderr)
        return 130


def _parse(args: list[str]) -> Train | Eval | Envs:
    settings, file = Settings(), None
    if args[:1] == ["train"] and len(args) > 1 and not args[1].startswith("-"):
        file = Path(args[1])
        settings = load_settings(file)
    train = Train(None, settings.config, settings.hparams, settings.run)
    commands: Any = (
        Annotated[Train, tyro.conf.subcommand("train", default=train, prefix_name=False)]
        | Annotated[Eval, tyro.conf.subcommand("eval", prefix_name=False)]
        | Annotated[Envs, tyro.conf.subcommand("envs", prefix_name=False)]
    )
    command: Any = tyro.cli(commands, prog="purejaxppo", args=args)
    if isinstance(command, Train) and command.config_file != file:
        raise ConfigError(
            f"config file {str(command.config_file)!r}: must stand right after `train`, before "
            "any option"
        )
    return command


def _train(command: Train) -> int:
    from purejaxppo.run import run  # after the arguments are known to be good

    _refuse_custom_env(command.run, "trained")
    stamp = time.strftime("%Y%m%d-%H%M%S")
    result = run(
        command.config,
        command.hparams,
        seed=command.run.seed,
        num_seeds=command.run.num_seeds,
        run_dir=command.run_dir or Path("runs", command.config.env_id, stamp),
        eval_episodes=command.run.eval_episodes,
        tensorboard=command.tensorboard,
        wandb=command.wandb,
        compilation_cache=command.compilation_cache,
    )
    return 1 if result.failed else 0


def _refuse_custom_env(seeds: Seeds, what: str) -> None:
    if seeds.custom_env:
        raise ConfigError(
            "run.custom_env = true: the environment or its parameters were passed from Python, so "
            f"the run can only be {what} from there"
        )


def _eval(command: Eval) -> int:
    import jax
    import numpy as np

    from purejaxppo.checkpoint import latest, load_state
    from purejaxppo.evaluate import LATER_EVALUATION, evaluate, evaluation_keys
    from purejaxppo.run import enable_compilation_cache

    if command.episodes < 1:
        raise ConfigError(f"episodes = {command.episodes}: must be at least 1")
    Seeds(seed=command.seed)
    settings = load_settings(command.run_dir / "config.toml")
    seeds = settings.run
    _refuse_custom_env(seeds, "evaluated")
    path = latest(command.run_dir)
    if command.compilation_cache:
        enable_compilation_cache()
    states = load_state(path, settings.config, seeds.num_seeds)
    keys = evaluation_keys(command.seed, seeds.num_seeds, LATER_EVALUATION)

    def returns(state: Any, key: jax.Array) -> jax.Array:
        return evaluate(
            settings.config, state, key, command.episodes, deterministic=command.deterministic
        )

    episodes = np.asarray(jax.jit(jax.vmap(returns))(states, keys))
    last = np.asarray(states.learner.updates)
    _report(command, settings.config, episodes, last < settings.config.num_updates)
    return 0


def _report(command: Eval, config: Config, episodes: Any, failed: Any) -> None:
    """Print returns `episodes[S, E]`; seeds that `failed[S]` do not count in the mean."""
    import numpy as np

    from purejaxppo.stats import mean_interval

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


if __name__ == "__main__":
    sys.exit(main())
