"""Settings of a run that tunes a language model. Does not import JAX."""

import dataclasses
import math
from dataclasses import dataclass
from pathlib import PurePath
from typing import Any, Literal

import numpy as np

from purejaxppo.checks import FLOAT_MAX, ConfigError, EnvParams, check_fields, is_traced
from purejaxppo.config import (
    AUTO,
    MAX_WIDTH,
    HParams,
    Scalar,
    TaskConfig,
    UpdateConfig,
    Words,
    bounded,
    fill_auto,
)
from purejaxppo.rlhf.architecture import Architecture
from purejaxppo.rlhf.table import TOKEN_OBJECTIVES, TokenObjective

_DEFAULTS: dict[str, Any] = {"oversampling": 1, "advantage_normalization": "none"}
OVERLONG_SHARE = 5
"""By default, DAPO's buffer is the last fifth of the maximum length (paper, section 4.1)."""
_ONLY_WITH_CRITIC = (
    "gamma", "gae_lambda", "vf_coef", "vf_clip_eps", "critic_learning_rate"
)  # fmt: skip
NEVER_READ = ("kl_beta", "trpo_delta", "cg_damping")
"""Hyperparameters that no objective for tokens reads."""
TASKS = ("sort", "reverse", "sum", "arithmetic", "countdown", "letters")
"""The names in `rlhf.PROBLEMS`."""


def is_prompts_file(task: str) -> bool:
    """Whether a task's name is the path of a JSON Lines file with prompts."""
    return task.endswith(".jsonl")


def check_counts(config: TaskConfig, settings: str) -> None:
    """Raise `ConfigError` if the tokens of an update or the updates overflow an int32.

    Args:
        settings: names of the settings to reduce.
    """
    if config.batch_size >= 2**31 or config.num_updates >= 2**31:
        raise ConfigError(
            f"{config.batch_size} tokens per update, {config.num_updates} updates: both must be "
            f"below 2^31; reduce {settings}"
        )


def weighted(text: str) -> tuple[float, str]:
    """Weight and name of `NAME` or `WEIGHT*NAME`, where the name is a directory or a function.
    Raises `ConfigError` if the weight is not a finite number."""
    weight, star, run_dir = text.partition("*")
    if not star:
        return 1.0, text
    try:
        value = float(weight)
    except ValueError:
        value = math.nan
    if not math.isfinite(value) or not run_dir:
        raise ConfigError(
            f"reward = {text!r}: must be RUN_DIR, package.module:function, or one of these with a "
            "weight, such as 0.5*runs/reward"
        )
    return value, run_dir


@dataclass(frozen=True, kw_only=True)
class DecoderConfig:
    """The settings of a decoder."""

    num_layers: int = bounded(2, 1, 1024)
    """Number of transformer blocks."""
    width: int = bounded(64, 1, MAX_WIDTH)
    """Width of the residual stream; a multiple of num_heads."""
    num_heads: int = bounded(4, 1)
    """Number of attention heads."""
    num_kv_heads: int = bounded(0, 0)
    """Number of key/value heads; a divisor of num_heads (grouped-query attention). 0: num_heads."""
    mlp_width: int = bounded(0, 0, MAX_WIDTH)
    """Hidden width of the MLPs; 0: 4 times the width."""
    positions: Literal["learned", "rotary"] = "learned"
    """Position embeddings."""
    norm: Literal["layer", "rms"] = "layer"
    """Normalisation layers: LayerNorm or RMSNorm."""
    activation: Literal["gelu", "swiglu"] = "gelu"
    """Activation of the MLPs."""
    tied_embeddings: bool = True
    """Share the token embedding with the output layer."""

    def decoder(self, vocab_size: int, context: int, critic: Any = "none") -> Architecture:
        """The decoder's architecture for a vocabulary size and a context length."""
        return Architecture(
            vocab_size, context, self.num_layers, self.width, self.num_heads, self.num_kv_heads,
            self.mlp_width, self.positions, self.norm, self.activation, self.tied_embeddings,
            critic,
        )  # fmt: skip


@dataclass(frozen=True)
class RLHFConfig(DecoderConfig, UpdateConfig):
    """The settings that fix the shapes and code paths of a language model run.

    Raises `ConfigError` on construction if a value has the wrong type, is out of range, or
    contradicts another setting.
    """

    objective: Literal[
        "ppo_clip", "reinforce_pp", "rloo", "grpo", "dr_grpo", "dapo", "gspo", "gspo_token"
    ] = "ppo_clip"  # fmt: skip
    """Policy objective. ppo_clip: clipped surrogate with a critic. reinforce_pp: no critic,
    advantages normalised over the batch. rloo, grpo, dr_grpo, dapo, gspo, gspo_token: no critic,
    baseline from the responses to the same prompt."""
    task: str = "sort"
    """Task (prompts and score): sort, reverse, sum, arithmetic, countdown, letters,
    package.module:name of your own `Problem` or of a function that makes one, or a JSON Lines file
    (.jsonl) with prompts, which needs reward. If a problem is passed from Python, only a label."""
    task_params: EnvParams = EnvParams()
    """Arguments of the task by name, such as longest; the others keep their defaults. A file of
    prompts takes held_out (share of the prompts, 0.1) and skip_bad_lines (false)."""
    tokenizer: str = AUTO
    """With a file of prompts: bytes, the name of a task for its tokenizer, or the path of a
    tokenizer.json. auto: that of init, or bytes."""
    total_timesteps: int = bounded(400 * 16 * 16 * 8, 1)
    """Tokens to generate, counting every response at its maximum length; rounded up to whole
    updates."""
    num_prompts: int = bounded(16, 1)
    """Prompts per update."""
    group_size: int = bounded(16, 1)
    """Responses per prompt (K)."""
    response_length: int = bounded(8, 1)
    """Maximum number of tokens of a response (R)."""
    oversampling: int = bounded(AUTO, 1, 64)
    """Dynamic sampling: generate responses to oversampling * num_prompts prompts, and learn from
    the first num_prompts whose responses differ in score; 1 keeps all. auto: 2 with dapo, else
    1."""
    overlong_buffer: int = bounded(AUTO, 0)
    """Size in tokens of a buffer at the end of response_length. Responses that reach into it lose
    score, linearly up to 1 at its end; 0 disables this. auto: a fifth of response_length with dapo,
    else 0."""
    averaging: Literal["auto", "tokens", "sequences", "constant"] = AUTO
    """Average losses over all tokens of a minibatch (tokens), over the tokens of each response and
    then over responses (sequences), or divide their sum by the maximum number of tokens (constant).
    auto: as in the objective's paper."""
    kl_in: Literal["reward", "loss"] = "reward"
    """Apply the penalty on the KL divergence from the reference in the reward of each token, or in
    the loss."""
    kl_estimator: Literal["auto", "k1", "k2", "k3", "k2_sequence"] = AUTO
    """Estimator of the KL divergence. k1: log ratio; k2: half its square; k3: exp(-log ratio) - 1 +
    log ratio; k2_sequence (only in the loss): half the square of the whole response's log ratio.
    auto: k1 in the reward, k3 in the loss."""
    kl_control: Literal["fixed", "proportional", "halving"] = "fixed"
    """Keep kl_coef fixed, or adapt it after each update to keep the KL divergence near kl_target:
    in proportion to the error, or by halving and doubling."""
    whiten_rewards: bool = False
    """Divide the token rewards by their standard deviation over the batch. Near the optimum,
    rewards are almost constant and this amplifies noise."""
    update_epochs: int = bounded(1, 1)
    """Epochs over each batch of responses."""
    num_minibatches: int = bounded(2, 1)
    """Gradient steps per epoch; must divide num_prompts * group_size."""
    context: int = bounded(0, 0)
    """Maximum number of tokens of prompt plus response; 0: as long as the task needs."""
    critic: Literal["auto", "shared", "separate"] = "auto"
    """With ppo_clip: compute values with the policy's decoder (shared) or a second one (separate).
    auto: separate."""
    init: str = ""
    """Directory of a language model run whose decoder is the reference and the start of the policy;
    its architecture replaces the decoder settings. Empty: the task's reference."""
    start: str = ""
    """Directory of a language model run with the same decoder, to start the policy (and the critic)
    from its newest checkpoint; the reference stays that of init or of the task. Empty: the
    reference."""
    reward: tuple[str, ...] = ()
    """Directories of reward models, or Python functions (package.module:function) of the decoded
    texts, (prompts, completions, **columns) -> list of numbers. Their scores replace the task's
    score, which is then used for evaluations only. Write 0.5*runs/reward to weight one; several are
    added."""
    retokenize: bool = False
    """Score with reward models of another tokenizer too, by decoding and encoding all texts."""
    reward_combine: Literal["mean", "min", "mean_minus_variance"] = "mean"
    """How the members of an ensemble (the seeds of a reward model run) are combined."""
    critic_init: Literal["random", "reference", "reward"] = "random"
    """With a separate critic: start it from random weights, from the reference (with a new output
    layer), or from the first reward model."""
    advantage_normalization: Literal["auto", "minibatch", "batch", "none"] = AUTO
    """Normalise advantages over the tokens of each minibatch, over those of the batch, or not at
    all. auto: batch with reinforce_pp, else none."""
    lr_schedule: Literal["linear", "cosine", "constant"] = "linear"
    """Learning-rate schedule over the run: decay to 0 (linear, cosine) or constant."""
    clip_schedule: Literal["linear", "cosine", "constant"] = "constant"
    """Schedule of clip_eps, clip_higher and vf_clip_eps: decay to 0, or constant."""

    def __post_init__(self) -> None:
        try:
            object.__setattr__(self, "task_params", EnvParams(self.task_params))
        except ConfigError as error:
            raise ConfigError(str(error).replace("env_params", "task_params")) from error
        self._choose()
        check_fields(self)
        self._check_sizes()
        self._check_objective()
        self._check_starts()
        self._check_kl()

    def _choose(self) -> None:
        """Set the settings left at auto to the objective's defaults."""
        known = isinstance(self.objective, str) and self.objective in TOKEN_OBJECTIVES
        chosen = TOKEN_OBJECTIVES[self.objective if known else "ppo_clip"]  # check_fields raises
        overlong = chosen.overlong and isinstance(self.response_length, int)
        values = {
            **_DEFAULTS,
            "averaging": chosen.averaging,
            "kl_estimator": "k3" if self.kl_in == "loss" else "k1",
            "overlong_buffer": self.response_length // OVERLONG_SHARE if overlong else 0,
            **chosen.defaults,
        }
        fill_auto(self, values)

    def _check_sizes(self) -> None:
        if self.num_sequences % self.num_minibatches:
            raise ConfigError(
                f"num_prompts * group_size = {self.num_prompts} * {self.group_size} = "
                f"{self.num_sequences} is not divisible by num_minibatches = "
                f"{self.num_minibatches}; use a divisor"
            )
        check_counts(self, "num_prompts, group_size, response_length or total_timesteps")
        if self.overlong_buffer >= self.response_length:
            raise ConfigError(
                f"overlong_buffer = {self.overlong_buffer}: must be below response_length = "
                f"{self.response_length}"
            )

    def _check_objective(self) -> None:
        chosen, name = self.token_objective, f"objective = {self.objective}"
        if chosen.uses_groups and self.group_size == 1:
            raise ConfigError(
                f"{name} with group_size = 1: the baseline is computed from the other responses of "
                "the group; use at least 2, or objective = ppo_clip"
            )
        if self.oversampling > 1 and not chosen.uses_groups:
            raise ConfigError(
                f"oversampling = {self.oversampling}: has no effect with {name}, which does not "
                "compare the responses of a group; leave it out"
            )
        if not chosen.objective.has_critic and self.critic != "auto":
            raise ConfigError(
                f"critic = {self.critic}: has no effect with {name}; leave it out, or choose "
                "objective = ppo_clip"
            )

    def _check_starts(self) -> None:
        for text in self.reward:
            weighted(text)
        if self.reward_combine != "mean" and not self.reward:
            raise ConfigError(
                f"reward_combine = {self.reward_combine}: has no effect without reward; leave it "
                "out"
            )
        if self.tokenizer != AUTO and not is_prompts_file(self.task):
            raise ConfigError(
                f"tokenizer = {self.tokenizer}: has no effect with task = {self.task}, which has "
                "its own; leave it out"
            )
        if self.retokenize and not self.reward:
            raise ConfigError("retokenize = true: has no effect without reward; leave it out")
        if self.start and self.critic_init != "random":
            raise ConfigError(
                f"critic_init = {self.critic_init}: has no effect with start, whose critic is "
                "used; leave it out"
            )
        separate = self.has_critic and self.critic != "shared"
        if self.critic_init != "random" and not separate:
            raise ConfigError(
                f"critic_init = {self.critic_init}: has no effect without a separate critic; leave "
                "it out, or choose objective = ppo_clip with critic = separate"
            )
        if self.critic_init == "reward" and not self.reward:
            raise ConfigError("critic_init = reward: needs reward, the directory of a reward model")

    def _check_kl(self) -> None:
        if self.kl_in == "loss" and self.kl_estimator == "k1":
            raise ConfigError(
                "kl_estimator = k1 with kl_in = loss: the expected gradient of log pi - log pi_ref "
                "is zero, so the penalty has no effect; use k2, k3 or k2_sequence, or kl_in = "
                "reward"
            )
        if self.kl_in == "reward" and self.kl_estimator == "k2_sequence":
            raise ConfigError(
                "kl_estimator = k2_sequence: works only in the loss; use kl_in = loss, or k1, k2 "
                "or k3"
            )

    def check_hparams(self, hparams: Any) -> None:
        """Raise `ConfigError` if the hyperparameters contradict the config."""
        beta = getattr(hparams, "kl_coef", None)
        if beta is None:
            raise ConfigError(
                f"hparams is of type {type(hparams).__name__}: must be an RLHFHParams"
            )
        for f in dataclasses.fields(HParams):
            value = getattr(hparams, f.name)
            if f.name in NEVER_READ and not is_traced(value) and np.any(value != f.default):
                raise ConfigError(
                    f"{f.name} = {value}: has no effect on a language model; leave it out (the "
                    "weight of the KL penalty is kl_coef)"
                )
        if self.kl_control != "fixed" and not is_traced(beta) and not np.all(beta > 0):
            raise ConfigError(
                f"kl_coef = {beta} with kl_control = {self.kl_control}: a weight of 0 stays 0; use "
                "a positive one, or kl_control = fixed"
            )

    def why_unread(self, name: str) -> str | None:
        """Return why a hyperparameter has no effect, or None if it has an effect."""
        if name in NEVER_READ or (name in _ONLY_WITH_CRITIC and not self.has_critic):
            return f"objective = {self.objective}"
        if name == "kl_target" and self.kl_control == "fixed":
            return "kl_control = fixed"
        if name == "kl_horizon" and self.kl_control != "proportional":
            return f"kl_control = {self.kl_control}"
        return None

    @property
    def read_once(self) -> frozenset[str]:
        """Hyperparameters that only the first update reads."""
        return frozenset() if self.kl_control == "fixed" else frozenset({"kl_coef"})

    def make_task(self, **given: Any) -> Any:
        """Make the task that trains a decoder; see `rlhf.make_rlhf_task`."""
        from purejaxppo.rlhf.task import make_rlhf_task  # imports JAX

        given.pop("hparams", None)
        if given:
            raise ConfigError(
                f"{', '.join(given)}: has no effect with an RLHFConfig; pass a problem to "
                "rlhf.make_rlhf_task"
            )
        return make_rlhf_task(self)

    def architecture(self, vocab_size: int, context: int) -> Architecture:
        """The decoder's architecture for a vocabulary size and a context length."""
        critic = "separate" if self.critic == "auto" else self.critic
        return self.decoder(vocab_size, context, critic if self.has_critic else "none")

    @property
    def token_objective(self) -> TokenObjective:
        return TOKEN_OBJECTIVES[self.objective]

    @property
    def has_critic(self) -> bool:
        """Whether a value function is learned."""
        return self.token_objective.objective.has_critic

    @property
    def num_sequences(self) -> int:
        """Responses to learn from per update (N)."""
        return self.num_prompts * self.group_size

    @property
    def batch_size(self) -> int:
        """Tokens generated in one update, if every response has the maximum length."""
        return self.num_sequences * self.oversampling * self.response_length

    @property
    def label(self) -> str:
        """Name of the task."""
        return PurePath(self.task).stem if is_prompts_file(self.task) else self.task

    @property
    def title(self) -> str:
        """The task and the objective."""
        return f"{self.label}, {self.objective}"

    @property
    def batch_in_words(self) -> str:
        """The batch of one update, for progress lines."""
        return (
            f"{self.num_prompts * self.oversampling} prompts x {self.group_size} responses of up "
            f"to {self.response_length} tokens"
        )

    @property
    def words(self) -> Words:
        """Names of samples and results, for progress and reports."""
        return Words(
            "tokens", "tokens", "score", ("score, sampled", "score, greedy"), "responses",
            "have a score that is not finite; check the task's score function",
        )  # fmt: skip


@dataclass(frozen=True)
class RLHFHParams(HParams):
    """`HParams` for language models: with other defaults and further hyperparameters."""

    learning_rate: Scalar = bounded(1e-3, 0, FLOAT_MAX)
    """Initial learning rate (Adam)."""
    gamma: Scalar = bounded(1.0, 0, 1)
    """With ppo_clip: discount factor per token."""
    clip_eps: Scalar | None = bounded(None, 0, open_low=True)  # pyright: ignore
    """Clip the probability ratio to [1 - clip_eps, 1 + clip_eps]. None uses the objective's
    default: 0.2, or 3e-4 for gspo and gspo_token, which use the ratio of the whole response."""
    clip_higher: Scalar | None = bounded(None, 0, open_low=True)
    """Clip ratios above 1 + clip_higher instead. None uses clip_eps, with dapo 1.4 times clip_eps;
    if clip_eps is None too, 4e-4 with gspo and gspo_token."""
    ent_coef: Scalar = bounded(0.0, 0, FLOAT_MAX)
    """Weight of the entropy bonus."""
    max_grad_norm: Scalar = bounded(1.0, 0, open_low=True)
    """Clip gradients to this global norm; inf disables clipping."""
    target_kl: Scalar | None = bounded(None, 0, open_low=True)
    """Skip the remaining epochs of an update once the mean approximate KL divergence of an epoch
    from the policy that generated the responses exceeds this; None never stops."""
    kl_coef: Scalar = bounded(0.05, 0, FLOAT_MAX)
    """Weight beta of the penalty on the KL divergence from the reference; the initial weight if
    kl_control adapts it."""
    kl_target: Scalar = bounded(6.0, 0, FLOAT_MAX, open_low=True)
    """With kl_control: target KL divergence, in nats per response (the mean over responses of the
    sum over tokens)."""
    kl_horizon: Scalar = bounded(10_000.0, 0, FLOAT_MAX, open_low=True)
    """With kl_control = proportional: horizon of the adaptation, in responses."""
    temperature: Scalar = bounded(1.0, 0, FLOAT_MAX, open_low=True)
    """Sampling temperature of training, also used for all log-probabilities. Evaluations sample at
    temperature 1."""
    score_clip: Scalar | None = bounded(None, 0, open_low=True)
    """Clip scores to [-score_clip, score_clip]; None disables clipping."""
    missing_stop_penalty: Scalar = bounded(0.0, 0, FLOAT_MAX)
    """Subtracted from the score of responses without a stop token."""
    missing_stop_score: Scalar | None = bounded(None, -FLOAT_MAX, FLOAT_MAX)
    """Replaces the score of responses without a stop token; None keeps their own score."""

    def with_clip_of(self, objective: TokenObjective) -> "RLHFHParams":
        """Fill in what is None of the clip range."""
        low, high = objective.clip
        if self.clip_eps is not None:
            low, high = self.clip_eps, objective.clip_higher * self.clip_eps
        higher = high if self.clip_higher is None else self.clip_higher
        return dataclasses.replace(self, clip_eps=low, clip_higher=higher)
