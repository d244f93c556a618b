"""Settings of runs that learn from texts: fine-tuning, reward models and direct preference
optimisation. Does not import JAX."""

import dataclasses
from dataclasses import dataclass, field
from pathlib import PurePath
from typing import Any, Literal

import numpy as np

from purejaxppo.checks import FLOAT_MAX, ConfigError, check_fields, is_traced
from purejaxppo.config import HParams, Scalar, TaskConfig, Words, bounded
from purejaxppo.rlhf.config import DecoderConfig, check_counts

READ = ("learning_rate", "max_grad_norm", "adam_eps", "weight_decay")
"""Hyperparameters that all of these runs read."""
_NOT_FINITE = "are not finite; use a lower learning_rate"


@dataclass(frozen=True)
class TextConfig(DecoderConfig, TaskConfig):
    """The settings that runs on texts share.

    Raises `ConfigError` on construction if a value has the wrong type or is out of range.
    """

    data: str = "letters"
    """A JSON Lines file, or letters for the shipped example data."""
    tokenizer: str = "letters"
    """Tokenizer: bytes, the name of a task (letters, sort, ...) for the tokenizer of that task, or
    the path of a tokenizer.json."""
    init: str = ""
    """Directory of a run whose decoder is the starting point; its architecture replaces the decoder
    settings. Empty: random weights."""
    held_out: float = field(default=0.1, metadata={"low": 0, "high": 0.9, "open_low": True})
    """Share of the prompts to hold out for evaluation."""
    bad_lines: Literal["error", "skip"] = "error"
    """Stop at lines of the file that cannot be used, or skip them with a warning."""
    total_timesteps: int = bounded(1_000_000, 1)
    """Tokens to train on, padding included; rounded up to whole updates."""
    batch_rows: int = bounded(16, 1)
    """Rows of packed tokens per update."""
    row_length: int = bounded(128, 2)
    """Tokens per row, into which several sequences are packed. Also the maximum length of a
    sequence, and the decoder's context."""
    accumulation: int = bounded(1, 1)
    """Process the rows of an update in this many parts, to save memory; the gradient is the
    same."""
    lr_schedule: Literal["linear", "cosine", "constant"] = "cosine"
    """Learning-rate schedule over the run: decay to 0 (linear, cosine) or constant."""
    warmup: float = field(default=0.05, metadata={"low": 0, "high": 1, "open_low": False})
    """Share of the updates over which the learning rate rises linearly from 0."""

    def __post_init__(self) -> None:
        check_fields(self)
        self.decoder(2, 2)  # raises if its settings contradict each other
        if self.batch_rows % self.accumulation:
            raise ConfigError(
                f"batch_rows = {self.batch_rows} is not divisible by accumulation = "
                f"{self.accumulation}; use a divisor"
            )
        check_counts(self, "batch_rows, row_length or total_timesteps")

    @property
    def reads(self) -> tuple[str, ...]:
        """Hyperparameters that have an effect."""
        return READ

    def check_hparams(self, hparams: Any) -> None:
        """Raise `ConfigError` if a hyperparameter without effect has another value than its
        default."""
        if not isinstance(hparams, TextHParams):
            raise ConfigError(
                f"hparams is of type {type(hparams).__name__}: must be a rlhf.TextHParams"
            )
        for f in dataclasses.fields(hparams):
            value = getattr(hparams, f.name)
            if f.name not in self.reads and not is_traced(value) and np.any(value != f.default):
                raise ConfigError(f"{f.name} = {value}: has no effect on {self.what}; leave it out")

    def why_unread(self, name: str) -> str | None:
        """Return why a hyperparameter has no effect, or None if it has an effect."""
        return None if name in self.reads else self.what

    what = "a run"
    """What is trained, for messages."""

    def make_task(self, **given: Any) -> Any:
        """Make the task; see `rlhf.make_text_task`."""
        from purejaxppo.rlhf.texts import make_text_task  # imports JAX

        given.pop("hparams", None)
        if given:
            raise ConfigError(f"{', '.join(given)}: has no effect with a {type(self).__name__}")
        return make_text_task(self)

    @property
    def batch_size(self) -> int:
        """Tokens per update, padding included."""
        return self.batch_rows * self.row_length

    @property
    def label(self) -> str:
        """Name of the data."""
        return PurePath(self.data).stem or "texts"

    @property
    def title(self) -> str:
        """What is trained, and the data."""
        return f"{self.what} on {self.data}"

    @property
    def batch_in_words(self) -> str:
        """The batch of one update, for progress lines."""
        return f"{self.batch_rows} rows x {self.row_length} tokens"


@dataclass(frozen=True)
class SFTConfig(TextConfig):
    """Supervised fine-tuning: next-token prediction on demonstrations."""

    loss_on: Literal["completion", "all"] = "completion"
    """Learn to predict the tokens of the completion, or those of the prompt too."""

    what = "supervised fine-tuning"

    @property
    def words(self) -> Words:
        return Words(
            "tokens", "tokens", "log-likelihood",
            ("log-likelihood per token", "share of exact completions"), "examples",
            _NOT_FINITE,
        )  # fmt: skip


@dataclass(frozen=True)
class RewardConfig(TextConfig):
    """A reward model: a decoder with a scalar output, trained on preferences."""

    what = "a reward model"

    @property
    def reads(self) -> tuple[str, ...]:
        return (*READ, "centring")

    @property
    def words(self) -> Words:
        return Words(
            "tokens", "tokens", "log-likelihood", ("log-likelihood of labels", "margin"), "pairs",
            _NOT_FINITE,
        )  # fmt: skip


@dataclass(frozen=True)
class DPOConfig(TextConfig):
    """Direct preference optimisation: a policy trained on preferences without a reward model."""

    loss: Literal["sigmoid", "ipo"] = "sigmoid"
    """sigmoid: DPO (Rafailov et al. 2023); ipo: squared loss (Azar et al. 2023)."""

    what = "direct preference optimisation"

    @property
    def reads(self) -> tuple[str, ...]:
        return (*READ, "kl_coef")

    @property
    def words(self) -> Words:
        return Words("tokens", "tokens", "accuracy", ("accuracy", "margin"), "pairs", _NOT_FINITE)


@dataclass(frozen=True)
class TextHParams(HParams):
    """`HParams` of runs on texts: with other defaults and further hyperparameters."""

    learning_rate: Scalar = bounded(1e-3, 0, FLOAT_MAX)
    """Peak learning rate (AdamW)."""
    max_grad_norm: Scalar = bounded(1.0, 0, open_low=True)
    """Clip gradients to this global norm; inf disables clipping."""
    adam_eps: Scalar = bounded(1e-8, 0, FLOAT_MAX, open_low=True)
    """Adam's epsilon."""
    weight_decay: Scalar = bounded(0.01, 0, FLOAT_MAX)
    """Decoupled weight decay of matrices; embeddings included, biases and norms not."""
    centring: Scalar = bounded(0.0, 0, FLOAT_MAX)
    """With a reward model: weight of the squared sum of the two scores of a pair, which centres
    scores at 0."""
    kl_coef: Scalar = bounded(0.1, 0, FLOAT_MAX, open_low=True)
    """With direct preference optimisation: weight beta of the implicit penalty on the KL divergence
    from the reference."""
