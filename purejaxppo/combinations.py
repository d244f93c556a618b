"""Checks of settings that cannot be combined."""

import dataclasses
import math
from typing import Any

from purejaxppo.checks import ConfigError, is_reference
from purejaxppo.objectives.table import READ_BY_SOME, check_objective, objective_of, readers_of


def check_combinations(config: Any) -> None:
    """Raise `ConfigError` if the settings of a `Config` contradict each other."""
    _check_read(config)
    _check_sizes(config)
    _check_minibatches(config)
    check_objective(config, objective_of(config))


def _check_read(config: Any) -> None:
    """Reject a setting that the objective does not read, unless it has its default."""
    if is_reference(config.objective):
        return
    reads = objective_of(config).reads
    for f in dataclasses.fields(config):
        value = getattr(config, f.name)
        if f.name in READ_BY_SOME and f.name not in reads and value != f.default:
            text = str(value).lower() if isinstance(value, bool) else value
            raise ConfigError(
                f"{f.name} = {text}: has no effect with objective = {config.objective}; leave it "
                f"out, or choose objective = {' or '.join(readers_of(f.name))}"
            )


def _check_sizes(config: Any) -> None:
    """Reject sizes that overflow the 32-bit counters of samples per batch and updates per run."""
    if config.batch_size >= 2**31:
        raise ConfigError(
            f"num_envs * num_steps = {config.num_envs} * {config.num_steps} = "
            f"{config.batch_size}: must be below 2^31; reduce num_envs or num_steps"
        )
    if config.num_updates >= 2**31:
        raise ConfigError(
            f"total_timesteps / (num_envs * num_steps) = {config.total_timesteps} / "
            f"{config.batch_size} = {config.num_updates} updates: must be below 2^31; choose a "
            "smaller total_timesteps, or larger num_envs or num_steps"
        )


def _check_standardized(config: Any) -> None:
    """Reject normalisation of advantages over a single sample: the result is always 0."""
    if config.advantage_normalization == "none":
        return
    if config.batch_size == 1:
        raise ConfigError(
            f"advantage_normalization = {config.advantage_normalization} with num_envs * num_steps "
            "= 1: the normalised advantage of a single sample is always 0; use none, or larger "
            "num_envs or num_steps"
        )
    per_minibatch = config.advantage_normalization == "minibatch"
    per_minibatch = per_minibatch and objective_of(config).step is None
    if per_minibatch and config.batch_size == config.num_minibatches:
        raise ConfigError(
            f"num_minibatches = {config.num_minibatches} leaves one sample in each, whose "
            "normalised advantage is always 0; use fewer, or advantage_normalization = batch or "
            "none"
        )


def _check_minibatches(config: Any) -> None:
    if config.memory == "none":
        size, formula = config.batch_size, "num_envs * num_steps"
        values = f"{config.num_envs} * {config.num_steps} = {size}"
    else:
        size, formula = config.num_envs, f"num_envs (whole sequences, for memory = {config.memory})"
        values = f"{size}"
    _check_standardized(config)
    if size % config.num_minibatches == 0:
        return
    small = [d for d in range(1, math.isqrt(size) + 1) if size % d == 0]
    divisors = sorted({*small, *(size // d for d in small)})
    near = sorted(sorted(divisors, key=lambda d: abs(d - config.num_minibatches))[:5])
    raise ConfigError(
        f"{formula} = {values} is not divisible by num_minibatches = {config.num_minibatches}; "
        f"choose num_minibatches from {', '.join(map(str, near))}"
    )
