"""Over which devices a run is spread, and how."""

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
"""The mesh axes: trainings side by side, and the environments of each."""


class Spread(NamedTuple):
    """How a run lies on a mesh `[SEEDS, ENVS]` of devices: trainings are dealt out along the first
    axis, and of each its environments along the second."""

    mesh: Mesh

    @property
    def axis(self) -> str | None:
        """The mesh axis that the learner's sums go over; None where trainings are whole."""
        return ENVS if self.mesh.shape[ENVS] > 1 else None

    @property
    def seeds(self) -> PartitionSpec:
        """Of what there is one of for each training, `[S, ...]`."""
        return PartitionSpec(SEEDS)

    @property
    def states(self) -> Any:
        """Of states `[S, ...]`: a `TrainState` of two specs."""
        # An undivided run's actors may have leaves without an axis of environments.
        actors: Any = PartitionSpec(SEEDS) if self.axis is None else PartitionSpec(SEEDS, ENVS)
        learner: Any = PartitionSpec(SEEDS)
        return TrainState(learner, actors)

    @property
    def rows(self) -> PartitionSpec:
        """Of metrics `[U, S]`."""
        return PartitionSpec(None, SEEDS)

    def over(self, function: Callable[..., Any], inputs: Any, outputs: Any) -> Callable[..., Any]:
        """`function` run by each device on its part."""
        # With check_vma=True, gradients of replicated parameters come out as sums over devices.
        return jax.shard_map(
            function, mesh=self.mesh, in_specs=inputs, out_specs=outputs, check_vma=False
        )

    def shapes(self, states: TrainState) -> TrainState:
        """Shapes of states with where they lie."""
        return self._each(
            states, lambda x, place: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=place)
        )

    def scatter(self, states: TrainState) -> TrainState:
        """States from anywhere to where they belong."""
        return self._each(states, _put)

    def gather(self, states: TrainState) -> TrainState:
        """States to a device of this process; with several processes, to one of each."""
        if jax.process_count() == 1:
            return jax.device_put(states, self.mesh.devices.flat[0])
        # Or the exchanges of what runs next would mix with these.
        whole = jax.block_until_ready(jax.jit(self.to_all)(states))
        return jax.tree.map(lambda x: x.addressable_data(0), whole)

    def to_all(self, tree: PyTree) -> PyTree:
        """Under `jax.jit`: whole to every device, where they are of several processes."""
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
    """To a place that may lie partly in other processes, which have the same numbers."""
    if x.sharding.is_equivalent_to(place, x.ndim):
        return x
    if jax.process_count() == 1:
        return jax.device_put(x, place)
    if jnp.issubdtype(x.dtype, jax.dtypes.prng_key):
        return jax.random.wrap_key_data(_put(jax.random.key_data(x), place))
    whole = np.asarray(x)
    return jax.make_array_from_callback(x.shape, place, lambda part: whole[part])


def use_all_cores() -> None:
    """Make each core that this process may use a device of JAX's CPU platform, since a small
    program runs on one core alone; unless JAX has started, or was told how many to make."""
    told = "xla_force_host_platform_device_count" in os.environ.get("XLA_FLAGS", "")
    if told or jax.config.jax_num_cpu_devices > 0:  # pyright: ignore[reportAttributeAccessIssue]
        return
    with suppress(RuntimeError):
        jax.config.update("jax_num_cpu_devices", _usable_cores())


def _usable_cores() -> int:
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


EXCHANGE_SECONDS = 7e-9
"""What adding up one parameter's gradient over CPU devices takes, once per minibatch."""
CORE_FLOPS = 100e9
"""Operations per second of the products of a small network on one CPU core."""
LEAST_GAIN = 1.25
"""Estimated speed-up from which a run is spread; another busy process would undo a smaller one."""


def with_devices(settings: Settings, task: Task) -> Settings:
    """The settings with the number of devices that a single run will use.

    The minibatches of a single run depend on it, so it is recorded. Several seeds do not, and
    keep 0.

    Raises:
        ConfigError: as `choose_spread`.
    """
    alone = settings.num_trainings == 1 and jax.process_count() == 1
    if alone and settings.run.devices == 0:
        run = dataclasses.replace(settings.run, devices=_devices_that_pay(task))
        settings = dataclasses.replace(settings, run=run)
    choose_spread(settings, task)
    return settings


def _devices_that_pay(task: Task) -> int:
    """The most CPU cores over which spreading a run's environments makes it faster; 1 on
    accelerators.

    A minibatch of R samples takes 3 R F / C seconds on one device, for F operations of the network
    per sample, and 3 R F / (C D) + E P on D devices, which exchange gradients of P parameters.
    """
    available = len(jax.devices())
    if jax.default_backend() != "cpu" or available == 1 or task.costs is None:
        return 1
    operations, parameters = task.costs()
    samples = task.config.batch_size / getattr(task.config, "num_minibatches", 1)
    alone = 3 * samples * operations / CORE_FLOPS
    for count in range(available, 1, -1):
        gain = alone / (alone / count + EXCHANGE_SECONDS * parameters)
        if gain >= LEAST_GAIN and task.why_not_divided(count) is None:
            return count
    return 1


def needs_all_threads(spread: Spread) -> bool:
    """Whether no other program may run while this one trains.

    Devices that wait for each other each need a thread of the pool that all programs of the process
    share on CPU. If another program occupies one for 40 seconds, XLA aborts the process.
    """
    several = len(spread.mesh.local_devices) > 1
    return jax.default_backend() == "cpu" and spread.axis is not None and several


def choose_spread(settings: Settings, task: Task) -> Spread:
    """Several trainings over as many devices as divide them, or over `devices`; where there are
    more of those than trainings, the environments of each over its part of them.

    Raises:
        ConfigError: if there are fewer devices than asked for, or the trainings, or environments
            and minibatches, cannot be dealt out evenly.
    """
    count, wanted, available = settings.num_trainings, settings.run.devices, jax.devices()
    if wanted > len(available):
        cpu = available[0].platform == "cpu"
        more = f", or set JAX_NUM_CPU_DEVICES={wanted} (devices can share cores)" if cpu else ""
        raise ConfigError(
            f"devices = {wanted}: there are {len(available)} ({available[0].platform}); ask for "
            f"at most as many, or for 0, which takes what fits{more}"
        )
    if jax.process_count() > 1:
        if wanted not in (0, len(available)):
            raise ConfigError(
                f"devices = {wanted}: several processes share a training on all of their devices, "
                f"which are {len(available)}; leave it at 0"
            )
        wanted = len(available)
    along = max(n for n in range(1, len(available) + 1) if count % n == 0)
    each = 1
    if wanted:
        along = min(count, wanted)
        each = wanted // along
        if count % along or wanted % along:
            raise ConfigError(
                f"num_seeds = {count} cannot be dealt out evenly to devices = {wanted}; choose a "
                "divisor or a multiple, or 0, which takes as many devices as divide the seeds"
            )
    if each > 1 and (reason := task.why_not_divided(each)) is not None:
        raise ConfigError(reason)
    devices = np.asarray(available[: along * each]).reshape(along, each)
    return Spread(Mesh(devices, (SEEDS, ENVS)))


def describe_devices(settings: Settings, spread: Spread) -> str:
    """Which devices a run uses, of how many."""
    used, available = spread.mesh, jax.devices()
    kind = "CPU core" if available[0].platform == "cpu" else available[0].device_kind
    alone = settings.num_trainings == 1 and used.size > 1
    each = f", {used.shape[ENVS]} for each seed" if used.shape[ENVS] > 1 and not alone else ""
    plural = "s" if len(available) > 1 else ""
    return f"{used.size} of {len(available)} {kind}{plural}{each}"


def each_seed(function: Callable[[PyTree], PyTree], states: PyTree) -> PyTree:
    """`function` of each of the states `[S, ...]` (or of whatever there is one of for each
    training), its results `[S, ...]` too.

    On CPU one after the other: each then stays in a core's cache, computes what is conditional
    only where it is needed, and comes out as it would alone.
    """
    if jax.default_backend() != "cpu":
        return jax.vmap(function)(states)
    if jax.tree.leaves(states)[0].shape[0] > 1:
        return jax.lax.map(function, states)
    single = function(jax.tree.map(lambda x: x[0], states))
    return jax.tree.map(lambda x: x[None], single)
