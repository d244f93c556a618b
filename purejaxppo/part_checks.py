"""Checks of the types and shapes of parts that users pass, by `jax.eval_shape`."""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from purejaxppo.checks import is_reference
from purejaxppo.config import Chosen, Config, ConfigError, HParams
from purejaxppo.losses import Terms
from purejaxppo.objectives.base import Objective
from purejaxppo.references import called, first_line, resolve
from purejaxppo.types import Actor, Batch, Environment, Learner, Network, PyTree, Rollout

_OWN_METRICS = (
    "policy_loss", "value_loss", "entropy", "approx_kl", "clip_fraction", "kl", "kl_beta",
    "grad_norm", "learning_rate", "env_steps", "episodes", "episode_return", "episode_length",
    "explained_variance", "seconds", "seed", "update",
)  # fmt: skip
_NETWORK_SETTINGS = (
    "encoder", "memory", "hidden_sizes", "memory_size", "activation", "shared_trunk",
    "log_std_init",
)  # fmt: skip


def one_of(name: str, config: Config, given: dict[str, Any], default: str) -> Any:
    """Return the part that was passed, or that the config names by reference; None if neither.

    Raises:
        ConfigError: if both are given, or the reference cannot be imported.
    """
    setting = getattr(config, name)
    if name not in given:
        return resolve(name, setting) if is_reference(setting) else None
    if setting != default and not isinstance(setting, Chosen):
        raise ConfigError(
            f"{name} = {setting!r} in Config, and {name} is passed as an argument too; remove one "
            "of the two"
        )
    return given[name]


def check_is_function(name: str, part: Any) -> None:
    """Raise `ConfigError` if a part is not a function."""
    if not callable(part):
        raise ConfigError(f"{name} is of type {type(part).__name__}: must be a function")


def check_no_effect(part: str, config: Config) -> None:
    """Raise `ConfigError` if a setting of the default network is given with a user's part."""
    for f in dataclasses.fields(Config):
        value = getattr(config, f.name)
        if f.name in _NETWORK_SETTINGS and value != f.default:
            raise ConfigError(
                f"{f.name} = {value}: has no effect with a {part} of your own; leave it out"
            )


def check_optimizer(optimizer: Any, network: Network, hparams: HParams) -> None:
    """Raise `ConfigError` if it does not return an optax transformation, or if that changes the
    structure or shapes of its input."""
    if isinstance(optimizer, optax.GradientTransformation):
        raise ConfigError(
            "optimizer: is an optax transformation; pass a function of hyperparameters, as in "
            "lambda h: optax.adam(h.learning_rate)"
        )
    transform = called("optimizer", optimizer, hparams)
    if not isinstance(transform, optax.GradientTransformation):
        raise ConfigError(
            f"optimizer: returned {type(transform).__name__}; it must be a function hparams -> "
            "optax transformation, as in lambda h: optax.adamw(h.learning_rate)"
        )
    params = jax.eval_shape(network.init, jax.random.key(0))

    def changes(params: PyTree, hparams: HParams) -> PyTree:
        transform = optimizer(hparams)
        return transform.update(params, transform.init(params), params)[0]

    found = _traced("optimizer", changes, params, hparams)
    if jax.tree.structure(found) != jax.tree.structure(params):
        raise ConfigError(
            f"optimizer: returned a tree of {jax.tree.structure(found)}, but the parameters are "
            f"{jax.tree.structure(params)}; return one update per parameter"
        )
    for (path, wanted), leaf in zip(
        jax.tree_util.tree_leaves_with_path(params), jax.tree.leaves(found), strict=True
    ):
        if leaf.shape != wanted.shape:
            raise ConfigError(
                f"optimizer: its update of {jax.tree_util.keystr(path)} has shape {leaf.shape}, "
                f"but the parameter has shape {wanted.shape}; they must agree"
            )


def check_objective_part(config: Config, objective: Objective, given: dict[str, Any]) -> None:
    """Raise `ConfigError` if an objective's extra losses, or `baseline`, would have no effect."""
    if objective.step is not None and objective.extra_losses:
        raise ConfigError(
            f"objective = {objective.name}: extra_losses have no effect, since its step does not "
            "minimise them; use a different objective"
        )
    for name in objective.extra_losses:
        if name in _OWN_METRICS:
            raise ConfigError(f"extra_losses: {name} is the name of a metric; choose another name")
    if "advantage" in given and config.baseline != "value":
        raise ConfigError(
            f"baseline = {config.baseline}: has no effect with an advantage of your own; leave it "
            "out"
        )


def check_critic(objective: Objective, network: Network) -> None:
    """Raise `ConfigError` if the critic must have parameters of its own and has none."""
    if not objective.fixed_critic:
        return
    names = sorted(jax.eval_shape(network.init, jax.random.key(0)))
    if not any(name.startswith("critic") for name in names):
        raise ConfigError(
            f"objective = {objective.name}: fits the critic after the policy's step, so its "
            f"modules need names that begin with critic; the network's are {', '.join(names)}"
        )


def check_in_python(objective: Objective, env: Environment, given: Mapping[str, Any]) -> None:
    """Raise `ConfigError` if a part needs a compiled environment, and this one is not."""
    if env.in_python is None:
        return
    if objective.whole_episodes:
        raise ConfigError(
            f"objective = {objective.name}: collects whole episodes of a compiled environment, but "
            f"{env.name} is stepped in Python; use another objective"
        )
    if "collect" in given:
        raise ConfigError(f"collect: cannot step {env.name}, which is stepped in Python")


def check_alternating(config: Config, objective: Objective, env: Environment) -> None:
    """Raise `ConfigError` if a setting does not fit a game of two players, or needs one."""
    if not env.alternating and config.opponent != "self":
        raise ConfigError(
            f"opponent = {config.opponent}: {env.name} has no second player; leave it out"
        )
    if not env.alternating:
        return
    if config.opponent == "pool" and config.normalize_obs:
        raise ConfigError(
            "normalize_obs: opponents of a pool do not store the statistics of observations; leave "
            "it out, or use opponent = self"
        )
    if config.opponent == "pool" and config.num_envs % config.opponent_pool:
        raise ConfigError(
            f"num_envs = {config.num_envs}: must be a multiple of opponent_pool = "
            f"{config.opponent_pool}, since all opponents play in the same number of environments"
        )
    if objective.whole_episodes:
        raise ConfigError(
            f"objective = {objective.name}: adds up the rewards of an episode, but in {env.name} "
            "they belong to two players; use another objective"
        )
    if config.memory != "none":
        raise ConfigError(
            f"memory = {config.memory}: the memory would see both players' views of {env.name}, "
            "but one player's in evaluations; use memory = none"
        )


def as_actor(collect: Any, parts: Any) -> Actor:
    """Call `collect`. Raises `ConfigError` if it does not return an `Actor`."""
    actor = called("collect", collect, parts)
    if not isinstance(actor, Actor):
        raise ConfigError(
            f"collect: returned {type(actor).__name__}; it must be a function Parts -> "
            "ppo.Actor(init, collect)"
        )
    return actor


def check_update(parts: Any, learner: Learner, passed: tuple[str, ...], hparams: HParams) -> None:
    """Trace one update with the user's parts, step by step, so that the error names the first part
    that does not fit. Nothing is computed.

    Raises:
        ConfigError: with the expected and the actual shapes.
    """
    referenced = [x for x in ("objective", "advantage") if is_reference(getattr(parts.config, x))]
    own = {*passed, *referenced}
    if not own & {"objective", "advantage", "collect"}:
        return
    steps = (parts.config.num_steps, parts.config.num_envs)
    if "objective" in own:
        _check_loss(parts.objective.loss, hparams)
    state = _traced("collect", learner.init, jax.random.key(0), hparams)
    found = _traced(
        "collect", lambda s, h: parts.actor.collect(s.learner, s.actors, h, ()), state, hparams
    )
    if not (isinstance(found, tuple) and len(found) == 2 and isinstance(found[1], Rollout)):
        raise ConfigError(
            f"collect: returned {type(found).__name__}; it must return (actors, ppo.Rollout)"
        )
    rollout = found[1]
    for name in ("reward", "value", "next_value", "log_prob", "mask"):
        if (found := np.shape(getattr(rollout, name))) != steps:
            raise ConfigError(
                f"collect: returned {name} of shape {found}; it must be [num_steps, num_envs] = "
                f"{steps}"
            )
    estimated = _traced("advantage", parts.advantage, rollout, hparams)
    count = len(estimated) if isinstance(estimated, tuple) else 1
    shapes = [np.shape(x) for x in estimated] if isinstance(estimated, tuple) else []
    if count not in (2, 3) or any(shape != steps for shape in shapes):
        raise ConfigError(
            f"advantage: returned {count} value{'s' if count > 1 else ''} of shapes {shapes}; it "
            f"must return (advantage, target) or (advantage, target, weight), each [num_steps, "
            f"num_envs] = {steps}"
        )
    _check_extra_losses(parts, rollout, steps, state.learner.params, hparams)
    _traced("objective", learner.update, state, hparams)


def _check_extra_losses(parts: Any, rollout: Any, steps: Any, params: Any, hparams: Any) -> None:
    numbers: Any = jax.ShapeDtypeStruct(steps, jnp.float32)
    batch = Batch(rollout, numbers, numbers, numbers)
    for name, extra in parts.objective.extra_losses.items():
        found = _traced(
            f"extra_losses[{name!r}]", lambda p, b, h, f=extra: f(p, parts.network, b, h),
            params, batch, hparams,
        )  # fmt: skip
        if np.shape(found) != steps:
            raise ConfigError(
                f"extra_losses[{name!r}]: returned shape {np.shape(found)} for samples of shape "
                f"{steps}; it must return one number per sample"
            )


def _check_loss(loss: Callable[..., Any], hparams: HParams) -> None:
    samples = jax.ShapeDtypeStruct((3, 5), jnp.float32)
    found = _traced("objective", lambda h, *x: loss(Terms(*x), h), hparams, *[samples] * 4)
    if jax.tree.structure(found) != jax.tree.structure(0) or found.shape != samples.shape:
        shapes = jax.tree.map(lambda x: x.shape, found)
        raise ConfigError(
            f"objective: the loss returned {shapes} for terms of shape {samples.shape}; it must "
            "return one number per sample"
        )


def _traced(name: str, function: Callable[..., Any], *arguments: Any) -> Any:
    """Return the shapes of the results. Raises `ConfigError` if JAX cannot trace the function."""
    try:
        return jax.eval_shape(function, *arguments)
    except ConfigError:
        raise
    except (jax.errors.ConcretizationTypeError, jax.errors.TracerArrayConversionError) as error:
        raise ConfigError(
            f"{name}: cannot be compiled, since Python or NumPy reads the value of an array: "
            f"{first_line(error)}"
        ) from error
    except Exception as error:  # whatever a user's function raises
        raise ConfigError(
            f"{name}: cannot be traced: {type(error).__name__}: {first_line(error)}"
        ) from error
