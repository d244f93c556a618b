"""States on disk."""

from pathlib import Path
from typing import Any

import jax
from orbax.checkpoint import v1 as ocp

from purejaxppo.config import Config, ConfigError, HParams
from purejaxppo.learner import make_learner
from purejaxppo.types import TrainState

FOLDER = "checkpoints"


def save_state(run_dir: Path, update: int, state: TrainState) -> Path:
    """Write the state after `update` updates under `run_dir/checkpoints/`; atomic."""
    path = (run_dir / FOLDER / f"{update:09d}").absolute()
    ocp.save(str(path), state)
    return path


def latest(run_dir: Path) -> Path:
    """The folder of the newest state in a run directory.

    Raises:
        ConfigError: if there is none.
    """
    found = sorted(p for p in (run_dir / FOLDER).glob("*") if p.name.isdigit())
    if not found:
        raise ConfigError(
            f"run directory {str(run_dir)!r}: holds no finished state under {FOLDER}/; "
            "train to the end first"
        )
    return found[-1].absolute()


def load_state(
    path: Path, config: Config, num_seeds: int, env: Any = None, env_params: Any = None
) -> TrainState:
    """The state written at `path`, its leaves `[S, ...]`.

    Raises:
        ConfigError: if it cannot be read, or is not a state of this config.
    """
    learner = make_learner(config, env, env_params)
    keys = jax.eval_shape(lambda: jax.random.split(jax.random.key(0), num_seeds))
    shapes = jax.eval_shape(jax.vmap(learner.init, (0, None)), keys, HParams())
    sharding = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    template = jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding), shapes
    )
    try:
        state = ocp.load(str(path), template)
    except Exception as error:  # orbax raises many kinds for a damaged or foreign folder
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise ConfigError(f"checkpoint {str(path)!r}: cannot be read: {reason}") from error
    return state
