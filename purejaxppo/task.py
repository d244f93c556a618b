"""`Task`, a value that describes what is trained, and `make_task`, which builds it.

All parts are built here. The host, sweeps and checkpoints depend only on tasks.
"""

import dataclasses
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple, TypedDict

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Key

from purejaxppo import part_checks
from purejaxppo.advantages import alternating, clip_rewards, make_advantage
from purejaxppo.agent import Agent, agent_of
from purejaxppo.between import HostCall
from purejaxppo.checks import is_reference
from purejaxppo.collect import make_actor
from purejaxppo.config import Config, ConfigError, HParams, TaskConfig
from purejaxppo.distributions import make_policy
from purejaxppo.envs import make_environment
from purejaxppo.envs.base import check_contract, obs_shapes
from purejaxppo.evaluation import episode_returns
from purejaxppo.improve import make_improve, make_loss
from purejaxppo.inputs import check_config
from purejaxppo.learner import make_learner
from purejaxppo.masks import check_mask
from purejaxppo.networks import make_network
from purejaxppo.normalize import init_obs_stats, init_stats
from purejaxppo.objectives.base import Objective
from purejaxppo.objectives.episodes import make_episode_advantage, whole_episode_actor
from purejaxppo.objectives.table import check_objective, objective_of
from purejaxppo.opponents import against_pool, with_pool
from purejaxppo.optimizer import ADAM, Optimizer
from purejaxppo.recorded import Python, recorded_actor, recorded_returns
from purejaxppo.references import resolve
from purejaxppo.types import (
    Actor,
    Advantage,
    Environment,
    Improve,
    Learner,
    LearnerState,
    Loss,
    Network,
    Policy,
    PyTree,
    TrainState,
)
from purejaxppo.user_networks import network_of_module


class Parts(NamedTuple):
    """The parts of one update."""

    config: Config
    objective: Objective
    env: Environment
    policy: Policy
    network: Network
    optimizer: Optimizer
    actor: Actor
    """`actor.collect(learner, actors, hparams, data) -> (actors, rollout)`."""
    advantage: Advantage
    """`(rollout, hparams) -> (advantage[T, N], target[T, N])`, and optionally a weight."""
    loss: Loss
    """`(params, batch, hparams, count, data) -> (loss, metrics)`."""
    improve: Improve
    axis: str | None
    """The mesh axis over which environments are spread, if they are."""


class PartArguments(TypedDict, total=False):
    """The parts that every entry point accepts besides `env` and `env_params`. None uses the part
    that the config determines."""

    network: Any
    """A Flax module `obs[B, ...] -> (policy_outputs[B, P], value[B])`, or a function that takes the
    number of outputs P and returns one. A recurrent module is `(carry, obs[B, ...]) -> (carry,
    (policy_outputs[B, P], value[B]))` and has a method `initial_carry(n)`."""
    objective: Any
    """An `Objective`, or a policy loss `(Terms, hparams) -> loss[T, B]` that replaces the one
    of `config.objective`."""
    advantage: Any
    """`(rollout, hparams) -> (advantage[T, N], target[T, N])`, optionally with a third array
    `[T, N]`: the weight of each sample."""
    optimizer: Any
    """`hparams -> optax transformation`, which replaces gradient clipping and Adam. It receives the
    hyperparameters after schedules are applied."""
    collect: Any
    """`Parts -> Actor`, which replaces the default `Parts.actor`."""


class PartsAndHParams(PartArguments, total=False):
    """`PartArguments` and default hyperparameters, for functions without an argument for these."""

    hparams: Any
    """Default hyperparameters: an instance of a subclass, if a part reads fields that `HParams`
    does not have."""


NAMES = ("env", "env_params", *PartArguments.__annotations__)
"""Names of all parts."""


def _always_none(_: Any) -> str | None:
    return None


class FinishedRun(NamedTuple):
    """What the plots of a run are made from: the S seeds that have not failed."""

    hparams: Any
    metrics: dict[str, np.ndarray]
    """Arrays `[S, U]`."""
    states: TrainState
    """Leaves `[S, ...]`."""
    evaluations: tuple[np.ndarray, np.ndarray]
    """Updates `[P]` and mean return over seeds `[P]` of the evaluations with sampled actions; empty
    if a seed failed."""


class Plot(NamedTuple):
    """A plot of a run for its report."""

    name: str
    """Identifier in the page."""
    title: str
    caption: str
    """Plain text."""
    draw: Callable[[Any], None]
    """Draws into the given matplotlib axes."""


@dataclass(frozen=True)
class Task:
    """What is trained: a learner, an evaluation and, for policies, an agent.

    `make_task` makes a task for reinforcement learning. For any other kind of training, construct a
    `Task` from a config (a frozen dataclass that extends `TaskConfig`), a learner and an
    evaluation.
    """

    config: Any
    learner: Callable[[str | None], Learner]
    """`axis -> Learner`, with the mesh axis over which environments are spread, or None."""
    evaluate: Callable[..., Array]
    """`(state, key, num_episodes, deterministic=False, data=()) -> returns[num_episodes]`."""
    with_config: Callable[[Any], "Task"]
    """`config -> Task`: the same task with a different config."""
    make_agent: Callable[[TrainState, str], Agent] | None = None
    """`(state, name of the caller for errors) -> Agent`; None if nothing acts."""
    hparams: Any = dataclasses.field(default_factory=HParams)
    """Default hyperparameters."""
    parts: Callable[[str | None], Parts] | None = None
    """`axis -> Parts`: the parts of one update; None for tasks that `make_task` did not make."""
    passed: tuple[str, ...] = ("task",)
    """Names of the parts passed from Python, which a file cannot restore."""
    curve: str = "episode_return"
    """The metric that progress and the learning curve show."""
    progress: tuple[str, ...] = ()
    """Further metrics to show in progress lines."""
    rank: str = "episode_return"
    """The metric by which population-based training ranks members; higher is better."""
    data: PyTree = ()
    """Arrays that are not learned, differentiated or saved."""
    why_not_divided: Callable[[int], str | None] = _always_none
    """`devices -> reason` why one run cannot be spread over this number of devices, or None."""
    costs: Callable[[], tuple[float, int]] | None = None
    """Floating-point operations of the network per sample, and its number of parameters. Used to
    choose the number of CPU cores of a single run. None uses one core."""
    warning: Callable[[Any], str | None] = _always_none
    """`metrics[u, S] -> warning`, or None if there is nothing to warn about."""
    results: Callable[[Any, Any, TrainState], dict[str, Any]] | None = None
    """`(metrics[S, U], {"sampled": returns[S, E], "deterministic": ...}, states[S, ...]) -> further
    entries of summary.json`, over the seeds that have not failed."""
    samples: Callable[[TrainState], list[dict[str, Any]]] | None = None
    """`state of one seed -> rows` for `samples.jsonl` and the report: outputs of the policy, as
    text."""
    plots: Callable[[FinishedRun], Sequence[Plot]] | None = None
    """Further plots for the report, which only tasks with `samples` have."""
    update_call: HostCall | None = None
    """Python code between compiled calls that `learner.update` needs, if it does."""
    evaluation_call: HostCall | None = None
    """The same for `evaluate`."""
    explain: Callable[[TrainState, Any], str | None] | None = None
    """`(last good state of one seed, hparams) -> reason` why its next update fails, or None if it
    is not known."""

    def __reduce__(self) -> Any:
        """Pickle the call that makes the task, since its functions cannot be pickled."""
        return _of_config, (self.with_config, self.config)

    def agent(self, state: TrainState, function: str = "make_agent") -> Agent:
        """The agent of a trained state of one seed. Raises `ConfigError` if nothing acts."""
        if self.make_agent is None:
            raise ConfigError(f"{function}: {self.config.label} has no policy that acts")
        return self.make_agent(state, function)


def _of_config(with_config: Callable[[Any], Task], config: Any) -> Task:
    return with_config(config)


def make_task(config: Config, **given: Any) -> Task:
    """Make the task that a config describes, with the given parts.

        task = ppo.make_task(ppo.Config(), network=MyNet(), optimizer=lambda h: optax.lion(1e-4))
        state, metrics = jax.jit(ppo.make_train(task))(key, ppo.HParams())

    Args:
        given: parts by name. `env` is an object with gymnax 1.x's interface, `env_params` its
            parameters; for the others see `PartsAndHParams`. None uses the part
            that the config determines.

    Raises:
        ConfigError: if a part cannot work; the message has the expected and the actual shapes.
            Parts are only traced for this check, not run.
    """
    check_config(config, "make_task")
    given = _check_names(given)
    passed = tuple(name for name in NAMES if name in given)
    objective = _objective(config, given)
    config = config.with_defaults_of(objective)
    part_checks.check_objective_part(config, objective, given)
    check_objective(config, objective)
    env, policy, network = _environment(config, objective, given)
    hparams = given.get("hparams", HParams())
    optimizer = _optimizer(config, network, given, hparams)
    estimate = _advantage(config, given)

    def parts(axis: str | None = None) -> Parts:
        made = _parts(
            config, objective, env=env, policy=policy, network=network, optimizer=optimizer,
            advantage=estimate, axis=axis,
        )  # fmt: skip
        if "collect" in given:
            made = made._replace(actor=part_checks.as_actor(given["collect"], made))
        return made

    first = parts(None)
    learner = partial(_learner, parts)
    part_checks.check_update(first, learner(None), passed, hparams)
    update_call, evaluation_call = _calls(config, env, network, policy)
    return Task(
        config=config,
        learner=learner,
        evaluate=partial(_evaluate, first) if update_call is None else recorded_returns,
        make_agent=lambda state, function: agent_of(env, policy, network, state, function),
        with_config=partial(_remake, given),
        parts=parts,
        hparams=hparams,
        passed=passed,
        why_not_divided=partial(_why_not_divided, config, env, network),
        update_call=update_call,
        evaluation_call=evaluation_call,
        costs=partial(_costs, env, network),
        warning=partial(_no_episode, config, objective),
    )


def _calls(
    config: Config, env: Environment, network: Network, policy: Policy
) -> tuple[HostCall | None, HostCall | None]:
    """The calls of Python code that updates and evaluations need."""
    if env.in_python is None:
        return None, None
    return Python(config, env, network, policy).calls()


def _environment(
    config: Config, objective: Objective, given: dict[str, Any]
) -> tuple[Environment, Policy, Network]:
    """The environment, and the policy and network for its spaces, all checked."""
    env = make_environment(config, given.get("env"), given.get("env_params"))
    policy = make_policy(config, env.action_space)
    network = _network(config, env, policy, given)
    check_contract(env, policy)
    part_checks.check_in_python(objective, env, given)
    part_checks.check_alternating(config, objective, env)
    check_mask(obs_shapes(env.observation_space), policy)
    part_checks.check_critic(objective, network)
    if config.opponent == "pool":
        env = against_pool(env, network, policy, config)
    if (reason := _why_not_divided(config, env, network, 1)) is not None:
        raise ConfigError(reason)
    return env, policy, network


def _parts(
    config: Config,
    objective: Objective,
    *,
    env: Environment,
    policy: Policy,
    network: Network,
    optimizer: Optimizer,
    advantage: Advantage | None,
    axis: str | None,
) -> Parts:
    keep = objective.needs_policy_outputs or objective.needs_kl
    if env.in_python is not None:
        actor = recorded_actor(config, env, network, policy, keep_outputs=keep)
    else:
        actor = make_actor(config, env, network, policy, keep_outputs=keep, axis=axis)
    if config.opponent == "pool":
        actor = with_pool(actor, config)
    if objective.whole_episodes:
        actor = whole_episode_actor(config, objective, env, network, actor)
        space = env.observation_space
        advantage = advantage or make_episode_advantage(config, objective, policy, space, axis)
    advantage = advantage or make_advantage(config)
    if env.alternating:
        advantage = alternating(advantage)
    if math.isfinite(config.reward_clip):
        advantage = clip_rewards(advantage, config.reward_clip)
    improve = objective.step or make_improve
    return Parts(
        config, objective, env, policy, network, optimizer, actor, advantage,
        make_loss(objective, network, policy),
        improve(config, objective, network, policy, optimizer=optimizer, axis=axis), axis,
    )  # fmt: skip


def _remake(given: dict[str, Any], config: Config) -> Task:
    return make_task(config, **given)


def as_task(config: Any, function: str, **given: Any) -> Task:
    """Return the task for an entry point's first argument, a `Task` or the config of one.

    Raises:
        ConfigError: as `make_task`, or if parts are given together with a task.
    """
    given = _check_names(given)
    if isinstance(config, Task):
        given.pop("hparams", None)
        if given:
            raise ConfigError(
                f"{', '.join(given)}: {function} is given a Task, whose parts are fixed; pass them "
                "to make_task"
            )
        return config
    if not isinstance(config, TaskConfig):
        check_config(config, function)
    return task_of_config(config, **given)


def task_of_config(config: TaskConfig, **given: Any) -> Task:
    """The task that a config of any kind describes. Raises `ConfigError` as `make_task`."""
    if isinstance(config, Config):
        return make_task(config, **given)
    return config.make_task(**given)


def own_class(hparams: Any) -> Any:
    """Return `hparams` if it is of a subclass of `HParams`, so that parts are checked with it, else
    None."""
    own = isinstance(hparams, HParams) and type(hparams) is not HParams
    return hparams if own else None


def _check_names(given: dict[str, Any]) -> dict[str, Any]:
    for name in given:
        if name not in (*NAMES, "hparams"):
            raise TypeError(f"{name!r} is not a part; the parts are {', '.join(NAMES)}")
    return {name: part for name, part in given.items() if part is not None}


def _learner(parts: Callable[[str | None], Parts], axis: str | None) -> Learner:
    made = parts(axis)
    return make_learner(
        made.config,
        actor=made.actor,
        advantage=made.advantage,
        improve=made.improve,
        init_learner=partial(init_learner, made),
        axis=axis,
    )


def init_learner(parts: Parts, key: Key[Array, ""], hparams: HParams) -> LearnerState:
    """The learner's state before the first update."""
    config, objective, env = parts.config, parts.objective, parts.env
    params = jax.tree.map(jnp.asarray, parts.network.init(key))  # parameters may be constants
    return LearnerState(
        key=key,
        params=params,
        opt_state=parts.optimizer.init(hparams, params),
        obs_stats=init_obs_stats(env.observation_space) if config.normalize_obs else (),
        reward_stats=init_stats(()) if config.normalize_reward else (),
        updates=jnp.zeros((), jnp.int32),
        objective_state=() if objective.kl is None else objective.kl.init(hparams),
    )


def _evaluate(parts: Parts, state: TrainState, key: Any, num_episodes: int, **more: Any) -> Array:
    env = parts.env.evaluation or parts.env
    agent = agent_of(env, parts.policy, parts.network, state, "evaluate")
    return episode_returns(env, agent, key, num_episodes, **more)


def _objective(config: Config, given: dict[str, Any]) -> Objective:
    named, part = config.objective, given.get("objective")
    if part is None and is_reference(named):
        part = resolve("objective", named)
    if part is None:
        return objective_of(config)
    if isinstance(part, Objective):
        return part.of(config)
    if not callable(part):
        raise ConfigError(
            f"objective is of type {type(part).__name__}: must be an Objective, or a policy loss "
            "(terms, hparams) -> loss"
        )
    name = getattr(part, "__name__", "objective")
    return dataclasses.replace(objective_of(config), name=name, loss=part, needs_kl=True)


def _network(config: Config, env: Environment, policy: Policy, given: dict[str, Any]) -> Network:
    part = part_checks.one_of("network", config, given, "auto")
    if part is None:
        return make_network(config, env.observation_space, policy)
    part_checks.check_no_effect("network", config)
    _, obs = jax.eval_shape(lambda: env.reset(jax.random.split(jax.random.key(0), 1)))
    return network_of_module(part, obs, policy)


def _optimizer(
    config: Config, network: Network, given: dict[str, Any], hparams: HParams
) -> Optimizer:
    part = part_checks.one_of("optimizer", config, given, "adam")
    if part is None:
        return ADAM
    part_checks.check_optimizer(part, network, hparams)
    return Optimizer(lambda hparams, params: part(hparams), as_vector=False)


def _advantage(config: Config, given: dict[str, Any]) -> Advantage | None:
    part: Any = part_checks.one_of("advantage", config, given, "auto")
    if part is not None:
        part_checks.check_is_function("advantage", part)
    return part


def _why_not_divided(
    config: Config, env: Environment, network: Network, devices: int
) -> str | None:
    if env.in_python is not None and devices > 1:
        return f"{env.name} is stepped in Python, on one device"
    if config.opponent == "pool" and devices > 1:
        return f"devices = {devices}: opponent = pool trains each seed on one device; use 1"
    if config.num_envs % devices:
        return (
            f"num_envs = {config.num_envs} is not divisible by devices = {devices}; use a multiple"
        )
    own = config.num_envs // devices
    samples = own if network.sequential else own * config.num_steps
    if samples % config.num_minibatches and devices == 1:
        return (
            f"num_envs = {config.num_envs} (whole sequences, for a network with a memory) is not "
            f"divisible by num_minibatches = {config.num_minibatches}; use a divisor"
        )
    if samples % config.num_minibatches:
        return (
            f"each of devices = {devices} has {samples} samples (whole sequences with a memory), "
            f"not divisible by num_minibatches = {config.num_minibatches}; use fewer devices or "
            "minibatches"
        )
    return None


def _costs(env: Environment, network: Network) -> tuple[float, int]:
    """Floating-point operations of the network for one observation, by XLA's count, and its number
    of parameters."""
    rows = 64

    def arguments(key: jax.Array) -> Any:
        _, obs = env.reset(jax.random.split(key, rows))
        obs = jax.tree.map(lambda x: x[None], obs)
        start = jnp.ones((1, rows), bool)
        return network.init(key), network.initial_carry(rows), obs, start

    shapes = jax.eval_shape(arguments, jax.random.key(0))
    counted: Any = jax.jit(network.apply).lower(*shapes).cost_analysis()
    return counted["flops"] / rows, sum(x.size for x in jax.tree.leaves(shapes[0]))


def _no_episode(config: Config, objective: Objective, metrics: Any) -> str | None:
    if not objective.whole_episodes or metrics["episodes"].any():
        return None
    return (
        f"no episode finished within num_steps = {config.num_steps} in these updates, and "
        f"objective = {objective.name} learns from finished episodes only; increase num_steps, or "
        "use objective = a2c"
    )
