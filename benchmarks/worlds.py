"""Compare the speed of environments and of training on them with the suites' own programs.

    python benchmarks/worlds.py [--only PREFIX] [--training | --table-only]

Random steps are compared with the suite's own auto-reset; with `--training`, whole updates with
Brax's PPO, with the same settings. The programs are timed in turn, several times. Results go
to `benchmarks/results/worlds.json`, and tables into the documentation.
"""

import argparse
import functools
import json
import os
import platform
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from tables import write_table

import purejaxppo as ppo
from purejaxppo.envs.registry import make_environment
from purejaxppo.host.configfile import RunSettings, Settings
from purejaxppo.host.parallel import use_all_cores, with_devices
from purejaxppo.host.program import compile_program, stacked_hparams

RESULTS = Path(__file__).parent / "results/worlds.json"
ENVIRONMENTS = (
    "brax/spring/inverted_pendulum", "craftax/Craftax-Classic-Symbolic-v1",
    "jumanji/Maze-v0", "jumanji/Snake-v1",
    "navix/Navix-DoorKey-8x8-v0", "navix/Navix-Dynamic-Obstacles-8x8-v0", "pgx/minatar-breakout",
    "xminigrid/MiniGrid-DoorKey-8x8",
)  # fmt: skip
NUM_ENVS, STEPS, ROUNDS = 64, 200, 5
WARMED_UP = 1000
"""Steps before the measurement, so that episodes do not end at the same time."""

Reset = Callable[[jax.Array], Any]
Step = Callable[[jax.Array, Any, jax.Array], Any]


def ours(env_id: str) -> tuple[Reset, Step]:
    env = make_environment(ppo.Config(env_id=env_id))
    return lambda keys: env.reset(keys)[0], lambda keys, state, action: env.step(
        keys, state, action
    )[0]


def theirs(env_id: str) -> tuple[Reset, Step]:
    """The suite's environment with its own auto-reset."""
    prefix, _, name = env_id.partition("/")
    return SUITES[prefix](name)


def _brax(name: str) -> tuple[Reset, Step]:
    from brax import envs

    backend, _, name = name.partition("/")
    env = envs.create(name, backend=backend)  # without batch_size, so that it is mapped below
    return jax.vmap(env.reset), jax.vmap(lambda key, state, action: env.step(state, action))


def _craftax(name: str) -> tuple[Reset, Step]:
    from craftax.craftax_env import make_craftax_env_from_name

    env: Any = make_craftax_env_from_name(name, auto_reset=True)
    params = env.default_params
    return (
        jax.vmap(lambda key: env.reset(key, params)[1]),
        jax.vmap(lambda key, state, action: env.step(key, state, action, params)[1]),
    )


def _jumanji(name: str) -> tuple[Reset, Step]:
    from jumanji import registration
    from jumanji.wrappers import AutoResetWrapper

    env = AutoResetWrapper(registration.make(name))
    return (
        jax.vmap(lambda key: env.reset(key)[0]),
        jax.vmap(lambda key, state, action: env.step(state, action)[0]),
    )


def _navix(name: str) -> tuple[Reset, Step]:
    import navix

    env = navix.make(name)
    return jax.vmap(env.reset), jax.vmap(lambda key, state, action: env.step(state, action))


def _pgx(name: str) -> tuple[Reset, Step]:
    import pgx
    from pgx.experimental import auto_reset

    env: Any = pgx.make(name)  # pyright: ignore[reportArgumentType]
    step = auto_reset(env.step, env.init)
    return jax.vmap(env.init), jax.vmap(lambda key, state, action: step(state, action, key))


def _xminigrid(name: str) -> tuple[Reset, Step]:
    from xminigrid import registration
    from xminigrid.wrappers import GymAutoResetWrapper

    made: Any = registration.make(name)
    env, params = GymAutoResetWrapper(made[0]), made[1]
    return (
        jax.vmap(lambda key: env.reset(params, key)),
        jax.vmap(lambda key, state, action: env.step(params, state, action)),
    )


SUITES: dict[str, Callable[[str], tuple[Reset, Step]]] = {
    "brax": _brax, "craftax": _craftax, "jumanji": _jumanji, "navix": _navix, "pgx": _pgx,
    "xminigrid": _xminigrid,
}  # fmt: skip


def program(made: tuple[Reset, Step], sample: Any) -> tuple[Any, Any]:
    """The first states, and a compiled program of `STEPS` random steps: `(state, key) -> state`."""
    reset, step = made

    def body(state: Any, key: jax.Array) -> Any:
        act, move = jax.random.split(key)
        action = jax.vmap(sample)(jax.random.split(act, NUM_ENVS))
        new = step(jax.random.split(move, NUM_ENVS), state, action)
        return jax.tree.map(_as, new, state), None

    def run(state: Any, key: jax.Array) -> Any:
        return jax.lax.scan(body, state, jax.random.split(key, STEPS))[0]

    state = jax.jit(reset)(jax.random.split(jax.random.key(1), NUM_ENVS))
    state = jax.tree.map(_strong, state)
    return state, jax.jit(run)


def _strong(x: Any) -> Any:
    is_key = jnp.issubdtype(x.dtype, jax.dtypes.prng_key)
    return x if is_key else jax.lax.convert_element_type(x, x.dtype)


def _as(new: Any, old: Any) -> Any:
    return new if jnp.issubdtype(old.dtype, jax.dtypes.prng_key) else jnp.asarray(new, old.dtype)


def measure(env_id: str) -> dict[str, Any]:
    """Steps per second of both, the median of rounds in turn, and the median ratio."""
    space = make_environment(ppo.Config(env_id=env_id)).action_space
    runs = {"ours": program(ours(env_id), space.sample),
            "suite": program(theirs(env_id), space.sample)}  # fmt: skip
    states: dict[str, Any] = {}
    for name, (first, run) in runs.items():
        states[name] = first
        for i in range(WARMED_UP // STEPS):
            states[name] = jax.block_until_ready(run(states[name], jax.random.key(i)))
    seconds: dict[str, list[float]] = {name: [] for name in runs}
    for i in range(ROUNDS):
        for name, (_, run) in runs.items():
            began = time.perf_counter()
            states[name] = jax.block_until_ready(run(states[name], jax.random.key(100 + i)))
            seconds[name].append(time.perf_counter() - began)
    rate = {name: NUM_ENVS * STEPS / float(np.median(x)) for name, x in seconds.items()}
    ratios = np.array(seconds["suite"]) / np.array(seconds["ours"])
    return rate | {"ratio": float(np.median(ratios)), "lowest": float(ratios.min()),
                   "highest": float(ratios.max())}  # fmt: skip


TRAINED = ("brax/spring/inverted_pendulum", "brax/spring/halfcheetah")
UNROLL, EPOCHS, MINIBATCHES, UPDATES = 64, 4, 8, 10


def train(env_id: str) -> dict[str, Any]:
    """Steps per second of training: ours on one device and on those that `run` chooses, and
    Brax's on one, which is its default on a CPU. Rounds of `UPDATES` updates in turn, after two
    that are not counted, since Brax compiles in both."""
    from brax import envs
    from brax.training.agents.ppo import networks
    from brax.training.agents.ppo import train as brax_ppo

    steps = UPDATES * NUM_ENVS * UNROLL
    seconds: dict[str, list[float]] = {"ours": [], "default": [], "suite": []}
    once, default = our_training(env_id, 1), our_training(env_id, 0)

    def in_turn(done: int, metrics: Any) -> None:
        del metrics
        now = time.perf_counter()
        seconds["suite"].append(now - began[0])
        seconds["ours"].append(once())
        seconds["default"].append(default())
        began[0] = time.perf_counter()

    _, backend, name = env_id.split("/")
    layers = (64, 64)
    # Brax 0.14.2 calls this function, which JAX 0.10 no longer has; here with one device.
    jax.device_put_replicated = lambda tree, devices: jax.tree.map(
        lambda x: jnp.asarray(x)[None], tree
    )
    network = functools.partial(
        networks.make_ppo_networks, policy_hidden_layer_sizes=layers,
        value_hidden_layer_sizes=layers, activation=jnp.tanh,
    )  # fmt: skip
    began = [time.perf_counter()]
    brax_ppo.train(
        envs.get_environment(name, backend=backend), steps * (ROUNDS + 2), episode_length=1000,
        num_envs=NUM_ENVS, unroll_length=UNROLL, batch_size=NUM_ENVS // MINIBATCHES,
        num_minibatches=MINIBATCHES, num_updates_per_batch=EPOCHS, normalize_observations=True,
        max_grad_norm=0.5, learning_rate=3e-4, discounting=0.99, network_factory=network,
        num_evals=ROUNDS + 3, run_evals=False, progress_fn=in_turn, max_devices_per_host=1,
    )  # fmt: skip
    timed = {key: np.array(x[-ROUNDS:]) for key, x in seconds.items()}
    rates = {key: steps / float(np.median(x)) for key, x in timed.items()}
    return (
        rates
        | {"processor": processor()}
        | {f"{key}_ratio": _spread(timed["suite"] / timed[key]) for key in ("ours", "default")}
    )


def _spread(ratios: np.ndarray) -> list[float]:
    """The median, the lowest and the highest."""
    return [float(f(ratios)) for f in (np.median, np.min, np.max)]


def our_training(env_id: str, devices: int) -> Callable[[], float]:
    """A function that trains for `UPDATES` updates and returns its seconds; with 0 devices, on as
    many as `run` chooses."""
    config = ppo.Config(
        env_id, num_envs=NUM_ENVS, num_steps=UNROLL, num_minibatches=MINIBATCHES,
        update_epochs=EPOCHS, normalize_obs=True, lr_schedule="constant",
        action_distribution="tanh_normal",
    )  # fmt: skip
    task, run = ppo.make_task(config), RunSettings(devices=devices)
    settings = with_devices(Settings(config, ppo.HParams(learning_rate=3e-4), run), task)
    program, hparams = compile_program(settings, task), stacked_hparams(settings)
    states = [program.begin(hparams)]

    def once() -> float:
        began = time.perf_counter()
        states[0] = jax.block_until_ready(program.chunk(states[0], hparams, UPDATES)[0])
        return time.perf_counter() - began

    once()
    return once


def training_table(results: dict[str, Any]) -> str:
    lines = [
        "| environment | Brax's PPO, steps/s | ours, one device | ratio | ours, default | ratio |",
        "|---|---|---|---|---|---|",
    ]
    trained = results.get("training", {})
    for env_id, row in trained.items():
        cells = [f"`{env_id}`", _rounded(row["suite"])]
        for key in ("ours", "default"):
            median, low, high = row[f"{key}_ratio"]
            cells += [_rounded(row[key]), f"{median:.2f} ({low:.2f} to {high:.2f})"]
        lines.append(f"| {' | '.join(cells)} |")
    lines += [
        "",
        f"{NUM_ENVS} environments, {UNROLL} steps, {EPOCHS} epochs of {MINIBATCHES} minibatches, "
        "two hidden layers of 64 units. By default, this package uses as many cores as make a run "
        "faster, here both; Brax uses a CPU as one device. "
        f"Medians of {ROUNDS} rounds of {UPDATES} updates in turn, on "
        f"{' and '.join(sorted({x['processor'] for x in trained.values()}))}. "
        "`python benchmarks/worlds.py --training` reproduces it.",
    ]
    return "\n".join(lines)


def table(results: dict[str, Any]) -> str:
    lines = [
        "| environment | steps/s | suite's own auto-reset | ratio |",
        "|---|---|---|---|",
    ]
    for env_id, row in results["environments"].items():
        lines.append(
            f"| `{env_id}` | {_rounded(row['ours'])} | {_rounded(row['suite'])} | "
            f"{row['ratio']:.1f} ({row['lowest']:.1f} to {row['highest']:.1f}) |"
        )
    about = results["about"]
    lines += [
        "",
        f"Random actions in {NUM_ENVS} environments, {STEPS} steps in one program, after "
        f"{WARMED_UP:,} steps. Medians of {ROUNDS} rounds in turn; the lowest and the highest "
        f"ratio of a round in brackets. {about['cores']} cores of {about['processor']}, jax "
        f"{about['jax']}, Python {about['python']}. `make bench-worlds` reproduces it.",
    ]
    return "\n".join(lines)


def _rounded(rate: float) -> str:
    digits = 2 - int(np.floor(np.log10(rate)))
    return f"{round(rate, min(digits, 0)):,.0f}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--only", default="", help="a prefix of names")
    parser.add_argument("--training", action="store_true", help="compare training with Brax's PPO")
    parser.add_argument("--table-only", action="store_true")
    given = parser.parse_args()
    use_all_cores()
    results = json.loads(RESULTS.read_text()) if RESULTS.exists() else {"environments": {}}
    for env_id in TRAINED if given.training else ():
        results.setdefault("training", {})[env_id] = train(env_id)
        print(env_id, results["training"][env_id], flush=True)
        RESULTS.write_text(json.dumps(results, indent=1) + "\n")
    for env_id in () if given.table_only or given.training else ENVIRONMENTS:
        if env_id.startswith(given.only):
            results["environments"][env_id] = measure(env_id)
            print(env_id, results["environments"][env_id], flush=True)
    if not given.table_only and not given.training:
        results["environments"] = {
            x: results["environments"][x] for x in ENVIRONMENTS if x in results["environments"]
        }
        results["about"] = {
            "processor": processor(), "cores": os.cpu_count(), "jax": jax.__version__,
            "python": platform.python_version(),
        }  # fmt: skip
        RESULTS.write_text(json.dumps(results, indent=1) + "\n")
    write_table("worlds", table(results))
    write_table("worlds-training", training_table(results), script="worlds")


def processor() -> str:
    """The processor's name, family and model."""
    lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    found = dict(line.split("\t: ", 1) for line in lines[:30] if "\t: " in line)
    words = {key.strip(): x for key, x in found.items()}
    return f"{words['model name']} (family {words['cpu family']}, model {words['model']})"


if __name__ == "__main__":
    main()
