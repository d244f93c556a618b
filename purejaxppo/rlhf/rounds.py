"""Rounds of learning a reward model, tuning a policy, and labelling its responses."""

import dataclasses
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from purejaxppo.checks import ConfigError, is_reference
from purejaxppo.host.configfile import RunSettings, Settings, dump_settings, load_settings
from purejaxppo.host.run import Extras, Result, resume, run_settings
from purejaxppo.host.rundir import (
    CONFIG,
    REFRESH,
    DamagedError,
    StorageError,
    locked,
    resume_command,
    sealed,
    unsealed,
    write_whole,
)
from purejaxppo.inputs import whole_number
from purejaxppo.references import called, resolve
from purejaxppo.rlhf import letters
from purejaxppo.rlhf.config import RLHFConfig, RLHFHParams
from purejaxppo.rlhf.problem import problem_of
from purejaxppo.rlhf.prompts_file import unscored
from purejaxppo.rlhf.records import Pair, Preference, read_preferences, write_records
from purejaxppo.rlhf.starts import start_of
from purejaxppo.rlhf.text import Generator
from purejaxppo.rlhf.text_config import RewardConfig, TextHParams

_FORMAT = 1
_POLICY, _REWARD = "policy.toml", "reward.toml"
_BATCH = 128
"""Prompts to which responses are generated at once."""
_MAX_BATCHES = 50
"""Stop collecting after this many batches, even if there are too few different responses."""
_ROUND = 1_000_003
"""Factor of a round in random seeds."""

Label = Callable[[list[str], list[str], list[str]], Sequence[bool]]
"""`(prompts, first, second) -> whether the first completion is better`, lists of N."""


class LabelsNeededError(Exception):
    """New pairs were written to a file, to be labelled."""


class Round(NamedTuple):
    """The results of a round."""

    pairs: int
    """Pairs that the reward model was trained on, held-out ones included."""
    accuracy: float
    """Accuracy of the reward model on held-out pairs."""
    score: float
    """The policy's evaluation by the task's own score, or by the reward model if it has none."""
    learned_score: float
    """Mean learned score of the responses in the last update."""
    reference_kl: float
    """KL divergence of the policy from the reference in the last update, in nats per response."""


class Plan(NamedTuple):
    """The settings of all rounds."""

    policy: Settings
    reward: Settings
    rounds: int
    pairs: int
    label: str


def refresh(
    policy: RLHFConfig,
    reward: RewardConfig,
    *,
    run_dir: str | Path,
    label: str | Label = "none",
    rounds: int = 3,
    pairs: int = 500,
    policy_hparams: RLHFHParams = RLHFHParams(),  # noqa: B008
    reward_hparams: TextHParams = TextHParams(),  # noqa: B008
    num_reward_seeds: int = 1,
    seed: int = 0,
    progress: bool = True,
) -> list[Round]:
    """Train a policy in rounds, with a new reward model in each round.

    A round trains a reward model on all pairs so far, then continues the policy against it for
    `policy.total_timesteps` tokens. Between rounds, pairs of responses are drawn from the policy
    and labelled, so that the reward model learns where the policy is (Ouyang et al. 2022,
    arXiv:2203.02155, section 3.1; Bai et al. 2022, arXiv:2204.05862, section 4.5). The reference
    stays that of `policy.init`.

    Each reward model and each policy is a run in `run_dir/round-1/reward`, `run_dir/round-1/policy`
    and so on. Call it again with the same arguments, or `purejaxppo resume RUN_DIR`, to continue
    after an interruption; the results are the same, bit for bit.

    Args:
        reward: its `data` are the pairs of the first round.
        label: "gold" draws labels from the Bradley-Terry model with the task's own score; a
            function, or its name package.module:function, is called with three lists and returns
            whether the first completion is better; "none" writes the pairs to a file and stops, so
            that you can label them.
        pairs: number of new pairs per round.
        num_reward_seeds: members of each round's reward ensemble.

    Raises:
        ConfigError: if a setting cannot work, or `run_dir` has other settings.
        LabelsNeededError: with label = "none", once pairs are to be labelled.
        HostCallError: if a reward function fails.
    """
    named = label if isinstance(label, str) else getattr(label, "__name__", "function")
    host = RunSettings(seed=seed)
    plan = Plan(
        Settings(policy, policy_hparams, host),
        Settings(reward, reward_hparams, dataclasses.replace(host, num_seeds=num_reward_seeds)),
        whole_number("rounds", rounds, 1), whole_number("pairs", pairs, 1), named,
    )  # fmt: skip
    _check(plan)
    return run_plan(plan, Path(run_dir), label, progress)


def resume_refresh(run_dir: Path, progress: bool = True) -> list[Round]:
    """Continue an interrupted `refresh`. Raises `ConfigError` as `refresh`."""
    plan = _read(run_dir)
    if plan.label not in ("gold", "none") and not is_reference(plan.label):
        raise ConfigError(
            f"{str(run_dir)!r}: its label function was passed from Python; call rlhf.refresh again"
        )
    return run_plan(plan, run_dir, plan.label, progress)


def run_plan(plan: Plan, directory: Path, label: str | Label, progress: bool = True) -> list[Round]:
    """Run all rounds that are not finished."""
    labeller = resolve("label", label) if isinstance(label, str) and ":" in label else label
    found = []
    with locked(directory, make=True):
        _write(plan, directory)
        data = plan.reward.config.data
        beta: Any = getattr(plan.policy.hparams, "kl_coef")  # noqa: B009
        for number in range(1, plan.rounds + 1):
            folder = directory / f"round-{number}"
            if number > 1:
                data = _pairs_of(plan, folder, number, labeller, progress)
            _say(progress, f"round {number} of {plan.rounds}: reward model")
            model = _finish(_reward_settings(plan, data, number), folder / "reward", progress)
            _say(progress, f"round {number} of {plan.rounds}: policy")
            tuned = _finish(_policy_settings(plan, folder, beta), folder / "policy", progress)
            if plan.policy.config.kl_control != "fixed":
                beta = float(tuned.metrics["kl_coef"][0, -1])
            found.append(_round(data, model, tuned))
            _say(progress, _line(number, found[-1]))
    return found


# Rounds


def _reward_settings(plan: Plan, data: str, number: int) -> Settings:
    run = dataclasses.replace(plan.reward.run, seed=_seed(plan, number))
    return dataclasses.replace(
        plan.reward, config=dataclasses.replace(plan.reward.config, data=data), run=run
    )


def _policy_settings(plan: Plan, folder: Path, beta: Any) -> Settings:
    number = int(folder.name.removeprefix("round-"))
    before = folder.parent / f"round-{number - 1}" / "policy"
    config = dataclasses.replace(
        plan.policy.config,
        reward=(*plan.policy.config.reward, str(folder / "reward")),
        start=str(before) if number > 1 else plan.policy.config.start,
    )
    return dataclasses.replace(
        plan.policy,
        config=config,
        hparams=dataclasses.replace(plan.policy.hparams, kl_coef=beta),
        run=dataclasses.replace(plan.policy.run, seed=_seed(plan, number)),
    )


def _seed(plan: Plan, number: int) -> int:
    return (plan.policy.run.seed + _ROUND * (number - 1)) % 2**32


def _finish(settings: Settings, run_dir: Path, progress: bool) -> Result:
    """Start a run, or resume it."""
    if (run_dir / CONFIG).exists():
        result = resume(run_dir, progress=progress)
    else:
        result = run_settings(settings, run_dir, extras=Extras(progress=progress))
    if len(result.failed) == settings.num_runs:
        raise ConfigError(
            f"{str(run_dir)!r}: every seed failed; change the settings and use another directory"
        )
    return result


def _round(data: str, model: Result, tuned: Result) -> Round:
    pairs = len(letters.preferences()) if data == "letters" else len(read_preferences(data))
    return Round(
        pairs, model.summary["accuracy"], tuned.summary["eval_return_mean"],
        tuned.summary["score"], tuned.summary["reference_kl"],
    )  # fmt: skip


def _line(number: int, found: Round) -> str:
    return (
        f"round {number}: {found.pairs} pairs, reward model accuracy {found.accuracy:.1%}, learned "
        f"score {found.learned_score:.2f}, evaluation {found.score:.2f}, KL "
        f"{found.reference_kl:.2f}"
    )


def _say(progress: bool, text: str) -> None:
    if progress:
        print(text, flush=True)


# Pairs


def _pairs_of(plan: Plan, folder: Path, number: int, label: str | Label, progress: bool) -> str:
    """The file of all pairs of a round; collects and labels the new ones if it does not exist."""
    every = folder / "pairs.jsonl"
    if every.exists():
        return str(every)
    folder.mkdir(exist_ok=True)
    previous = folder.parent / f"round-{number - 1}"
    old = previous / "pairs.jsonl" if number > 2 else plan.reward.config.data
    before = letters.preferences() if old == "letters" else read_preferences(old)
    new = _new_pairs(plan, folder, previous / "policy", number, label)
    _say(progress, f"round {number} of {plan.rounds}: {len(new)} new pairs")
    columns = [x._replace(columns={}) for x in (*before, *new)]
    write_records(every, columns)
    return str(every)


def _new_pairs(
    plan: Plan, folder: Path, policy: Path, number: int, label: str | Label
) -> list[Preference]:
    labelled = folder / "labelled.jsonl"
    if label == "none" and labelled.exists():
        return read_preferences(labelled)
    pairs, scores = _drawn(plan, policy, number)
    if label == "none":
        todo = folder / "unlabelled.jsonl"
        write_records(todo, pairs)
        raise LabelsNeededError(
            f"{len(pairs)} pairs are to be labelled: for each line of {todo}, write a line with "
            f"prompt, chosen and rejected to {labelled}; then: "
            f"{resume_command(folder.parent)}"
        )
    if label == "gold":
        rng = np.random.default_rng([_seed(plan, number), 1])
        difference = np.array([a - b for a, b in scores])
        better = rng.random(len(pairs)) < 1 / (1 + np.exp(-difference))
    else:
        better = _labels(label, pairs)
    return [
        Preference(x.prompt, *((x.first, x.second) if first else (x.second, x.first)))
        for x, first in zip(pairs, better, strict=True)
    ]


def _labels(label: Any, pairs: Sequence[Pair]) -> np.ndarray:
    """The answers of a label function. Raises `ConfigError` if it fails."""
    columns = [list(x) for x in zip(*pairs, strict=True)]
    found: Any = called("label", label, *columns)
    if np.shape(found) != (len(pairs),):
        raise ConfigError(
            f"label: returned shape {list(np.shape(found))} for {len(pairs)} pairs; must return "
            "for each pair whether the first completion is better"
        )
    values = np.asarray(found)
    if values.dtype != bool and not np.isin(values, (0, 1)).all():
        raise ConfigError("label: returned other values than true and false, or 1 and 0")
    return values.astype(bool)


def _drawn(plan: Plan, policy: Path, number: int) -> tuple[list[Pair], list[tuple[float, float]]]:
    """Pairs of different responses of a policy, and their scores by the task itself.

    Raises:
        ConfigError: if the policy gives too few different responses.
    """
    config = own_config(plan.policy.config)
    problem = problem_of(config)
    generator = Generator(config, problem, start_of(str(policy)).params)
    texts = _prompt_texts(problem)
    seed = _seed(plan, number)
    rng = np.random.default_rng(seed)
    pairs: list[Pair] = []
    scores: list[tuple[float, float]] = []
    for batch in range(_MAX_BATCHES):
        prompts = [texts[i] for i in rng.integers(len(texts), size=_BATCH)]
        each = generator(prompts, num_responses=2, seed=(seed + batch) % 2**32)
        for prompt, (one, other) in zip(prompts, each, strict=True):
            if one.text and other.text and one.text != other.text and len(pairs) < plan.pairs:
                pairs.append(Pair(prompt, one.text, other.text))
                scores.append((one.score or 0.0, other.score or 0.0))
        if len(pairs) == plan.pairs:
            return pairs, scores
    raise ConfigError(
        f"{str(policy)!r}: only {len(pairs)} of pairs = {plan.pairs} pairs of different responses "
        f"in {_MAX_BATCHES * _BATCH} tries; use fewer pairs, or a higher kl_coef or ent_coef"
    )


def own_config(config: RLHFConfig) -> RLHFConfig:
    """The config of the same decoder and task, with the task's own score."""
    return dataclasses.replace(
        config, reward=(), reward_combine="mean", retokenize=False, critic_init="random", start=""
    )


def _prompt_texts(problem: Any) -> list[str]:
    rows = zip(np.asarray(problem.prompts.tokens), np.asarray(problem.prompts.lengths), strict=True)
    return [problem.text.decode(tokens[len(tokens) - int(n) :]) for tokens, n in rows]


# Files


def _check(plan: Plan) -> None:
    """Raise `ConfigError` if the settings cannot work."""
    config, label = plan.policy.config, plan.label
    if not isinstance(config, RLHFConfig) or not isinstance(plan.reward.config, RewardConfig):
        raise ConfigError("refresh: needs the config of a policy and that of a reward model")
    if plan.policy.run.num_seeds != 1:
        raise ConfigError(
            f"num_seeds = {plan.policy.run.num_seeds}: refresh trains one policy; use one "
            "directory per seed"
        )
    if label == "gold" and problem_of(own_config(config)).score is unscored:
        raise ConfigError(
            f"label = gold: task = {config.task} has no score of its own; name a function, "
            "package.module:function, or use none"
        )


def _write(plan: Plan, directory: Path) -> None:
    """Write the settings, or raise `ConfigError` if the directory has others."""
    content = {
        "format": _FORMAT, "rounds": plan.rounds, "pairs": plan.pairs, "label": plan.label,
        "policy": dump_settings(plan.policy), "reward": dump_settings(plan.reward),
    }  # fmt: skip
    path = directory / REFRESH
    if path.exists():
        if path.read_text(encoding="utf-8") != sealed(content):
            raise ConfigError(
                f"run_dir = {str(directory)!r}: belongs to a refresh with other settings; choose "
                f"another directory, or continue it: {resume_command(directory)}"
            )
        return
    if any(name.suffix != ".part" and name.name != ".lock" for name in directory.iterdir()):
        raise ConfigError(f"run_dir = {str(directory)!r}: is not empty; choose another directory")
    try:
        for name, settings in ((_POLICY, plan.policy), (_REWARD, plan.reward)):
            write_whole(directory / name, dump_settings(settings))
        write_whole(path, sealed(content))
    except OSError as error:
        raise StorageError(f"{str(directory)!r}: cannot be written: {error.strerror}") from error


def _read(directory: Path) -> Plan:
    """The settings in a directory. Raises `ConfigError` if they were changed."""
    try:
        content = unsealed(directory / REFRESH, _FORMAT)
    except DamagedError as error:
        raise ConfigError(f"{str(directory)!r}: {error}; restore a copy") from error
    policy, reward = (load_settings(directory / name) for name in (_POLICY, _REWARD))
    if [dump_settings(policy), dump_settings(reward)] != [content["policy"], content["reward"]]:
        raise ConfigError(f"{str(directory)!r}: {_POLICY} or {_REWARD} was changed; restore it")
    return Plan(policy, reward, content["rounds"], content["pairs"], content["label"])
