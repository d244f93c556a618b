"""Settings of a run that tunes a language model."""

from dataclasses import dataclass
from typing import Literal

from purejaxppo.checks import FLOAT_MAX, ConfigError, check_fields
from purejaxppo.config import HParams, Scalar, UpdateConfig, bounded
from purejaxppo.rlhf.decoder import Architecture


@dataclass(frozen=True)
class RLHFConfig(UpdateConfig):
    """What fixes the shapes and code paths of a run with tokens as actions."""

    objective: Literal["ppo_clip", "rloo", "grpo", "dr_grpo", "gspo"] = "ppo_clip"
    """ppo_clip: clipped surrogate with a critic; rloo, grpo, dr_grpo, gspo: without, with the
    other responses to the same prompt as the baseline."""
    total_timesteps: int = bounded(400 * 16 * 16 * 8, 1)
    """Tokens to generate, if every response has the maximum length; rounded up to whole updates."""
    num_prompts: int = bounded(16, 1)
    """Prompts per update."""
    group_size: int = bounded(16, 1)
    """Responses to each prompt (K)."""
    response_length: int = bounded(8, 1)
    """Maximum number of tokens of a response (R)."""
    update_epochs: int = bounded(1, 1)
    num_minibatches: int = bounded(2, 1)
    """Gradient steps per epoch; must divide num_prompts * group_size."""
    num_layers: int = bounded(2, 1)
    """Blocks of the decoder."""
    width: int = bounded(64, 1)
    """Width of the residual stream; a multiple of num_heads."""
    num_heads: int = bounded(4, 1)
    num_kv_heads: int = bounded(0, 0)
    """Heads of keys and values, of which each serves several heads of queries; 0: num_heads."""
    mlp_width: int = bounded(0, 0)
    """Width of the hidden layer of a block; 0: 4 times the width."""
    positions: Literal["learned", "rotary"] = "learned"
    norm: Literal["layer", "rms"] = "layer"
    activation: Literal["gelu", "swiglu"] = "gelu"
    tied_embeddings: bool = True
    """Use the embedding of tokens as the last layer too."""
    critic: Literal["auto", "shared", "separate"] = "auto"
    """With ppo_clip: values from the policy's decoder or from a second one (auto)."""
    advantage_normalization: Literal["minibatch", "batch", "none"] = "none"
    lr_schedule: Literal["linear", "cosine", "constant"] = "linear"
    clip_schedule: Literal["linear", "cosine", "constant"] = "constant"

    def __post_init__(self) -> None:
        check_fields(self)
        if self.num_sequences % self.num_minibatches:
            raise ConfigError(
                f"num_prompts * group_size = {self.num_prompts} * {self.group_size} = "
                f"{self.num_sequences} is not divisible by num_minibatches = "
                f"{self.num_minibatches}; use a divisor"
            )
        if self.objective != "ppo_clip" and self.group_size == 1:
            raise ConfigError(
                f"objective = {self.objective} with group_size = 1: the baseline is computed from "
                "the other responses of the group; use at least 2, or objective = ppo_clip"
            )

        if self.objective != "ppo_clip" and self.critic != "auto":
            raise ConfigError(
                f"critic = {self.critic}: has no effect with objective = {self.objective}; leave "
                "it out, or choose objective = ppo_clip"
            )

    def architecture(self, vocab_size: int, context: int) -> Architecture:
        """The decoder for a vocabulary and a maximum length of sequences."""
        critic = "separate" if self.critic == "auto" else self.critic
        return Architecture(
            vocab_size, context, self.num_layers, self.width, self.num_heads, self.num_kv_heads,
            self.mlp_width, self.positions, self.norm, self.activation, self.tied_embeddings,
            critic if self.objective == "ppo_clip" else "none",
        )  # fmt: skip

    @property
    def num_sequences(self) -> int:
        """Responses per update (N)."""
        return self.num_prompts * self.group_size

    @property
    def batch_size(self) -> int:
        """Tokens of one update, if every response has the maximum length."""
        return self.num_sequences * self.response_length

    @property
    def batch_in_words(self) -> str:
        """The batch of one update, for progress lines."""
        return (
            f"{self.num_prompts} prompts x {self.group_size} responses of up to "
            f"{self.response_length} tokens"
        )


@dataclass(frozen=True)
class RLHFHParams(HParams):
    """`HParams` with defaults for language models, and what only they have."""

    learning_rate: Scalar = bounded(3e-3, 0, FLOAT_MAX)
    gamma: Scalar = bounded(1.0, 0, 1)
    ent_coef: Scalar = bounded(0.0, 0, FLOAT_MAX)
    max_grad_norm: Scalar = bounded(1.0, 0, open_low=True)
    kl_coef: Scalar = bounded(0.05, 0, FLOAT_MAX)
    """Weight beta of the penalty on the KL divergence from the reference, which is subtracted from
    the reward of each token: beta (log pi - log pi_ref)."""
    temperature: Scalar = bounded(1.0, 0, FLOAT_MAX, open_low=True)
    """Logits are divided by it when responses are sampled for training, and in every
    log-probability. Evaluations sample at temperature 1."""
