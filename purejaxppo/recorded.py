"""Rollouts and evaluations of environments that are stepped in Python.

Before each update, Python steps the environments with a compiled policy and records what happens.
The compiled update then reads the record as if it had stepped the environments itself.
"""

import warnings
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Key

from purejaxppo.agent import agent_of
from purejaxppo.between import HostCall
from purejaxppo.checks import ConfigError, HostCallError, RunWarning
from purejaxppo.collect import Stepper, draw, truncation_value
from purejaxppo.config import Config
from purejaxppo.envs.base import named_parts
from purejaxppo.evaluation import MAX_STEPS_WITHOUT_LIMIT
from purejaxppo.normalize import normalize_obs
from purejaxppo.types import (
    Actor,
    ActorState,
    Environment,
    LearnerState,
    Network,
    Policy,
    PyTree,
    Rollout,
    TimeStep,
    TrainState,
)

_EVALUATED_AT_ONCE = 32


class Record(NamedTuple):
    """T steps of N environments."""

    first: PyTree
    """Observations `[N, ...]` before the first step."""
    fresh: Bool[Array, " N"]
    """Whether the environments were reset before the first step, since they are new."""
    action: Array
    """As the policy samples them, `[T, N, ...]`."""
    result: TimeStep
    """Leaves `[T, N, ...]`."""


def recorded_actor(
    config: Config, env: Environment, network: Network, policy: Policy, *, keep_outputs: bool
) -> Actor:
    """The actor of environments that are stepped in Python. Its data are `{"told": (question,
    record)}`; without them, the rollout is empty: its mask is 0."""
    stepper = _Recorded(config, env, network, policy, keep_outputs, None)
    return Actor(stepper.init, stepper.collect)


class _Recorded(Stepper):
    def collect(
        self, learner: LearnerState, actors: ActorState, hparams: Any, data: PyTree
    ) -> tuple[ActorState, Rollout]:
        if not data:
            moved, rollout = Stepper.collect(self, learner, actors, hparams, data)
            return moved, rollout._replace(mask=jnp.zeros_like(rollout.mask))
        record: Record = data["told"][1]
        new = record.fresh
        keys, _, _ = draw(self.config, self.policy, actors.keys)
        actors = actors._replace(
            keys=keys, obs=record.first, start=actors.start | new,
            episode_return=jnp.where(new, 0.0, actors.episode_return),
            episode_length=jnp.where(new, 0, actors.episode_length),
            discounted_return=jnp.where(new, 0.0, actors.discounted_return),
        )  # fmt: skip
        return self.rollout(learner, actors, (record.action, record.result))

    def step(
        self, learner: LearnerState, actors: ActorState, draws: tuple[Array, Any]
    ) -> tuple[ActorState, Any]:
        action, result = draws
        if not isinstance(result, TimeStep):  # an empty rollout
            return Stepper.step(self, learner, actors, draws)
        carry = actors.carry
        if self.network.sequential:
            obs = jax.tree.map(lambda x: x[None], normalize_obs(learner.obs_stats, actors.obs))
            carry, _, _ = self.network.apply(learner.params, carry, obs, actors.start[None])
        if not self.config.bootstrap_time_limits:
            result = result._replace(terminated=result.terminated | result.truncated)
        cut_value = truncation_value(self.network, learner, carry, result)
        done = result.terminated | result.truncated
        moved = actors._replace(obs=result.obs, start=done, carry=carry)
        return moved, (actors.obs, action, cut_value, result)


# Calls of Python code


class Running(NamedTuple):
    """Environments between two rollouts."""

    envs: Any
    obs: PyTree
    updates: int
    """The update whose rollout comes next."""


class Question(NamedTuple):
    """What Python needs for a rollout."""

    learner: LearnerState
    actors: ActorState
    noise: Array
    """`[T, N, ...]`."""


class Python:
    """Steps environments in Python with the policy of the given parts."""

    def __init__(self, config: Config, env: Environment, network: Network, policy: Policy):
        self._config, self._env, self._network, self._policy = config, env, network, policy
        self._running: dict[int, Running] = {}
        self._choose = jax.jit(self._act)
        self._agents = jax.jit(self._evaluated)

    def calls(self) -> tuple[HostCall, HostCall]:
        """The calls that updates and evaluations need."""
        update = HostCall(self._ask, self._record, self._shape, _tell)
        evaluation = HostCall(_ask_returns, self._returns, _shape_of_returns, _tell)
        return update, evaluation

    def _ask(self, state: TrainState, hparams: Any, data: PyTree) -> Question:
        noise = draw(self._config, self._policy, state.actors.keys)[2]
        return Question(_acting(state.learner), state.actors, noise)

    def _shape(self, question: Question) -> Record:
        rows = question.noise.shape[:2]
        keys = jax.eval_shape(lambda: jax.random.split(jax.random.key(0), rows[1]))
        _, obs = jax.eval_shape(self._env.reset, keys)

        spec: Any = jax.ShapeDtypeStruct

        def over_time(x: Any) -> Any:
            return spec((rows[0], *x.shape), x.dtype)

        steps = jax.tree.map(over_time, obs)
        result = TimeStep(steps, spec(rows, jnp.float32), spec(rows, bool), spec(rows, bool), steps)
        noise = jax.tree.map(lambda x: spec(x.shape[1:], x.dtype), question.noise)
        carry, start = question.actors.carry, question.actors.start
        action = jax.eval_shape(self._act, question.learner, obs, carry, start, noise)[0]
        return Record(obs, spec(rows[1:], bool), over_time(action), result)

    def _act(
        self, learner: LearnerState, obs: PyTree, carry: PyTree, start: Array, noise: Array
    ) -> tuple[Array, Array, PyTree]:
        """The policy's actions, those of the environment, and the carry."""
        inputs = jax.tree.map(lambda x: x[None], normalize_obs(learner.obs_stats, obs))
        carry, policy_outputs, _ = self._network.apply(learner.params, carry, inputs, start[None])
        action = self._policy.sample(policy_outputs[0], noise)
        return action, self._policy.to_env(action), carry

    def _record(self, question: Question) -> Record:
        """Step the environments for one rollout."""
        learner, actors = question.learner, question.actors
        ids = np.asarray(actors.env_state)
        updates, running = int(learner.updates), self._running.get(int(ids[0]))
        fresh = running is None or not updates or running.updates != updates
        if fresh:
            if updates:
                warnings.warn(
                    f"{self._env.name}: the state of environments in Python is not saved, so their "
                    "episodes start again",
                    RunWarning,
                    stacklevel=2,
                )
            running = self._begin(ids)
        assert running is not None
        obs, carry = running.obs, actors.carry
        start = np.full(len(ids), fresh) | np.asarray(actors.start)
        first, rows, noise = obs, [], np.asarray(question.noise)
        for t in range(len(noise)):
            action, sent, carry = self._choose(learner, obs, carry, start, noise[t])
            result = self._step(running.envs, np.asarray(sent))
            rows.append((np.asarray(action), result))
            obs, start = result.obs, result.terminated | result.truncated
        self._running[int(ids[0])] = Running(running.envs, obs, updates + 1)
        actions, results = jax.tree.map(lambda *x: np.stack(x), *rows)
        return Record(first, jnp.full(len(ids), fresh), actions, results)

    def _begin(self, ids: np.ndarray) -> Running:
        old = self._running.pop(int(ids[0]), None)
        if old is not None:
            old.envs.close()
        envs = self._make(len(ids))
        obs, _ = envs.reset(seed=int(ids[0]) % 2**31)
        return Running(envs, typed(obs), 0)

    def _make(self, count: int) -> Any:
        assert self._env.in_python is not None
        return self._env.in_python(count)

    def _step(self, envs: Any, action: np.ndarray) -> TimeStep:
        try:
            obs, reward, terminated, truncated, info = envs.step(action)
        except Exception as error:
            raise HostCallError(
                f"{self._env.name}: step failed: {type(error).__name__}: {error}"
            ) from error
        obs = typed(obs)
        final = jax.tree.map(np.copy, obs)
        for n in map(int, np.flatnonzero(terminated | truncated)):
            _write_row(final, n, named_parts(_row(info["final_obs"], n)))
        return TimeStep(obs, reward.astype(np.float32), terminated, truncated, final)

    # Evaluations

    def _evaluated(
        self, learner: LearnerState, rows: tuple[PyTree, PyTree, Array], key: Any, mode: Array
    ) -> tuple[Array, PyTree]:
        """Actions for rows `(obs, carry, start)`; the most likely ones if `mode`."""
        state: Any = TrainState(learner, ())
        agent = agent_of(self._env, self._policy, self._network, state, "evaluate")
        obs, carry, start = rows
        return agent.act(key, obs, carry, mode, start)

    def _returns(self, question: Any) -> np.ndarray:
        """The returns of episodes, NaN for those that do not end."""
        learner, key, deterministic, zeros = question
        count = len(zeros)
        rows = min(count, _EVALUATED_AT_ONCE)
        envs = self._make(rows)
        key = jax.random.wrap_key_data(key)
        obs, _ = envs.reset(seed=int(jax.random.randint(key, (), 0, 2**31 - 1)))
        wanted = np.array([len(range(n, count, rows)) for n in range(rows)])
        found: list[list[float]] = [[] for _ in range(rows)]
        total, start = np.zeros(rows), np.ones(rows, bool)
        carry = self._network.initial_carry(rows)
        limit = (self._env.max_episode_steps or MAX_STEPS_WITHOUT_LIMIT) * int(wanted.max())
        obs = typed(obs)
        for t in range(limit):
            step_key = jax.random.fold_in(key, t)
            action, carry = self._agents(learner, (obs, carry, start), step_key, deterministic)
            result = self._step(envs, np.asarray(action))
            total, obs = total + result.reward, result.obs
            start = result.terminated | result.truncated
            for n in np.flatnonzero(start):
                found[n].append(total[n])
                total[n] = 0.0
            if all(len(x) >= n for x, n in zip(found, wanted, strict=True)):
                break
        envs.close()
        padded = [(x + [np.nan] * n)[:n] for x, n in zip(found, wanted, strict=True)]
        return np.array([x for row in padded for x in row], np.float32)


def recorded_returns(state: TrainState, key: Any, num_episodes: int, **more: Any) -> Array:
    """The returns that Python has found."""
    if not more.get("data"):
        raise ConfigError(
            "evaluate: this environment is stepped in Python, so its evaluation cannot be "
            "compiled; use `purejaxppo eval`, the evaluations of `ppo.run`, or `ppo.make_agent` in "
            "your own loop"
        )
    return more["data"]["told"][1]


def _ask_returns(
    state: TrainState, key: Key[Array, ""], num_episodes: int, deterministic: Any, data: PyTree
) -> Any:
    zeros = jnp.zeros(num_episodes, jnp.float32)
    return _acting(state.learner), jax.random.key_data(key), deterministic, zeros


def _shape_of_returns(question: Any) -> Any:
    return question[3]


def _acting(learner: LearnerState) -> LearnerState:
    """What acting needs."""
    return learner._replace(opt_state=())


def _tell(data: PyTree, question: PyTree, answer: PyTree) -> PyTree:
    return {"told": (question, answer)}


def typed(obs: PyTree) -> PyTree:
    """A copy of observations as `dict`s of arrays, in the types that JAX uses."""
    return jax.tree.map(
        lambda x: np.array(x, jax.dtypes.canonicalize_dtype(x.dtype)), named_parts(obs)
    )


def _row(final: Any, n: int) -> Any:
    """Row n of Gymnasium's `final_obs`: an array of objects, or a dictionary of them."""
    if isinstance(final, dict):
        return {name: _row(x, n) for name, x in final.items() if not name.startswith("_")}
    return final[n]


def _write_row(to: PyTree, n: int, row: PyTree) -> None:
    if isinstance(to, dict):
        for name, x in to.items():
            _write_row(x, n, row[name])
    else:
        to[n] = row
