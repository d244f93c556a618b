"""Export of a policy to a file, for programs that have JAX but not this package."""

from typing import Any, Unpack

import jax
import jax.numpy as jnp
from jax import export

from purejaxppo.config import TaskConfig
from purejaxppo.task import PartsAndHParams, Task, as_task
from purejaxppo.types import TrainState

PLATFORMS = ("cpu", "cuda", "rocm", "tpu")


def export_policy(
    config: TaskConfig | Task,
    state: TrainState,
    *,
    sample: bool = False,
    env: Any = None,
    env_params: Any = None,
    **parts: Unpack[PartsAndHParams],
) -> export.Exported:
    """Export the policy, including its normaliser, as StableHLO for CPU, CUDA, ROCm and TPU.

    `exported.serialize()` returns bytes that `jax.export.deserialize` reads; `.call` is then

        obs[n, ...] -> action[n, ...]
        (obs[n, ...], carry, start[n]) -> (action[n, ...], carry)    with a memory

    for any n. The initial carry is all zeros; where `start` is set, the row's carry is reset. JAX
    versions of at least the next six months can read such a file.

    Args:
        state: of one seed.
        sample: sample actions instead of taking the policy's mode; the first argument is then a
            key, `uint32[2]` as `jax.random.PRNGKey` or `jax.random.key_data` gives it.
        env: the environment passed to training, if one was.
        env_params: its parameters, if they were passed.
        **parts: other parts passed to training.

    Raises:
        ConfigError: as `make_agent`.
    """
    task = as_task(config, "export_policy", env=env, env_params=env_params, **parts)
    agent = task.agent(state, "export_policy")
    first_carry = jax.eval_shape(lambda: agent.initial_carry(1))
    has_carry = bool(jax.tree.leaves(first_carry))

    def act(key: jax.Array, obs: Any, carry: Any, start: jax.Array | None) -> Any:
        key = jax.random.wrap_key_data(key)
        return agent.act(key, obs, carry, deterministic=not sample, start=start)

    def policy(*arguments: Any) -> Any:
        key, rest = (arguments[0], arguments[1:]) if sample else (jnp.zeros(2, "uint32"), arguments)
        return act(key, *rest) if has_carry else act(key, rest[0], (), None)[0]

    (n,) = export.symbolic_shape("n")

    def rows(x: Any) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct((n, *x.shape[1:]), x.dtype)

    arguments: list[Any] = [jax.ShapeDtypeStruct((2,), jnp.uint32)] if sample else []
    arguments.append(jax.tree.map(rows, agent.obs))
    if has_carry:
        arguments.append(jax.tree.map(rows, first_carry))
        arguments.append(jax.ShapeDtypeStruct((n,), jnp.bool_))
    return export.export(jax.jit(policy), platforms=PLATFORMS)(*arguments)
