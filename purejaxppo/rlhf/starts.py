"""Decoders of other runs, to start from or to score with."""

import dataclasses
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import jax

from purejaxppo.checks import ConfigError
from purejaxppo.host.configfile import Settings, load_settings
from purejaxppo.host.load import find_states, task_of
from purejaxppo.host.rundir import CONFIG
from purejaxppo.rlhf.architecture import Architecture
from purejaxppo.rlhf.config import DecoderConfig, RLHFConfig
from purejaxppo.rlhf.decoder import make_decoder
from purejaxppo.rlhf.text_config import RewardConfig, TextConfig
from purejaxppo.rlhf.text_learner import make_text_learner
from purejaxppo.rlhf.tokenizer import Tokenizer, Vocabulary, vocabulary_of
from purejaxppo.task import Task
from purejaxppo.types import Learner, PyTree


class Start(NamedTuple):
    """A trained decoder."""

    run_dir: str
    architecture: Architecture
    vocabulary: Vocabulary
    params: PyTree
    seeds: int
    """Number of seeds of the run (S)."""

    def check_vocabulary(self, other: Vocabulary, name: str) -> None:
        """Raise `ConfigError` unless tokens have the same meaning in both."""
        if alphabet_of(self.vocabulary) != alphabet_of(other):
            raise ConfigError(
                f"{self.run_dir!r}: was trained with another tokenizer than {name!r}, so its "
                "tokens have other meanings; use the same tokenizer"
            )


def alphabet_of(vocabulary: Vocabulary) -> tuple[Any, ...]:
    """What determines the meaning of tokens: size, stop token and the text of each token."""
    tokenizer: Tokenizer = vocabulary.tokenizer
    texts = tuple(tokenizer.decode([token]) for token in range(vocabulary.size))
    return type(tokenizer).__name__, vocabulary.size, vocabulary.stop_token, texts


def start_of(run_dir: str, seed: int | None = 0) -> Start:
    """Load the decoder of a language model run from its newest checkpoint.

    Args:
        seed: None loads the parameters of all seeds, leaves `[S, ...]`.

    Raises:
        ConfigError: if the directory has no checkpoint of a language model.
    """
    found, states = find_states(Path(run_dir), "newest", partial(task_to_load, run_dir))
    architecture, vocabulary = decoder_of(found.settings, run_dir)
    # Arrays of a checkpoint are committed to a device, but other seeds may be on other devices.
    params = jax.device_get(states.learner.params)
    if seed is not None:
        params = jax.tree.map(lambda x: x[seed], params)
    return Start(run_dir, architecture, vocabulary, params, found.settings.num_runs)


def task_to_load(run_dir: str, settings: Settings) -> Task:
    """A task with the states of a run, to load them. Runs on texts need no data for this."""
    config = settings.config
    if not isinstance(config, TextConfig):
        return task_of(settings, None, {})
    network = make_decoder(decoder_of(settings, run_dir)[0])

    def no_loss(*_: Any) -> Any:
        raise NotImplementedError("a task to load states cannot train")

    def learner(axis: str | None) -> Learner:
        return make_text_learner(config, no_loss, lambda key, data: network.init(key), axis)

    return Task(config, learner, evaluate=no_loss, with_config=no_loss)


def check_unused(config: DecoderConfig, architecture: Architecture, init: str) -> None:
    """Raise `ConfigError` if a decoder setting differs from its default and from the decoder of
    `init`, which replaces it."""
    for f in dataclasses.fields(DecoderConfig):
        value, used = getattr(config, f.name), getattr(architecture, f.name)
        if value not in (f.default, used):
            raise ConfigError(
                f"{f.name} = {value}: has no effect, since the decoder is that of init = {init}, "
                f"whose {f.name} is {used}; leave one of them out"
            )


def decoder_of(settings: Settings, run_dir: str) -> tuple[Architecture, Vocabulary]:
    """The architecture and the vocabulary of a run's decoder."""
    config = settings.config
    if isinstance(config, RLHFConfig):
        from purejaxppo.rlhf.problem import problem_of
        from purejaxppo.rlhf.task import architecture_of

        problem = problem_of(config)
        vocabulary = Vocabulary(problem.text, problem.vocab_size, problem.stop_token)
        return architecture_of(config, problem), vocabulary
    if not isinstance(config, TextConfig):
        raise ConfigError(f"{run_dir!r}: is a run of {config.label}, not of a language model")
    vocabulary = vocabulary_of(config.tokenizer)
    critic: Any = "shared" if isinstance(config, RewardConfig) else "none"
    if config.init:
        first, _ = decoder_of(load_settings(Path(config.init) / CONFIG), config.init)
        return dataclasses.replace(first, critic=critic), vocabulary
    return config.decoder(vocabulary.size, config.row_length, critic), vocabulary
