"""Problems whose prompts come from a JSON Lines file."""

from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import jax.numpy as jnp

from purejaxppo.checks import ConfigError
from purejaxppo.host.configfile import load_settings
from purejaxppo.host.rundir import CONFIG
from purejaxppo.rlhf.config import RLHFConfig
from purejaxppo.rlhf.problem import Problem, Sample, pad_left
from purejaxppo.rlhf.problems import random_reference
from purejaxppo.rlhf.records import Prompt, read_prompts, split
from purejaxppo.rlhf.tokenizer import Vocabulary, vocabulary_of

PARAMS = {"held_out": 0.1, "skip_bad_lines": False}
"""The entries of `config.task_params` and their defaults."""


def problem_of_file(config: RLHFConfig) -> Problem:
    """The problem of responding to the prompts in `config.task`. Without `config.reward`, it has no
    score.

    Raises:
        ConfigError: if the file, the tokenizer or an entry of `config.task_params` cannot be used.
    """
    given = PARAMS | dict(config.task_params)
    if unknown := sorted(set(given) - set(PARAMS)):
        raise ConfigError(
            f"task_params.{unknown[0]}: a file of prompts takes only {', '.join(PARAMS)}"
        )
    bad_lines = "skip" if given["skip_bad_lines"] else "error"
    every = read_prompts(config.task, bad_lines=bad_lines)
    vocabulary = _vocabulary(config)
    parts = split(every, given["held_out"])
    train, later = (_encoded(vocabulary, part) for part in parts)
    rows = jnp.arange(len(every), dtype=jnp.int32)
    count = len(parts[0])
    ordered = [record for part in parts for record in part]
    return Problem(
        name=Path(config.task).stem,
        prompts=pad_left(train),
        score=unscored,
        vocab_size=vocabulary.size,
        stop_token=vocabulary.stop_token,
        reference=random_reference,
        extras={"row": rows[:count]},
        held_out=pad_left(later),
        held_out_extras={"row": rows[count:]},
        tokenizer=vocabulary.tokenizer,
        extras_of=partial(_rows_of, ordered),
        columns=tuple(record.columns for record in ordered),
    )


def _rows_of(records: Sequence[Prompt], prompts: Sequence[str]) -> dict[str, Any]:
    """The rows of prompts, whose columns a reward function may read."""
    if not any(record.columns for record in records):
        return {"row": jnp.zeros(len(prompts), jnp.int32)}
    rows = {record.prompt: i for i, record in enumerate(records)}
    for prompt in prompts:
        if prompt not in rows:
            raise ConfigError(
                f"prompt {prompt[:80]!r}: is not in the file of prompts, so its columns are unknown"
            )
    return {"row": jnp.array([rows[prompt] for prompt in prompts], jnp.int32)}


def unscored(sample: Sample) -> Any:
    """The score of a problem that has none: zeros."""
    return jnp.zeros(sample.prompts.lengths.shape)


def _vocabulary(config: RLHFConfig) -> Vocabulary:
    """That of `config.tokenizer`, or else of `config.init`, or else bytes."""
    if config.tokenizer != "auto":
        return vocabulary_of(config.tokenizer)
    if not config.init:
        return vocabulary_of("bytes")
    from purejaxppo.rlhf.starts import decoder_of

    return decoder_of(load_settings(Path(config.init) / CONFIG), config.init)[1]


def _encoded(vocabulary: Vocabulary, prompts: list[Prompt]) -> list[list[int]]:
    found = [vocabulary.tokenizer.encode(x.prompt) for x in prompts]
    empty = next((x.prompt for x, row in zip(prompts, found, strict=True) if not row), None)
    if empty is not None:
        raise ConfigError(f"prompt {empty[:80]!r}: has no tokens; remove the line")
    return found
