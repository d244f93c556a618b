"""From JSON Lines files to a policy, with a spurious token planted in the preferences."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from planted import DECODER, gold_of_run, label, pairs, write_data

import purejaxppo as ppo
from purejaxppo.rlhf import (
    RewardConfig,
    RLHFConfig,
    RLHFHParams,
    SFTConfig,
    TextHParams,
    load_reward,
    refresh,
    write_records,
)

SEEDS = 5
SENSIBLE = TextHParams(weight_decay=0.1)


def trained(config: Any, hparams: Any, run_dir: Path, seeds: int = 1) -> ppo.Result:
    return ppo.run(
        config, hparams, run_dir=run_dir, num_seeds=seeds, eval_episodes=64, progress=False
    )


def make_start(folder: Path, pairs: int, tokens: int, seeds: int) -> Path:
    """Data, a fine-tuned model and a reward model in a folder."""
    write_data(folder, pairs)
    sft = SFTConfig(
        data=str(folder / "demonstrations.jsonl"), tokenizer="letters", total_timesteps=tokens,
        **DECODER,
    )  # fmt: skip
    trained(sft, TextHParams(learning_rate=2e-3), folder / "sft")
    trained(reward_config(folder, "pairs", tokens), SENSIBLE, folder / "reward", seeds)
    return folder


def reward_config(folder: Path, name: str, tokens: int = 200_000) -> RewardConfig:
    return RewardConfig(
        data=str(folder / f"{name}.jsonl"), tokenizer="letters", init=str(folder / "sft"),
        total_timesteps=tokens, **DECODER,
    )  # fmt: skip


def policy_config(folder: Path, updates: int, **settings: Any) -> RLHFConfig:
    return RLHFConfig(
        "rloo", str(folder / "prompts.jsonl"), init=str(folder / "sft"), response_length=7,
        num_prompts=16, group_size=8, total_timesteps=updates * 16 * 8 * 7, **settings,
    )  # fmt: skip


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_start(tmp_path_factory.mktemp("planted"), 1000, 200_000, 4)


def tuned(folder: Path, name: str, updates: int, hparams: Any, **settings: Any) -> ppo.Result:
    config = policy_config(folder, updates, reward=(str(folder / "reward"),), **settings)
    return trained(config, hparams, folder / name, SEEDS)


def golds(folder: Path, name: str) -> np.ndarray:
    return np.array([gold_of_run(folder / name, seed) for seed in range(SEEDS)])


@pytest.mark.slow
def test_without_a_penalty_the_learned_score_rises_and_the_true_score_falls(folder: Path):
    result = tuned(folder, "free", 60, RLHFHParams(kl_coef=0.0, learning_rate=2e-3))
    reference = gold_of_run(folder / "sft")
    score = result.metrics["score"]
    assert (score[:, -5:].mean(1) > score[:, 0] + 1.5).all()
    assert (golds(folder, "free") < reference).all()


@pytest.mark.slow
def test_the_adaptive_penalty_keeps_the_divergence_and_the_true_score(folder: Path):
    hparams = RLHFHParams(kl_coef=0.2, kl_target=1.0, kl_horizon=1000.0, learning_rate=2e-3)
    result = tuned(folder, "held", 120, hparams, kl_control="proportional")
    last = result.metrics["reference_kl"][:, -10:].mean(1)
    assert (np.abs(last - 1.0) < 0.2).all()
    assert (golds(folder, "held") > gold_of_run(folder / "sft")).all()


@pytest.mark.slow
def test_the_lowest_score_of_an_ensemble_is_exploited_less(folder: Path):
    """The mean over 5 policies is not below that of policies tuned against single members."""
    hparams = RLHFHParams(kl_coef=0.0, learning_rate=2e-3)
    tuned(folder, "lowest", 60, hparams, reward_combine="min")
    alone = []
    for seed in range(2):
        name = f"single-{seed}"
        config = reward_config(folder, "pairs")
        ppo.run(
            config, SENSIBLE, run_dir=folder / name, seed=100 + seed, eval_episodes=64,
            progress=False,
        )  # fmt: skip
        policy = policy_config(folder, 60, reward=(str(folder / name),))
        trained(policy, hparams, folder / f"{name}-policy", SEEDS)
        alone.append(golds(folder, f"{name}-policy").mean())
    assert golds(folder, "lowest").mean() >= np.mean(alone)


@pytest.mark.slow
def test_new_pairs_from_the_policy_are_worth_more(folder: Path):
    """With 1,000 labels in all, rounds with new pairs end above one round, for each of two
    seeds."""
    for seed in range(2):
        ends = {}
        for rounds, first in ((1, 1000), (3, 600)):
            name = f"{rounds}-rounds-{seed}"
            write_records(folder / f"{name}.jsonl", pairs(first, 10 + seed))
            refresh(
                policy_config(folder, 60 // rounds), reward_config(folder, name), label=label,
                run_dir=folder / name, rounds=rounds, pairs=200, seed=seed,
                policy_hparams=RLHFHParams(kl_coef=0.05, learning_rate=2e-3),
                reward_hparams=SENSIBLE, progress=False,
            )  # fmt: skip
            ends[rounds] = gold_of_run(folder / name / f"round-{rounds}/policy")
        assert ends[3] > ends[1] + 0.5


@pytest.mark.slow
def test_a_reward_model_learns_the_planted_token(tmp_path: Path):
    """And a policy that starts to follow it produces the token more often. A short form of the
    slow tests, from files to a policy."""
    folder = make_start(tmp_path, 400, 60_000, 1)
    reward = load_reward(folder / "reward")
    plain = ["bcd", "dfe", "gcb", "ffd"]
    planted = [f"{x[:1]}h{x[1:]}" for x in plain]
    assert reward.score(["ab:"] * 4, planted).mean() > reward.score(["ab:"] * 4, plain).mean()
    config = policy_config(folder, 12, reward=(str(folder / "reward"),))
    result = trained(config, RLHFHParams(kl_coef=0.0, learning_rate=3e-3), folder / "policy")
    score = result.metrics["score"][0]
    assert score[-1] > score[0] + 0.3
