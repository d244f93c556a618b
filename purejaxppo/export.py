"""A policy as a file, for programs that have jax but not this package."""

from typing import Any

import jax
import jax.numpy as jnp
from jax import export

from purejaxppo.agent import agent_in
from purejaxppo.config import Config
from purejaxppo.envs import make_environment
from purejaxppo.inputs import check_config
from purejaxppo.types import TrainState

PLATFORMS = ("cpu", "cuda", "rocm", "tpu")


def export_policy(
    config: Config,
    state: TrainState,
    *,
    sample: bool = False,
    env: Any = None,
    env_params: Any = None,
) -> export.Exported:
    """The policy, its normaliser included, as StableHLO for CPU, CUDA, ROCm and TPU.

    `exported.serialize()` are bytes that `jax.export.deserialize` takes back; `.call` is then

        obs[n, ...] -> action[n, ...]
        (obs[n, ...], carry, start[n]) -> (action[n, ...], carry)    with a memory

    for any n. A first carry is all zeros; where `start` is set a row's carry is reset. jax reads
    such files for at least six months of its own versions after the one that wrote them.

    Args:
        state: of one seed.
        sample: sample actions instead of taking the policy's mode; the first argument is then a
            key, `uint32[2]` as `jax.random.PRNGKey` or `jax.random.key_data` gives it.
        env: the object passed to training in place of a name, if one was.
        env_params: its parameters; None takes its defaults.

    Raises:
        ConfigError: if the environment does not exist, its spaces do not fit the config, or the
            state is of several seeds.
    """
    check_config(config, "export_policy")
    environment = make_environment(config, env, env_params)
    agent = agent_in(environment, config, state, "export_policy")

    def act(key: jax.Array, obs: jax.Array, carry: Any, start: jax.Array | None) -> Any:
        key = jax.random.wrap_key_data(key)
        return agent.act(key, obs, carry, deterministic=not sample, start=start)

    def policy(*arguments: Any) -> Any:
        key, rest = (arguments[0], arguments[1:]) if sample else (jnp.zeros(2, "uint32"), arguments)
        if config.memory == "none":
            return act(key, rest[0], (), None)[0]
        return act(key, *rest)

    (n,) = export.symbolic_shape("n")
    keys = jax.eval_shape(lambda: jax.random.split(jax.random.key(0), 1))
    one = jax.eval_shape(environment.reset, keys)[1]

    def rows(x: Any) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct((n, *x.shape[1:]), x.dtype)

    arguments = [jax.ShapeDtypeStruct((2,), jnp.uint32)] if sample else []
    arguments.append(rows(one))
    if config.memory != "none":
        arguments.append(jax.tree.map(rows, jax.eval_shape(lambda: agent.initial_carry(1))))
        arguments.append(jax.ShapeDtypeStruct((n,), jnp.bool_))
    return export.export(jax.jit(policy), platforms=PLATFORMS)(*arguments)
