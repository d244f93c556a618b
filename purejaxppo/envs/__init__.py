"""Environments: the `Environment` interface and the adapters to it."""

from purejaxppo.envs.base import MultiDiscrete
from purejaxppo.envs.registry import available_environments, make_environment

__all__ = ["MultiDiscrete", "available_environments", "make_environment"]
