"""Checks shapes and types of annotated functions in most numerical modules during tests."""

import gc
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jax
import pytest
from jaxtyping import install_import_hook

CHECKED = (
    "advantages agent collect collectives distributions entry envs evaluation improve learner "
    "losses metrics normalize objectives optimizer shuffle train host.plots host.stats"
)
install_import_hook([f"purejaxppo.{name}" for name in CHECKED.split()], "beartype.beartype")

# Compiling takes most of the tests' time. The lowest optimisation level, one code module and the
# older loop fusion cut it to a fifth. Processes that tests start inherit these flags.
LEVEL = (
    "--xla_backend_optimization_level=0 --xla_cpu_use_fusion_emitters=false "
    "--xla_cpu_parallel_codegen_split_count=1"
)
os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} {LEVEL}".strip()

# Simulated devices, over which several seeds are spread by default.
jax.config.update("jax_num_cpu_devices", 4)

# Compiled programs are kept between test runs here, not in the user's cache folder.
jax.config.update("jax_compilation_cache_dir", str(Path(".pytest_cache/xla").absolute()))
jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.1)

# Tracing creates millions of long-lived objects; with the default thresholds, collecting garbage
# takes 5% of the time.
gc.set_threshold(100_000, 20, 50)

from commands import fusing  # noqa: E402

import purejaxppo as ppo  # noqa: E402  (after the hook, or nothing would be checked)


@pytest.fixture
def fused() -> Iterator[Callable[..., Any]]:
    """See `commands.fusing`."""
    with fusing() as call:
        yield call


@pytest.fixture
def key() -> jax.Array:
    return jax.random.key(0)


@pytest.fixture
def tiny() -> ppo.Config:
    """The smallest config that has several of everything."""
    return ppo.Config(
        total_timesteps=96,
        num_envs=4,
        num_steps=8,
        update_epochs=2,
        num_minibatches=2,
        hidden_sizes=(8,),
        memory_size=8,
    )


@pytest.fixture
def one_cache(monkeypatch: pytest.MonkeyPatch) -> None:
    """Processes that a test starts use the compilation cache of this process."""
    monkeypatch.setenv("JAX_COMPILATION_CACHE_DIR", str(Path(".pytest_cache/xla").absolute()))
    monkeypatch.setenv("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0.1")
