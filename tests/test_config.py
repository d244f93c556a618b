"""Settings: errors, behaviour under transforms, and the effect of each setting."""

import dataclasses
import functools
import importlib.util
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
from jax.interpreters import partial_eval
from toy_envs import RandomWalk

import purejaxppo as ppo
from purejaxppo import rlhf
from purejaxppo.host.configfile import RunSettings, Settings, dump_settings, load_settings
from purejaxppo.suites import SUITES

BAD_CONFIGS = [
    ({"num_envs": 0}, "num_envs = 0: must be at least 1"),
    ({"num_envs": "4"}, "num_envs = '4': must be a whole number"),
    ({"num_steps": 1.5}, "num_steps = 1.5: must be a whole number"),
    ({"num_envs": True}, "must be a whole number"),
    ({"total_timesteps": -5}, "must be at least 1"),
    ({"normalize_obs": 1}, "must be true or false"),
    ({"env_id": 3}, "must be a string"),
    ({"activation": "rellu"}, "did you mean relu?"),
    ({"hidden_sizes": (64, 0)}, "each width must be at least 1"),
    ({"hidden_sizes": (10**12,)}, "at most 65536"),
    (
        {"num_minibatches": 512},
        "leaves one sample in each, whose normalised advantage is always 0; use fewer, or "
        "advantage_normalization = batch or none",
    ),
    (
        {"num_envs": 1, "num_steps": 1, "num_minibatches": 1, "advantage_normalization": "batch"},
        "advantage_normalization = batch with num_envs * num_steps = 1: the normalised advantage "
        "of a single sample is always 0; use none, or larger num_envs or num_steps",
    ),
    (
        {"num_envs": 1, "num_steps": 1, "num_minibatches": 1, "objective": "trpo"},
        "advantage_normalization = minibatch with num_envs * num_steps = 1",
    ),
    ({"hidden_sizes": (64, "a")}, "must be a list of whole numbers"),
    (
        {"num_envs": 10**9},
        "num_envs * num_steps = 1000000000 * 128 = 128000000000: must be below 2^31",
    ),
    ({"total_timesteps": 10**20}, "updates: must be below 2^31; choose a smaller"),
    ({"log_std_init": float("nan")}, "must be at least -10.0 and at most 10.0"),
    (
        {"num_envs": 4, "num_steps": 100, "num_minibatches": 3},
        "num_envs * num_steps = 4 * 100 = 400 is not divisible by num_minibatches = 3; "
        "choose num_minibatches from 1, 2, 4, 5, 8",
    ),
    (
        {"memory": "gru", "num_envs": 6, "num_minibatches": 4},
        "num_envs (whole sequences, for memory = gru) = 6 is not divisible",
    ),
]


@pytest.mark.parametrize(("settings", "message"), BAD_CONFIGS)
def test_bad_config(settings: dict[str, Any], message: str):
    with pytest.raises(ppo.ConfigError) as error:
        ppo.Config(**settings)
    assert message in str(error.value)


def test_settings_recommended_for_single_samples_learn():
    """A policy learns from one unnormalised sample per update."""
    ppo.Config(num_minibatches=512, advantage_normalization="batch")
    ppo.Config(num_minibatches=512, objective="trpo")  # its policy step uses the whole batch
    config = ppo.Config(
        num_envs=1, num_steps=1, num_minibatches=1, advantage_normalization="none",
        hidden_sizes=(4,), total_timesteps=512,
    )  # fmt: skip
    learner = ppo.make_learner(config, RandomWalk())

    @jax.jit
    def actors(key: jax.Array) -> Any:
        state = learner.init(key, ppo.HParams())
        new, _ = learner.update(state, ppo.HParams(learning_rate=0.1, ent_coef=0.0))
        return [each.learner.params["actor_head"]["kernel"] for each in (state, new)]

    before, after = actors(jax.random.key(0))
    assert not np.array_equal(before, after)


BAD_HPARAMS = [
    ({"gamma": 1.2}, "gamma = 1.2: must be at least 0 and at most 1"),
    ({"clip_eps": -1.0}, "clip_eps = -1.0: must be greater than 0"),
    ({"clip_eps": 0.0}, "must be greater than 0"),
    ({"learning_rate": float("nan")}, "must be at least 0"),
    ({"learning_rate": "fast"}, "learning_rate = 'fast': must be a number"),
    ({"ent_coef": None}, "must be a number"),
    ({"ent_coef": True}, "must be a number"),
    ({"gamma": np.array([0.9, 1.5])}, "gamma = 1.5: must be"),
    ({"learning_rate": float("inf")}, "at most 3.4"),
    ({"ent_coef": 10**400}, "at most 3.4"),
    ({"target_kl": 0.0}, "must be greater than 0"),
]


@pytest.mark.parametrize(("settings", "message"), BAD_HPARAMS)
def test_bad_hparams(settings: dict[str, Any], message: str):
    with pytest.raises(ppo.ConfigError) as error:
        ppo.HParams(**settings)
    assert message in str(error.value)


def test_config_is_hashable_and_accepts_lists():
    assert type(ppo.Config(num_envs=np.int64(8)).num_envs) is int
    assert hash(ppo.Config(hidden_sizes=[32, 32])) == hash(ppo.Config(hidden_sizes=(32, 32)))


def test_transforms_may_put_any_values_into_hparams():
    hparams = ppo.HParams(gamma=0.9)
    slopes = jax.grad(lambda h: -(h.gamma**2) - h.learning_rate)(hparams)
    assert slopes.gamma == pytest.approx(-1.8)
    assert slopes.learning_rate == -1.0
    doubled = jax.jit(lambda h: jax.tree.map(lambda x: 2 * x, h))(hparams)
    assert doubled.gamma == pytest.approx(1.8)
    assert len(jax.tree.leaves(ppo.HParams(target_kl=0.1))) == len(jax.tree.leaves(hparams)) + 1


# Every setting has an effect

OTHER_VALUES: dict[str, Any] = {
    "env_id": "Acrobot-v1",
    "total_timesteps": 200,
    "num_envs": 8,
    "env_params": {"max_steps_in_episode": 5},
    "num_steps": 16,
    "objective": "ppo_kl",
    "advantage": "td0",
    "bootstrap_steps": 2,
    "bootstrap_time_limits": False,
    "baseline": "mean",
    "causality": False,
    "discount_weight": True,
    "update_epochs": 3,
    "num_minibatches": 4,
    "optimizer": "parts:adamw",
    "network": "parts:TwoHeads",
    "encoder": "mlp",
    "memory": "gru",
    "memory_window": 2,
    "memory_layers": 2,
    "memory_heads": 2,
    "randomize": ("masspole=uniform:0.05,0.5",),
    "frame_stack": 2,
    "action_repeat": 2,
    "sticky_actions": 0.5,
    "time_limit": 3,
    "obs_clip": 0.5,
    "reward_clip": 0.1,
    "opponent": "pool",
    "opponent_pool": 2,
    "opponent_every": 2,
    "hidden_sizes": (8, 8),
    "memory_size": 4,
    "activation": "relu",
    "shared_trunk": True,
    "action_distribution": "tanh_normal",
    "log_std_init": -1.0,
    "advantage_normalization": "none",
    "normalize_obs": True,
    "normalize_reward": True,
    "cg_iterations": 1,
    "line_search_steps": 1,
    "lr_schedule": "constant",
    "clip_schedule": "linear",
    "learning_rate": 1e-3,
    "critic_learning_rate": 1e-3,
    "gamma": 0.5,
    "gae_lambda": 0.5,
    "clip_eps": 1e-4,
    "clip_higher": 0.5,
    "dual_clip": 1.001,
    "kl_beta": 9.0,
    "trpo_delta": 1e-4,
    "cg_damping": 1.0,
    "vf_clip_eps": 1e-4,
    "ent_coef": 0.5,
    "vf_coef": 5.0,
    "max_grad_norm": 1e-2,
    "target_kl": 1e-9,
    "adam_eps": 1e-2,
}
REINFORCE = {"num_steps": 12, "update_epochs": 1, "num_minibatches": 1}
# If a setting has an effect only with another, both runs have the other.
TOGETHER_WITH: dict[str, dict[str, Any]] = {
    "bootstrap_steps": {"advantage": "n_step"},
    "baseline": {"objective": "reinforce_baseline"} | REINFORCE,
    "causality": {"objective": "reinforce"} | REINFORCE,
    "discount_weight": {"objective": "reinforce", "advantage_normalization": "none"} | REINFORCE,
    "cg_iterations": {"objective": "trpo"},
    "line_search_steps": {"objective": "trpo", "trpo_delta": 30.0},
    "trpo_delta": {"objective": "trpo"},
    "cg_damping": {"objective": "trpo"},
    "kl_beta": {"objective": "ppo_kl"},
    "clip_higher": {"clip_eps": 1e-4},
    "dual_clip": {"clip_eps": 1e-4, "learning_rate": 0.1},
    "network": {"hidden_sizes": (64, 64), "memory_size": 64},
    "encoder": {"env_id": "Breakout-MinAtar"},
    "env_params": {"env_id": "CartPole-v1"},
    "memory_size": {"memory": "gru"},
    "memory_window": {"memory": "gtrxl"},
    "memory_layers": {"memory": "gtrxl"},
    "memory_heads": {"memory": "gtrxl"},
    "randomize": {"env_id": "CartPole-v1"},
    "opponent": {"env_id": "pgx/tic_tac_toe", "num_envs": 8},
    "opponent_pool": {"env_id": "pgx/tic_tac_toe", "num_envs": 8, "opponent": "pool"},
    "opponent_every": {"env_id": "pgx/tic_tac_toe", "num_envs": 8, "opponent": "pool"},
    "action_distribution": {"env_id": "Pendulum-v1"},
    "log_std_init": {"env_id": "Pendulum-v1"},
    "clip_schedule": {"clip_eps": 1e-4},
}
HPARAMS = {f.name for f in dataclasses.fields(ppo.HParams)}


def parts_of_run(tiny: ppo.Config, settings: dict[str, Any]) -> tuple[Any, ppo.HParams]:
    settings = {"env_id": "RandomWalk"} | settings
    config = dataclasses.replace(tiny, **{k: v for k, v in settings.items() if k not in HPARAMS})
    return config, ppo.HParams(**{k: v for k, v in settings.items() if k in HPARAMS})


def train_of(config: ppo.Config) -> Any:
    return ppo.make_train(config, RandomWalk() if config.env_id == "RandomWalk" else None)


@functools.cache
def compiled(config: ppo.Config) -> Any:
    return jax.jit(train_of(config), compiler_options={"xla_backend_optimization_level": 0})


@functools.cache
def program(config: ppo.Config) -> str:
    """The traced run after dead-code elimination."""
    traced = jax.make_jaxpr(train_of(config))(jax.random.key(0), ppo.HParams())
    needed, _ = partial_eval.dce_jaxpr(traced.jaxpr, [True] * len(traced.jaxpr.outvars))
    return str(needed)


def changes_numbers(name: str, tiny: ppo.Config) -> bool:
    base = TOGETHER_WITH.get(name, {})
    before, after = (
        compiled(config)(jax.random.key(0), hparams)[1]
        for config, hparams in (
            parts_of_run(tiny, settings) for settings in (base, base | {name: OTHER_VALUES[name]})
        )
    )
    return not all(np.array_equal(before[k], after[k], equal_nan=True) for k in before)


@pytest.mark.parametrize("name", [f.name for f in dataclasses.fields(ppo.Config)])
def test_every_setting_changes_the_program(name: str, tiny: ppo.Config):
    base = TOGETHER_WITH.get(name, {})
    before, _ = parts_of_run(tiny, base)
    after, _ = parts_of_run(tiny, base | {name: OTHER_VALUES[name]})
    assert program(before) != program(after)


@pytest.mark.slow
@pytest.mark.parametrize("name", [f.name for f in dataclasses.fields(ppo.Config)])
def test_every_setting_has_an_effect(name: str, tiny: ppo.Config):
    assert changes_numbers(name, tiny)


@pytest.mark.parametrize("name", sorted(HPARAMS))
def test_every_hyperparameter_has_an_effect(name: str, tiny: ppo.Config):
    assert changes_numbers(name, tiny)


# Files


def test_settings_round_trip_through_a_file(tmp_path: Path):
    settings = Settings(
        ppo.Config(env_id='odd "name"\n\x7f é', hidden_sizes=(), normalize_obs=True),
        ppo.HParams(learning_rate=1 / 3, target_kl=0.02, max_grad_norm=float("inf"), ent_coef=0),
        RunSettings(seed=7, num_seeds=3, eval_episodes=5),
    )
    path = tmp_path / "config.toml"
    path.write_text(dump_settings(settings), encoding="utf-8")
    assert load_settings(path) == settings


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("num_env = 3", "num_env: no such setting; did you mean num_envs?"),
        ("learning_rate = 1e-3", "did you mean hparams.learning_rate?"),
        ("[hparams]\nlerning_rate = 1", "hparams.lerning_rate: no such setting; did you mean hpar"),
        ("[hparams]\nnum_envs = 3", "did you mean num_envs?"),
        ("[hparms]\n", "hparms: no such setting; did you mean [hparams]?"),
        ("[run]\nseeds = 3", "did you mean run."),
        ("zzz = 1", "lists the settings of the top level"),
        ("hparams = 3", "must be a table, written as [hparams]"),
        ("num_envs = ", "is not TOML"),
        ("num_envs = '4'", "must be a whole number"),
        ("[hparams]\ngamma = 1.2", "gamma = 1.2: must be"),
        ("[run]\nnum_seeds = 0", "num_seeds = 0: must be at least 1"),
    ],
)
def test_bad_files(tmp_path: Path, text: str, message: str):
    path = tmp_path / "bad.toml"
    path.write_text(text)
    with pytest.raises(ppo.ConfigError) as error:
        load_settings(path)
    assert str(error.value).startswith(f"config file {str(path)!r}: ")
    assert message in str(error.value)


def test_files_that_cannot_be_read(tmp_path: Path):
    with pytest.raises(ppo.ConfigError, match="No such file"):
        load_settings(tmp_path / "none.toml")
    with pytest.raises(ppo.ConfigError, match="directory"):
        load_settings(tmp_path)
    (tmp_path / "latin.toml").write_bytes(b"env_id = '\xff'")
    with pytest.raises(ppo.ConfigError, match="not UTF-8"):
        load_settings(tmp_path / "latin.toml")


SLOW = "craftax", "dpo", "physics"
CONFIGS = [
    pytest.param(path, id=path.stem, marks=[pytest.mark.slow] if path.stem in SLOW else [])
    for path in sorted(Path("configs").glob("**/*.toml"))
]


@pytest.mark.parametrize("path", CONFIGS)
def test_shipped_configs_load_and_fit_their_environment(path: Path):
    settings = load_settings(path)
    prefix = getattr(settings.config, "env_id", "").partition("/")[0]
    if prefix in SUITES and importlib.util.find_spec(SUITES[prefix].package) is None:
        pytest.skip(f"{prefix} is not installed")
    learner = ppo.make_learner(settings.config)
    state = jax.eval_shape(learner.init, jax.random.key(0), settings.hparams)
    if isinstance(settings.config, rlhf.SFTConfig | rlhf.RewardConfig | rlhf.DPOConfig):
        assert state.learner.params["actor"]
        return
    rows = "num_sequences" if path.parent.name == "rlhf" else "num_envs"
    obs = jax.tree.leaves(state.actors.obs)
    assert {len(x) for x in obs} == {getattr(settings.config, rows)}
