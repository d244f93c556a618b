"""Spreads a run over devices."""

import dataclasses
import os
from collections.abc import Callable
from contextlib import suppress
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from purejaxppo.config import ConfigError
from purejaxppo.host.configfile import Settings
from purejaxppo.task import Task
from purejaxppo.types import PyTree, TrainState

SEEDS, ENVS = "seeds", "envs"
"""The mesh axes: parallel runs, and the environments of each run."""


class Spread(NamedTuple):
    """Layout on a mesh `[SEEDS, ENVS]` of devices: runs are divided along the first axis, the
    environments of each run along the second."""

    mesh: Mesh

    @property
    def axis(self) -> str | None:
        """The mesh axis that the learner sums over; None if runs are not divided."""
        return ENVS if self.mesh.shape[ENVS] > 1 else None

    @property
    def seeds(self) -> PartitionSpec:
        """Partition of arrays `[S, ...]` with one row per run."""
        return PartitionSpec(SEEDS)

    @property
    def states(self) -> Any:
        """Partition of states `[S, ...]`: a `TrainState` of two specs."""
        # The actors of an undivided run may have leaves without an axis of environments.
        actors: Any = PartitionSpec(SEEDS) if self.axis is None else PartitionSpec(SEEDS, ENVS)
        learner: Any = PartitionSpec(SEEDS)
        return TrainState(learner, actors)

    @property
    def rows(self) -> PartitionSpec:
        """Partition of metrics `[U, S]`."""
        return PartitionSpec(None, SEEDS)

    def over(self, function: Callable[..., Any], inputs: Any, outputs: Any) -> Callable[..., Any]:
        """Map `function` over the devices, each with its part."""
        # check_vma=True would turn gradients of replicated parameters into sums over devices.
        return jax.shard_map(
            function, mesh=self.mesh, in_specs=inputs, out_specs=outputs, check_vma=False
        )

    def shapes(self, states: TrainState) -> TrainState:
        """Shapes and shardings of states."""
        return self._each(
            states, lambda x, place: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=place)
        )

    def scatter(self, states: TrainState) -> TrainState:
        """Move states from any device to their devices in this layout."""
        return self._each(states, _put)

    def gather(self, states: TrainState) -> TrainState:
        """Move states to one device of this process; with several processes, to one of each."""
        if jax.process_count() == 1:
            return jax.device_put(states, self.mesh.devices.flat[0])
        # Otherwise the exchanges of the next program would mix with these.
        whole = jax.block_until_ready(jax.jit(self.to_all)(states))
        return jax.tree.map(lambda x: x.addressable_data(0), whole)

    def to_all(self, tree: PyTree) -> PyTree:
        """Replicate to all devices if there are several processes; call under `jax.jit`."""
        if jax.process_count() == 1:
            return tree
        everywhere = NamedSharding(self.mesh, PartitionSpec())
        return jax.lax.with_sharding_constraint(tree, everywhere)

    def _each(self, states: TrainState, function: Callable[[Any, NamedSharding], Any]) -> Any:
        places = [NamedSharding(self.mesh, spec) for spec in self.states]
        return TrainState(
            *(
                jax.tree.map(lambda x, place=place: function(x, place), part)
                for part, place in zip(states, places, strict=True)
            )
        )


def _put(x: jax.Array, place: NamedSharding) -> jax.Array:
    """Move an array to a sharding, which may include devices of other processes that hold equal
    copies."""
    if x.sharding.is_equivalent_to(place, x.ndim):
        return x
    if jax.process_count() == 1:
        return jax.device_put(x, place)
    if jnp.issubdtype(x.dtype, jax.dtypes.prng_key):
        return jax.random.wrap_key_data(_put(jax.random.key_data(x), place))
    whole = np.asarray(x)
    return jax.make_array_from_callback(x.shape, place, lambda part: whole[part])


def use_all_cores() -> None:
    """Make each usable core a device of JAX's CPU platform, since a small program runs on only one
    core. Does nothing if JAX has started or the number of CPU devices is configured."""
    configured = "xla_force_host_platform_device_count" in os.environ.get("XLA_FLAGS", "")
    if configured or jax.config.jax_num_cpu_devices > 0:  # pyright: ignore[reportAttributeAccessIssue]
        return
    with suppress(RuntimeError):
        jax.config.update("jax_num_cpu_devices", _usable_cores())


def _usable_cores() -> int:
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


EXCHANGE_SECONDS = 7e-9
"""Time to sum the gradient of one parameter over CPU devices, once per minibatch."""
CORE_FLOPS = 100e9
"""Operations per second in matrix products of a small network on one CPU core."""
MIN_SPEEDUP = 1.25
"""Estimated speed-up from which a run is spread; a second busy process would cancel less."""


def with_devices(settings: Settings, task: Task) -> Settings:
    """Set the number of devices that a single run will use.

    The minibatches of a single run depend on it, so it is recorded. Those of several seeds do not,
    so their setting stays 0.

    Raises:
        ConfigError: as `choose_spread`.
    """
    alone = settings.num_runs == 1 and jax.process_count() == 1
    if alone and settings.run.devices == 0:
        run = dataclasses.replace(settings.run, devices=_best_device_count(task))
        settings = dataclasses.replace(settings, run=run)
    choose_spread(settings, task)
    return settings


def _best_device_count(task: Task) -> int:
    """The largest number of CPU cores that makes a run faster; 1 on accelerators.

    A minibatch of R samples takes 3 R F / C seconds on one device, for F operations of the network
    per sample and C = `CORE_FLOPS`, and 3 R F / (C D) + E P seconds on D devices, which exchange
    gradients of P parameters in E = `EXCHANGE_SECONDS` each.
    """
    available = len(jax.devices())
    if jax.default_backend() != "cpu" or available == 1 or task.costs is None:
        return 1
    operations, parameters = task.costs()
    samples = task.config.batch_size / getattr(task.config, "num_minibatches", 1)
    alone = 3 * samples * operations / CORE_FLOPS
    for count in range(available, 1, -1):
        gain = alone / (alone / count + EXCHANGE_SECONDS * parameters)
        if gain >= MIN_SPEEDUP and task.why_not_divided(count) is None:
            return count
    return 1


def needs_all_threads(spread: Spread) -> bool:
    """Whether no other program may run while this one trains.

    Devices that exchange data each need a thread of the pool that all programs of a process share
    on CPU. If another program occupies one for 40 seconds, XLA aborts the process.
    """
    several = len(spread.mesh.local_devices) > 1
    return jax.default_backend() == "cpu" and spread.axis is not None and several


def choose_spread(settings: Settings, task: Task) -> Spread:
    """Spread the runs over `devices` devices; 0 takes the largest number that divides the runs. If
    there are more devices than runs, the environments of each run are divided too.

    Raises:
        ConfigError: if fewer devices are available, or the runs, or environments and minibatches,
            cannot be divided evenly.
    """
    count, wanted, available = settings.num_runs, settings.run.devices, jax.devices()
    if wanted > len(available):
        cpu = available[0].platform == "cpu"
        more = f", or set JAX_NUM_CPU_DEVICES={wanted} (devices can share cores)" if cpu else ""
        raise ConfigError(
            f"devices = {wanted}: only {len(available)} available ({available[0].platform}); use "
            f"at most {len(available)}, or 0 to choose automatically{more}"
        )
    if jax.process_count() > 1:
        if wanted not in (0, len(available)):
            raise ConfigError(
                f"devices = {wanted}: several processes always use all of their devices, here "
                f"{len(available)}; leave it at 0"
            )
        wanted = len(available)
    along = max(n for n in range(1, len(available) + 1) if count % n == 0)
    each = 1
    if wanted:
        along = min(count, wanted)
        each = wanted // along
        if count % along or wanted % along:
            raise ConfigError(
                f"num_seeds = {count} cannot be divided evenly over devices = {wanted}; use a "
                "divisor or a multiple of num_seeds, or 0 to choose automatically"
            )
    if each > 1 and (reason := task.why_not_divided(each)) is not None:
        raise ConfigError(reason)
    devices = np.asarray(available[: along * each]).reshape(along, each)
    return Spread(Mesh(devices, (SEEDS, ENVS)))


def describe_devices(settings: Settings, spread: Spread) -> str:
    """Describe the devices that a run uses and how many are available."""
    used, available = spread.mesh, jax.devices()
    kind = "CPU core" if available[0].platform == "cpu" else available[0].device_kind
    alone = settings.num_runs == 1 and used.size > 1
    each = f", {used.shape[ENVS]} for each seed" if used.shape[ENVS] > 1 and not alone else ""
    plural = "s" if len(available) > 1 else ""
    return f"{used.size} of {len(available)} {kind}{plural}{each}"


def each_seed(function: Callable[[PyTree], PyTree], states: PyTree) -> PyTree:
    """Map `function` over the rows of states (or other arrays) `[S, ...]`, with results `[S, ...]`.

    On CPU, sequentially: each run then stays in a core's cache, evaluates only the branches it
    needs, and gives the same bits as alone.
    """
    if jax.default_backend() != "cpu":
        return jax.vmap(function)(states)
    if jax.tree.leaves(states)[0].shape[0] > 1:
        return jax.lax.map(function, states)
    single = function(jax.tree.map(lambda x: x[0], states))
    return jax.tree.map(lambda x: x[None], single)
