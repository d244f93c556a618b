"""Evaluates policies: scores, win rates, pass@k, and best-of-n of the reference."""

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Literal, NamedTuple

import jax
import numpy as np
from jaxtyping import Float

from purejaxppo.checks import ConfigError
from purejaxppo.inputs import check_fits, whole_number
from purejaxppo.references import called
from purejaxppo.rlhf.architecture import Architecture
from purejaxppo.rlhf.config import RLHFConfig
from purejaxppo.rlhf.decoder import make_decoder
from purejaxppo.rlhf.estimates import (
    Estimate,
    best_of_each,
    kl_bound,
    mean_over_prompts,
    of_means,
    pass_at_k,
    wins,
)
from purejaxppo.rlhf.evaluation import BestOfN, PolicyEvaluation, PolicyScores
from purejaxppo.rlhf.prepare import prepared
from purejaxppo.rlhf.problem import Problem
from purejaxppo.rlhf.reward import Combine
from purejaxppo.rlhf.sampler import (
    Asked,
    Decoder,
    Judge,
    Sampler,
    Scored,
    make_judge,
    prompts_of,
    vocabulary_of,
    without_critic,
)
from purejaxppo.rlhf.starts import alphabet_of, start_of
from purejaxppo.rlhf.task import architecture_of
from purejaxppo.rlhf.text import LoadedPolicy, load_policy
from purejaxppo.rlhf.text_config import DPOConfig

REFERENCE = "reference"
BEST_OF, _USUAL_K = (1, 4, 16, 64), (1, 4, 16)


def evaluate_policy(
    run_dir: str | Path,
    against: str | Path | None = None,
    *,
    reward: str | Path | None = None,
    combine: Combine = "mean",
    prompts: str | Path | None = None,
    num_prompts: int | None = None,
    num_responses: int = 16,
    k: Sequence[int] = (),
    best_of: Sequence[int] = BEST_OF,
    temperature: float = 1.0,
    max_tokens: int | None = None,
    seed: int = 0,
    generation_seed: int = 0,
    which: Literal["newest", "best"] | int = "newest",
    problem: Problem | None = None,
) -> PolicyEvaluation:
    """Evaluate the policy of a run, and compare it with its reference or with another run.

        found = rlhf.evaluate_policy("runs/aligned")
        print(found.table())

    Args:
        run_dir: a run of `rlhf`, `rlhf sft` or `rlhf dpo`.
        against: "reference", or a different run, whose first seed is used. None uses the reference
            if there is one: that of the KL penalty, or the run that `rlhf sft` started from.
        reward: directory of a reward model, whose scores are reported instead of the task's own.
        combine: how the scores of its members are combined.
        prompts: a JSON Lines file with prompts; None uses the run's held-out prompts.
        num_prompts: use only this many prompts, the first ones.
        num_responses: responses per prompt.
        k: values of k for pass@k, at most `num_responses`; empty uses those of 1, 4 and 16, if
            answers can be exact.
        best_of: values of n for best-of-n of the reference; empty leaves it out.
        temperature: sampling temperature of all policies.
        max_tokens: maximum length of a response of runs on texts; None uses up to 64.
        seed: index of the policy's seed, from 0.
        generation_seed: base random seed of the responses.
        which: the newest checkpoint, the best by evaluation, or the one after this number of
            updates.
        problem: the problem passed to `make_rlhf_task`, if one was.

    Raises:
        ConfigError: if a run cannot be loaded, the tokenizers differ, the prompts cannot be scored,
            or an argument is out of range.
    """
    _check_combine(combine, reward)
    wanted = _wanted(
        num_prompts=num_prompts, num_responses=num_responses, k=k, best_of=best_of,
        temperature=temperature, max_tokens=max_tokens, seed=generation_seed,
    )  # fmt: skip
    found = load_policy(run_dir, problem, seed=seed, which=which)
    asked = prompts_of(found, prompts, wanted.prompts, wanted.max_tokens)
    ready = prepared(found.config, asked.problem)
    judge = make_judge(found, asked, ready, reward, combine)
    wanted = _with_usual_k(wanted, ready)
    contest = _contest(found, ready, asked, str(run_dir), against)
    sampler = Sampler(judge, asked, wanted.responses, wanted.temperature)
    return _evaluation(contest, judge, wanted, _sampled(contest, sampler, wanted))


# Arguments


def _check_combine(combine: Combine, reward: str | Path | None) -> None:
    if combine != "mean" and reward is None:
        raise ConfigError(f"combine = {combine}: has no effect without reward; leave it out")


class _Wanted(NamedTuple):
    """The numbers that were asked for."""

    prompts: int | None
    responses: int
    k: tuple[int, ...]
    best_of: tuple[int, ...]
    temperature: float
    max_tokens: int | None
    seed: int


def _wanted(
    *,
    num_prompts: int | None,
    num_responses: int,
    k: Sequence[int],
    best_of: Sequence[int],
    temperature: float,
    max_tokens: int | None,
    seed: int,
) -> _Wanted:
    responses = whole_number("num_responses", num_responses, 1)
    each_k = tuple(sorted({whole_number("k", x, 1) for x in k}))
    if each_k and each_k[-1] > responses:
        raise ConfigError(
            f"k = {each_k[-1]}: must be at most num_responses = {responses}; use a smaller k, or "
            f"num_responses = {each_k[-1]} or more"
        )
    if not (temperature > 0 and math.isfinite(temperature)):
        raise ConfigError(f"temperature = {temperature}: must be above 0 and finite")
    if whole_number("generation_seed", seed, 0) >= 2**32:
        raise ConfigError(f"generation_seed = {seed}: must be below 2^32")
    return _Wanted(
        None if num_prompts is None else whole_number("num_prompts", num_prompts, 1),
        responses,
        each_k,
        tuple(sorted({whole_number("best_of", x, 1) for x in best_of})),
        float(temperature),
        None if max_tokens is None else whole_number("max_tokens", max_tokens, 1),
        seed,
    )


def _with_usual_k(wanted: _Wanted, problem: Problem) -> _Wanted:
    if problem.exact_score is None:
        if wanted.k:
            raise ConfigError(
                f"k = {wanted.k[-1]}: pass@k needs exact answers, but the score of "
                f"{problem.name!r} has no value that means exact (exact_score); leave k out"
            )
        return wanted
    usual = tuple(x for x in _USUAL_K if x <= wanted.responses)
    return wanted._replace(k=wanted.k or usual)


# Policies


class _Contest(NamedTuple):
    """The policies of an evaluation."""

    run_dir: str
    policy: Decoder
    reference: Decoder | None
    other: Decoder | None
    """The policy of a different run."""
    against: str | None


def _contest(
    found: LoadedPolicy, problem: Problem, asked: Asked, run_dir: str, against: str | Path | None
) -> _Contest:
    own = architecture_of(found.config, problem)
    policy, reference = without_critic(own, found.params), _reference(found, problem, own)
    if against is None:
        return _Contest(run_dir, policy, reference, None, None if reference is None else REFERENCE)
    if against != REFERENCE:
        other = _other_run(str(against), asked)
        return _Contest(run_dir, policy, reference, other, str(against))
    if reference is None:
        raise ConfigError(
            f"against = {REFERENCE}: {run_dir!r} started from random weights, so it has no "
            "reference; give the directory of a different run"
        )
    return _Contest(run_dir, policy, reference, None, REFERENCE)


def _reference(found: LoadedPolicy, problem: Problem, architecture: Architecture) -> Decoder | None:
    """The reference of the KL penalty, or the run that fine-tuning started from."""
    config = found.settings.config
    if isinstance(config, RLHFConfig):
        name = f"reference of {problem.name}"
        params = called(name, problem.reference, architecture)
    elif config.init:
        name, params = f"init = {config.init}", start_of(config.init).params
    elif isinstance(config, DPOConfig):
        name, params = "reference", jax.jit(make_decoder(architecture).init)(jax.random.key(0))
    else:
        return None
    made = without_critic(architecture, params)
    shapes = jax.eval_shape(make_decoder(made.architecture).init, jax.random.key(0))
    check_fits(name, made.params, shapes)
    return made


def _other_run(run_dir: str, asked: Asked) -> Decoder:
    found, problem = load_policy(run_dir), asked.problem
    if alphabet_of(vocabulary_of(found.problem)) != alphabet_of(vocabulary_of(problem)):
        raise ConfigError(
            f"against = {run_dir}: was trained with another tokenizer than {problem.name!r}, so "
            "its tokens have other meanings; compare runs with the same tokenizer"
        )
    made = without_critic(architecture_of(found.config, found.problem), found.params)
    needed = asked.prompts.tokens.shape[1] + asked.length
    if made.architecture.context < needed:
        raise ConfigError(
            f"against = {run_dir}: its decoder has a context of {made.architecture.context} "
            f"tokens, but prompt and response have up to {needed}; evaluate that run against this "
            "one, or train it with a larger context"
        )
    return made


# Results


class _Results(NamedTuple):
    policy: Scored
    reference: Scored | None
    other: Scored | None


def _sampled(contest: _Contest, sampler: Sampler, wanted: _Wanted) -> _Results:
    """The responses of the policies, each with its own random numbers."""
    keys = jax.random.split(jax.random.key(wanted.seed), 3)
    of_policy = sampler(contest.policy, keys[0], wanted.responses, contest.reference)
    reference = other = None
    if contest.reference is not None and (contest.other is None or wanted.best_of):
        count = max((wanted.responses, *wanted.best_of))
        reference = sampler(contest.reference, keys[1], count)
    if contest.other is not None:
        other = sampler(contest.other, keys[2], wanted.responses)
    return _Results(of_policy, reference, other)


def _evaluation(
    contest: _Contest, judge: Judge, wanted: _Wanted, results: _Results
) -> PolicyEvaluation:
    policy, log_ratio = results.policy, results.policy.log_ratio
    opponent = results.reference if results.other is None else results.other
    compared = None if opponent is None else wins(policy.score, opponent.score)
    best_of, at_kl, lead = (), None, None
    if results.reference is not None and log_ratio is not None and wanted.best_of:
        ref = results.reference
        curve = best_of_each(ref.select, ref.score, wanted.best_of[-1])
        best_of = tuple(
            BestOfN(n, mean_over_prompts(curve[:, n - 1]), float(kl_bound(n)))
            for n in wanted.best_of
        )
        at_kl, lead = at_equal_kl(policy.score.mean(axis=1), log_ratio.mean(axis=1), curve)
    return PolicyEvaluation(
        run_dir=contest.run_dir,
        against=contest.against,
        score_name=judge.name,
        num_prompts=len(policy.score),
        num_responses=wanted.responses,
        opponent_responses=0 if opponent is None else opponent.score.shape[1],
        temperature=wanted.temperature,
        policy=_scores(policy, wanted.k),
        opponent=None if opponent is None else _scores(opponent, wanted.k),
        win_rate=None if compared is None else mean_over_prompts(compared.win_rate, share=True),
        ties=None if compared is None else float(compared.ties.mean()),
        kl=None if log_ratio is None else mean_over_prompts(log_ratio.mean(axis=1)),
        selected_by=judge.selected_by if best_of else None,
        best_of=best_of,
        best_of_at_kl=at_kl,
        lead_at_kl=lead,
    )


def _scores(found: Scored, k: Sequence[int]) -> PolicyScores:
    score = mean_over_prompts(found.score.mean(axis=1))
    if found.exact is None:
        return PolicyScores(score, None, {})
    count = found.exact.sum(axis=1).astype(int)
    size = found.exact.shape[1]
    passed = {x: mean_over_prompts(pass_at_k(size, count, x), share=True) for x in k}
    exact = mean_over_prompts(count / size, share=True)
    return PolicyScores(score, exact, passed)


def at_equal_kl(
    score: Float[np.ndarray, " P"], kl: Float[np.ndarray, " P"], curve: Float[np.ndarray, "P M"]
) -> tuple[Estimate | None, Estimate | None]:
    """The score of best-of-n at the policy's KL divergence, and the policy's score minus that.

    The KL divergence of best-of-n is taken to be its bound. Scores between two n are interpolated.

    Args:
        score: mean scores of the policy per prompt.
        kl: its KL divergence from the reference per prompt, whose mean is below 0 only by chance.
        curve: scores of best-of-n for n from 1 to M.

    Returns:
        None if the policy's divergence is above the bound of the largest n.
    """
    bounds = kl_bound(np.arange(1, curve.shape[1] + 1))
    if kl.mean() > bounds[-1]:
        return None, None

    def best(means: Float[np.ndarray, " D"]) -> float:
        return float(np.interp(max(means[1], 0.0), bounds, means[2:]))

    def lead(means: Float[np.ndarray, " D"]) -> float:
        return means[0] - best(means)

    values = np.column_stack([score, kl, curve]).astype(np.float64)
    return of_means(best, values), of_means(lead, values)
