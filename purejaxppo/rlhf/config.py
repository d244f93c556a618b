"""Settings of a run that tunes a language model. Does not import JAX."""

import dataclasses
from dataclasses import dataclass
from typing import Any, Literal

from purejaxppo.checks import FLOAT_MAX, ConfigError, EnvParams, check_fields, is_traced
from purejaxppo.config import AUTO, HParams, Scalar, UpdateConfig, Words, bounded, fill_auto
from purejaxppo.rlhf.architecture import Architecture
from purejaxppo.rlhf.table import TOKEN_OBJECTIVES, TokenObjective

_DEFAULTS: dict[str, Any] = {"oversampling": 1, "advantage_normalization": "none"}
OVERLONG_SHARE = 5
"""The last fifth of a response is DAPO's buffer, as in its paper (section 3.4)."""
_ONLY_WITH_CRITIC = (
    "gamma", "gae_lambda", "vf_coef", "vf_clip_eps", "critic_learning_rate"
)  # fmt: skip
_NEVER = ("kl_beta", "trpo_delta", "cg_damping")


@dataclass(frozen=True)
class RLHFConfig(UpdateConfig):
    """The settings that fix the shapes and code paths of a run with tokens as actions.

    Raises `ConfigError` on construction if a value has the wrong type, is out of range, or
    contradicts another setting.
    """

    objective: Literal[
        "ppo_clip", "reinforce_pp", "rloo", "grpo", "dr_grpo", "dapo", "gspo", "gspo_token"
    ] = "ppo_clip"  # fmt: skip
    """Policy objective. ppo_clip: clipped surrogate with a critic. reinforce_pp: without, with
    advantages normalised over the batch. rloo, grpo, dr_grpo, dapo, gspo, gspo_token: the baseline
    comes from the other responses to the same prompt."""
    task: str = "sort"
    """Prompts and score: sort, reverse, sum, arithmetic or countdown, or package.module:name of
    your own `Problem`, or of a function that makes one. Only a label if a problem is passed."""
    task_params: EnvParams = EnvParams()
    """Arguments of the task by name, such as length; the others keep their defaults."""
    total_timesteps: int = bounded(400 * 16 * 16 * 8, 1)
    """Tokens to generate, counting every response at its maximum length; rounded up to whole
    updates."""
    num_prompts: int = bounded(16, 1)
    """Prompts per update."""
    group_size: int = bounded(16, 1)
    """Responses to each prompt (K)."""
    response_length: int = bounded(8, 1)
    """Maximum number of tokens of a response (R)."""
    oversampling: int = bounded(AUTO, 1, 64)
    """Generate this many times num_prompts prompts, and learn from the first num_prompts of which
    the responses differ in score (dynamic sampling). auto: 2 with dapo, else 1, which keeps all."""
    overlong_buffer: int = bounded(AUTO, 0)
    """Lower the score of responses that enter the last tokens of the maximum length: by 1 at the
    end of this buffer, in proportion within it; 0 does not. auto: a fifth with dapo, else 0."""
    averaging: Literal["auto", "tokens", "sequences", "constant"] = AUTO
    """Average losses over all tokens of a minibatch, over the tokens of each response and then over
    responses, or divide the sum by the maximum number of tokens. auto: what the objective's paper
    does."""
    kl_in: Literal["reward", "loss"] = "reward"
    """Where the penalty on the KL divergence from the reference is: in the reward of each token, or
    in the loss."""
    kl_estimator: Literal["auto", "k1", "k2", "k3", "k2_sequence"] = AUTO
    """Estimator of the divergence: log ratio, half its square, exp(-log ratio) - 1 + log ratio, or
    (only in the loss) half the square of the response's log ratio. auto: k1 in the reward, k3 in
    the loss."""
    kl_control: Literal["fixed", "proportional", "halving"] = "fixed"
    """Keep kl_coef, or adapt it from update to update so that the divergence stays near kl_target:
    in proportion to the error, or by halving and doubling."""
    whiten_rewards: bool = False
    """Divide the rewards of tokens by their standard deviation over the batch. Near the optimum
    rewards are almost constant, and this then amplifies noise."""
    update_epochs: int = bounded(1, 1)
    """Epochs over each batch of responses."""
    num_minibatches: int = bounded(2, 1)
    """Gradient steps per epoch; must divide num_prompts * group_size."""
    num_layers: int = bounded(2, 1)
    """Blocks of the decoder."""
    width: int = bounded(64, 1)
    """Width of the residual stream; a multiple of num_heads."""
    num_heads: int = bounded(4, 1)
    """Heads of queries."""
    num_kv_heads: int = bounded(0, 0)
    """Heads of keys and values, of which each serves several heads of queries; 0: num_heads."""
    mlp_width: int = bounded(0, 0)
    """Width of the hidden layer of a block; 0: 4 times the width."""
    positions: Literal["learned", "rotary"] = "learned"
    """Position embeddings."""
    norm: Literal["layer", "rms"] = "layer"
    """LayerNorm or RMSNorm."""
    activation: Literal["gelu", "swiglu"] = "gelu"
    """Activation of the hidden layers."""
    tied_embeddings: bool = True
    """Use the embedding of tokens as the last layer too."""
    context: int = bounded(0, 0)
    """Maximum number of tokens of prompt and response; 0: as many as the task needs."""
    critic: Literal["auto", "shared", "separate"] = "auto"
    """With ppo_clip: values from the policy's decoder or from a second one (auto)."""
    advantage_normalization: Literal["auto", "minibatch", "batch", "none"] = AUTO
    """Normalise advantages over the tokens of a minibatch, of a batch, or not at all. auto: batch
    with reinforce_pp, else none."""
    lr_schedule: Literal["linear", "cosine", "constant"] = "linear"
    """Learning-rate schedule over the run: decay to 0 (linear, cosine) or constant."""
    clip_schedule: Literal["linear", "cosine", "constant"] = "constant"
    """Schedule of clip_eps, clip_higher and vf_clip_eps: decay to 0, or constant."""

    def __post_init__(self) -> None:
        object.__setattr__(self, "task_params", EnvParams(self.task_params))
        self._choose()
        check_fields(self)
        self._check_sizes()
        self._check_objective()
        self._check_kl()

    def _choose(self) -> None:
        """Set what is left at auto to the objective's defaults."""
        chosen = TOKEN_OBJECTIVES.get(self.objective, TOKEN_OBJECTIVES["ppo_clip"])
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
        if self.batch_size >= 2**31 or self.num_updates >= 2**31:
            raise ConfigError(
                f"{self.batch_size} tokens per update, {self.num_updates} updates: both must be "
                "below 2^31; reduce num_prompts, group_size, response_length or total_timesteps"
            )
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
        if self.kl_control != "fixed" and not is_traced(beta) and not _all_positive(beta):
            raise ConfigError(
                f"kl_coef = {beta} with kl_control = {self.kl_control}: a weight of 0 stays 0; use "
                "a positive one, or kl_control = fixed"
            )

    def why_unread(self, name: str) -> str | None:
        """Return why a hyperparameter has no effect; None if it has one."""
        if name in _NEVER or (name in _ONLY_WITH_CRITIC and not self.has_critic):
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
        """The task of tuning a decoder, see `rlhf.make_rlhf_task`."""
        from purejaxppo.rlhf.task import make_rlhf_task  # imports JAX

        given.pop("hparams", None)
        if given:
            raise ConfigError(
                f"{', '.join(given)}: has no effect with an RLHFConfig; pass a problem to "
                "rlhf.make_rlhf_task"
            )
        return make_rlhf_task(self)

    def architecture(self, vocab_size: int, context: int) -> Architecture:
        """The decoder for a vocabulary and a maximum length of sequences."""
        critic = "separate" if self.critic == "auto" else self.critic
        return Architecture(
            vocab_size, context, self.num_layers, self.width, self.num_heads, self.num_kv_heads,
            self.mlp_width, self.positions, self.norm, self.activation, self.tied_embeddings,
            critic if self.has_critic else "none",
        )  # fmt: skip

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
        return self.task

    @property
    def title(self) -> str:
        """The task and the objective."""
        return f"{self.task}, {self.objective}"

    @property
    def batch_in_words(self) -> str:
        """The batch of one update, for progress lines."""
        return (
            f"{self.num_prompts * self.oversampling} prompts x {self.group_size} responses of up "
            f"to {self.response_length} tokens"
        )

    @property
    def words(self) -> Words:
        """What samples and results are called."""
        return Words("tokens", "tokens", "score", "responses")


def _all_positive(value: Any) -> bool:
    import numpy as np

    return bool(np.all(np.asarray(value) > 0))


@dataclass(frozen=True)
class RLHFHParams(HParams):
    """`HParams` with defaults for language models, and what only they have."""

    learning_rate: Scalar = bounded(3e-3, 0, FLOAT_MAX)
    """Initial learning rate (Adam)."""
    gamma: Scalar = bounded(1.0, 0, 1)
    """With ppo_clip: discount factor per token."""
    clip_eps: Scalar | None = bounded(None, 0, open_low=True)  # pyright: ignore
    """Clip the probability ratio to [1 - clip_eps, 1 + clip_eps]. None uses the objective's own:
    0.2; for gspo, whose ratios are those of whole responses, 3e-4."""
    clip_higher: Scalar | None = bounded(None, 0, open_low=True)
    """Clip ratios above 1 + clip_higher instead; None uses clip_eps, or if that is None too, the
    objective's own: 0.28 for dapo, 4e-4 for gspo."""
    ent_coef: Scalar = bounded(0.0, 0, FLOAT_MAX)
    """Weight of the entropy bonus."""
    max_grad_norm: Scalar = bounded(1.0, 0, open_low=True)
    """Clip gradients to this global norm; inf disables clipping."""
    target_kl: Scalar | None = bounded(None, 0, open_low=True)
    """Skip the remaining epochs of an update once the mean approximate KL of an epoch from the
    policy that generated exceeds this; None never stops."""
    kl_coef: Scalar = bounded(0.05, 0, FLOAT_MAX)
    """Weight beta of the penalty on the KL divergence from the reference; the initial weight if
    kl_control adapts it."""
    kl_target: Scalar = bounded(6.0, 0, FLOAT_MAX, open_low=True)
    """With kl_control: the divergence to aim for, in nats per response (the mean over responses of
    the sum over tokens)."""
    kl_horizon: Scalar = bounded(10_000.0, 0, FLOAT_MAX, open_low=True)
    """With kl_control = proportional: horizon of the adaptation, in responses."""
    temperature: Scalar = bounded(1.0, 0, FLOAT_MAX, open_low=True)
    """Logits are divided by it when responses are sampled for training, and in every
    log-probability. Evaluations sample at temperature 1."""
    score_clip: Scalar | None = bounded(None, 0, open_low=True)
    """Clip scores to [-score_clip, score_clip]; None does not."""
    missing_stop_penalty: Scalar = bounded(0.0, 0, FLOAT_MAX)
    """Subtracted from the score of responses without a stop token."""
    missing_stop_score: Scalar | None = bounded(None, -FLOAT_MAX, FLOAT_MAX)
    """Score of responses without a stop token, in place of their own; None keeps it."""

    def with_clip_of(self, objective: TokenObjective) -> "RLHFHParams":
        """Fill in the objective's own clip range."""
        if self.clip_eps is not None:
            return self
        low, high = objective.clip
        higher = high if self.clip_higher is None else self.clip_higher
        return dataclasses.replace(self, clip_eps=low, clip_higher=higher)
