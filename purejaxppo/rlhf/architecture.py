"""The shape of a decoder. Does not import JAX, so that settings can be checked without it."""

from dataclasses import dataclass
from typing import Literal

from purejaxppo.checks import ConfigError


@dataclass(frozen=True)
class Architecture:
    """The shape of a decoder. Static and hashable.

    The defaults are a small GPT-2. `positions = rotary`, `norm = rms`, `activation = swiglu` and
    `num_kv_heads` give the blocks of Llama and Qwen, but with biases in all dense layers.
    """

    vocab_size: int
    """Number of tokens (V)."""
    context: int
    """Maximum number of tokens of a sequence, prompt included (C)."""
    num_layers: int = 2
    width: int = 64
    """Width of the residual stream (W); a multiple of num_heads."""
    num_heads: int = 4
    num_kv_heads: int = 0
    """Number of key/value heads; a divisor of num_heads (grouped-query attention). 0: num_heads."""
    mlp_width: int = 0
    """Hidden width of the MLPs; 0: 4 times the width."""
    positions: Literal["learned", "rotary"] = "learned"
    norm: Literal["layer", "rms"] = "layer"
    activation: Literal["gelu", "swiglu"] = "gelu"
    tied_embeddings: bool = True
    """Share the token embedding with the output layer."""
    critic: Literal["none", "shared", "separate"] = "separate"
    """Source of the values: none (they are 0), the policy's decoder, or a second decoder."""

    def __post_init__(self) -> None:
        if self.width % self.num_heads:
            raise ConfigError(
                f"width = {self.width} is not divisible by num_heads = {self.num_heads}; use a "
                "multiple"
            )
        if self.num_kv_heads and self.num_heads % self.num_kv_heads:
            raise ConfigError(
                f"num_heads = {self.num_heads} is not divisible by num_kv_heads = "
                f"{self.num_kv_heads}; use a divisor"
            )
        if self.positions == "rotary" and self.width // self.num_heads % 2:
            raise ConfigError(
                f"width / num_heads = {self.width // self.num_heads}: rotary positions need an "
                "even number"
            )

    @property
    def kv_heads(self) -> int:
        """Number of key/value heads (K)."""
        return self.num_kv_heads or self.num_heads

    @property
    def head_width(self) -> int:
        """Width of a head (D)."""
        return self.width // self.num_heads
