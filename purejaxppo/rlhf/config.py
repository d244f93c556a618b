"""Settings of a run that tunes a language model."""

from dataclasses import dataclass
from typing import Any, Literal

from purejaxppo.checks import ConfigError
from purejaxppo.config import HParams, UpdateConfig
from purejaxppo.rlhf.decoder import Architecture


@dataclass(frozen=True)
class RLHFConfig(UpdateConfig):
    """What fixes the shapes and code paths of a run with tokens as actions."""

    objective: Literal["ppo_clip", "rloo", "grpo", "dr_grpo", "gspo"] = "ppo_clip"
    """ppo_clip: clipped surrogate with a critic; rloo, grpo, dr_grpo, gspo: without, with the
    other responses to the same prompt as the baseline."""
    total_timesteps: int = 400 * 16 * 16 * 8
    """Tokens to generate, if every response has the maximum length; rounded up to whole updates."""
    num_prompts: int = 16
    """Prompts per update."""
    group_size: int = 16
    """Responses to each prompt (K)."""
    response_length: int = 8
    """Maximum number of tokens of a response (R)."""
    update_epochs: int = 1
    num_minibatches: int = 2
    """Gradient steps per epoch; must divide num_prompts * group_size."""
    num_layers: int = 2
    """Blocks of the decoder."""
    width: int = 64
    """Width of the residual stream; a multiple of num_heads."""
    num_heads: int = 4
    num_kv_heads: int = 0
    """Heads of keys and values, of which each serves several heads of queries; 0: num_heads."""
    mlp_width: int = 0
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
        for name in (
            "total_timesteps", "num_prompts", "group_size", "response_length", "update_epochs",
            "num_minibatches",
        ):  # fmt: skip
            if getattr(self, name) < 1:
                raise ConfigError(f"{name} = {getattr(self, name)}: must be at least 1")
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

    learning_rate: Any = 3e-3
    gamma: Any = 1.0
    ent_coef: Any = 0.0
    max_grad_norm: Any = 1.0
    kl_coef: Any = 0.05
    """Weight beta of the penalty on the KL divergence from the reference, which is subtracted from
    the reward of each token: beta (log pi - log pi_ref)."""
    temperature: Any = 1.0
    """Logits are divided by it when responses are sampled, and in every log-probability."""
