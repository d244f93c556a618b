"""Trained reward models as functions of tokens."""

import json
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from purejaxppo.checks import ConfigError
from purejaxppo.host.configfile import load_settings
from purejaxppo.host.rundir import CONFIG, SUMMARY
from purejaxppo.rlhf.architecture import Architecture
from purejaxppo.rlhf.decoder import make_decoder
from purejaxppo.rlhf.generation import observe
from purejaxppo.rlhf.starts import start_of
from purejaxppo.rlhf.text_config import RewardConfig
from purejaxppo.rlhf.tokenizer import Vocabulary
from purejaxppo.types import PyTree

Combine = Literal["mean", "min", "mean_minus_variance"]
"""How an ensemble scores: by the mean of its members, the lowest, or the mean minus the variance
(Coste et al. 2024, arXiv:2310.02743)."""
COMBINE = ("mean", "min", "mean_minus_variance")


class RewardModel(NamedTuple):
    """A reward model, or an ensemble of S. Its scores have mean 0 and standard deviation 1 over the
    completions it was trained on, per member.

        reward = rlhf.load_reward("runs/reward")
        reward(reward.params, tokens, lengths)  # tokens [B, T], padded on the right
    """

    architecture: Architecture
    vocabulary: Vocabulary
    params: PyTree
    """Leaves `[S, ...]`, with the mean and the standard deviation of each member's raw scores."""
    combine: Combine
    run_dir: str

    def __call__(
        self, params: PyTree, tokens: Int[Array, "B T"], lengths: Int[Array, " B"]
    ) -> Float[Array, " B"]:
        """Score sequences: a prompt, a completion and the stop token, if there is one. A pure
        function; padding and the other rows do not change a score."""
        start = jnp.arange(tokens.shape[1])[:, None] == jnp.zeros_like(lengths)
        return self.combined(self.members(params, tokens.T, start, lengths - 1))

    def members(
        self, params: PyTree, tokens: Int[Array, "T B"], start: Any, last: Int[Array, " B"]
    ) -> Float[Array, "S B"]:
        """The normalised scores of all members.

        Args:
            start: where the sequence begins, `[T, B]`; earlier tokens are padding.
            last: index of the last token of each sequence.
        """
        network = make_decoder(self.architecture)

        def score(params: PyTree) -> Array:
            _, _, value = network.apply(params["model"], (), observe(tokens, 1.0), start)
            raw = jnp.take_along_axis(value, last[None], axis=0)[0]
            return (raw - params["mean"]) / params["std"]

        return jax.vmap(score)(params)

    def combined(self, each: Float[Array, "S B"]) -> Float[Array, " B"]:
        """One score of those of the members."""
        if self.combine == "min":
            return jnp.min(each, axis=0)
        mean = jnp.mean(each, axis=0)
        return mean if self.combine == "mean" else mean - jnp.var(each, axis=0)

    def score(
        self, prompts: Sequence[str], responses: Sequence[str], *, empty: bool = False
    ) -> Float[np.ndarray, " N"]:
        """Score texts; the stop token is added to each response.

        Args:
            empty: score empty responses too.

        Raises:
            ConfigError: if a text is empty, has unknown characters, or is too long.
        """
        encode, stop = self.vocabulary.tokenizer.encode, self.vocabulary.stop_token
        rows = []
        for prompt, response in zip(prompts, responses, strict=True):
            if not prompt or not (response or empty):
                raise ConfigError(f"prompt {prompt!r}, response {response!r}: must not be empty")
            try:
                said = encode(response)
            except ConfigError as error:  # tokenizers call every text a prompt
                raise ConfigError(f"response {str(error).removeprefix('prompt ')}") from error
            rows.append([*encode(prompt), *said, stop])
        longest, context = max(map(len, rows)), self.architecture.context
        if longest > context:
            raise ConfigError(
                f"{self.run_dir!r}: scores at most {context} tokens, but a text "
                f"has {longest} with its prompt; shorten it, or train with a larger row_length"
            )
        # Few different widths, so that few programs are compiled.
        width = min(-(-longest // _WIDTHS) * _WIDTHS, context)
        tokens = np.zeros((len(rows), width), np.int32)
        for row, values in zip(tokens, rows, strict=True):
            row[: len(values)] = values
        lengths = jnp.array([len(row) for row in rows])
        model = self._replace(vocabulary=None, params=None)  # pyright: ignore
        return np.asarray(_score(model, self.params, jnp.asarray(tokens), lengths))


_WIDTHS = 32


@partial(jax.jit, static_argnums=0)
def _score(model: RewardModel, params: PyTree, tokens: Array, lengths: Array) -> Array:
    return model(params, tokens, lengths)


def load_reward(run_dir: str | Path, combine: Combine = "mean") -> RewardModel:
    """Load a finished reward model run; all its seeds form an ensemble.

    Args:
        combine: how the members' scores are combined.

    Raises:
        ConfigError: if the directory is not a finished run of `rlhf reward`.
    """
    if combine not in COMBINE:
        raise ConfigError(f"combine = {combine!r}: must be one of {', '.join(COMBINE)}")
    path = Path(run_dir)
    if not isinstance(load_settings(path / CONFIG).config, RewardConfig):
        raise ConfigError(f"{str(run_dir)!r}: is not a reward model; train one with `purejaxppo "
                          "rlhf reward`")  # fmt: skip
    moments = _moments(path)
    found = start_of(str(run_dir), seed=None)
    good = np.array([s for s in range(found.seeds) if s not in moments["failed"]])
    params = {
        "model": jax.tree.map(lambda x: jnp.asarray(x)[good], found.params),
        "mean": jnp.array(moments["mean"], jnp.float32),
        "std": jnp.array(moments["std"], jnp.float32),
    }
    return RewardModel(found.architecture, found.vocabulary, params, combine, str(run_dir))


def _moments(path: Path) -> dict[str, Any]:
    """Mean and standard deviation of the raw scores of each seed that has not failed."""
    try:
        summary = json.loads((path / SUMMARY).read_text(encoding="utf-8"))
        mean, std = summary["score_mean"], summary["score_std"]
    except (OSError, ValueError, KeyError) as error:
        raise ConfigError(
            f"{str(path)!r}: has no finished reward model; finish it with `purejaxppo resume "
            f"{path}`"
        ) from error
    failed = {int(seed) for seed in summary["failed_seeds"]}
    return {"mean": mean, "std": [max(x, 1e-6) for x in std], "failed": failed}
