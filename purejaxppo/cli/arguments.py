"""Check command-line arguments before tyro parses them, so that each error is one line."""

import re
import tomllib
import types
import typing
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple

from purejaxppo.checks import choices_of, fits_choice, in_words, nearest
from purejaxppo.config import Config, ConfigError
from purejaxppo.host.configfile import KINDS
from purejaxppo.rlhf.config import RLHFConfig, is_prompts_file
from purejaxppo.rlhf.text_config import TextConfig
from purejaxppo.suites import names_a_world

_PREFIXES = ("--hparams.", "--run.", "--sweep.")
_ALIASES = {
    "--seeds": "--num-seeds",
    "--lr": "--learning-rate",
    "--env": "--env-id",
    "--algorithm": "--objective",
    "--epochs": "--update-epochs",
    "--timesteps": "--total-timesteps",
    "--entropy-coef": "--ent-coef",
    "--kl-beta": "--kl-coef",
    "--beta": "--kl-coef",
}
"""Option names that other libraries use."""
_PARAMS = re.compile(r"--(env|task)[-_]params\.([^=]+)(?:=(.*))?", re.DOTALL)


Switch = Literal[True]
"""The type of a flag that can only be turned on."""


class Arguments(NamedTuple):
    """The arguments of a command."""

    positional: list[str]
    options: list[str]
    """Options and their values, in tyro's spelling."""
    params: dict[str, float | int | bool]
    """Parameters of the environment or task."""


def read_arguments(command: str, args: Sequence[str], flags: Mapping[str, Any]) -> Arguments:
    """Split arguments into positional ones, options and parameters of the environment or task.

    Args:
        flags: types of the command's options, by name.

    Raises:
        ConfigError: if an option does not exist (the message suggests the nearest one), or a value
            has the wrong type.
    """
    found, left = Arguments([], [], {}), list(args)
    while left:
        word = left.pop(0)
        parameter = _PARAMS.fullmatch(word)
        if parameter and {"env": "env_id", "task": "task"}[parameter[1]] in flags:
            name, text = parameter[2].replace("-", "_"), parameter[3]
            text = _next_value(word, left) if text is None else text
            found.params[name] = _parse_number_or_bool(word, text)
        elif word.startswith("--"):
            found.options.extend(_option(command, word, left, flags))
        elif word.startswith("-") and word != "-":
            found.options.append(word)
        else:
            found.positional.append(word)
    return found


def _option(command: str, word: str, left: list[str], flags: Mapping[str, Any]) -> list[str]:
    """An option with its values, which are removed from `left`."""
    prefix = next((p for p in _PREFIXES if word.startswith(p)), "--")
    typed, equals, text = word.removeprefix(prefix).partition("=")
    name = typed.replace("-", "_")
    plain = f"--{typed.replace('_', '-')}"
    if name in ("help", "version"):
        return [plain]
    negated = name.removeprefix("no_")
    if negated != name and flags.get(negated) is bool:
        if equals:
            raise ConfigError(f"{word}: {plain} takes no value; write {plain} or --{plain[5:]}")
        return [plain]
    if name not in flags:
        raise ConfigError(_unknown(command, word.partition("=")[0], flags))
    hint = flags[name]
    if hint in (bool, Switch):
        return _flag(plain, hint, text if equals else None, left)
    if hint == tuple[int, ...]:
        texts = text.split(",") if equals else []
        while not equals and left and not left[0].startswith("-") and _are_integers(left[0]):
            texts.extend(left.pop(0).split(","))
        if not equals and not texts and left and not left[0].startswith("-"):
            texts.append(left.pop(0))
        return [plain, *(_checked(plain, one, int) for one in texts)]
    value = _checked(plain, text if equals else _next_value(plain, left), hint)
    return [f"{plain}={value}"] if value.startswith("-") else [plain, value]


def _flag(plain: str, hint: Any, text: str | None, left: list[str]) -> list[str]:
    """`--name`, `--name=false` or `--name false` in tyro's spelling."""
    if text is None and left and left[0].lower() in ("true", "false"):
        text = left.pop(0)
    if text is None or text.lower() == "true":
        return [plain]
    off = "leave it out" if hint is Switch else f"write --no-{plain[2:]}"
    if text.lower() != "false":
        raise ConfigError(f"{plain}={text}: must be true or false; to turn it off, {off}")
    return [] if hint is Switch else [f"--no-{plain[2:]}"]


def _next_value(word: str, left: list[str]) -> str:
    if not left or left[0].startswith("--"):
        raise ConfigError(f"{word}: needs a value")
    return left.pop(0)


def _checked(option: str, text: str, hint: Any) -> str:
    """The text as tyro reads it. Raises `ConfigError` if it does not have the option's type."""
    optional = isinstance(hint, types.UnionType) and type(None) in typing.get_args(hint)
    if optional:
        if text.lower() == "none":
            return "None"
        hint = next(h for h in typing.get_args(hint) if h is not type(None))
    choices = choices_of(hint)
    if int in typing.get_args(hint) and text not in choices and not _is_integer(text):
        raise ConfigError(f"{option} {text}: must be a whole number or auto")
    if choices and int not in typing.get_args(hint) and not fits_choice(text, hint):
        near = nearest(text, choices)
        hint_ = f" (did you mean {near}?)" if near else ""
        raise ConfigError(f"{option} {text}: must be one of {in_words(hint)}{hint_}")
    if hint is int and not _is_integer(text):
        raise ConfigError(f"{option} {text}: must be a whole number")
    if hint is float and not _is_number(text):
        raise ConfigError(f"{option} {text}: must be a number{' or none' if optional else ''}")
    return text


def _is_integer(text: str) -> bool:
    return re.fullmatch(r"[+-]?\d(_?\d)*", text) is not None and len(text) < 4000


def _are_integers(text: str) -> bool:
    """Whether a text is one whole number or several, separated by commas."""
    return all(_is_integer(one) for one in text.split(","))


def _is_number(text: str) -> bool:
    try:
        float(text)
    except ValueError:
        return False
    return True


def _parse_number_or_bool(option: str, text: str) -> float | int | bool:
    if text.lower() in ("true", "false"):
        return text.lower() == "true"
    if _is_integer(text):
        return int(text)
    if _is_number(text):
        return float(text)
    raise ConfigError(f"{option.partition('=')[0]} {text}: must be a number, true or false")


def _unknown(command: str, word: str, flags: Mapping[str, Any]) -> str:
    known = {f"--{name.replace('_', '-')}": name for name in flags}
    known |= {f"--no-{n.replace('_', '-')}": n for n, hint in flags.items() if hint is bool}
    last = f"--{word.rpartition('.')[2].lstrip('-')}".replace("_", "-")
    last = _ALIASES.get(last, last)
    near = nearest(last, known, 0.5)
    hint = f"did you mean {near}?" if near else f"`purejaxppo {command} --help` lists them"
    return f"{word}: {command} has no such option; {hint}"


def kind_of_file(args: Sequence[str]) -> str | None:
    """The kind of the config file that is the first argument, if it is one that can be read."""
    if not args or args[0].startswith("-"):
        return None
    path = shipped_configs().get(args[0], Path(args[0]))
    try:
        kind = tomllib.loads(path.read_text(encoding="utf-8")).get("kind")
    except (OSError, ValueError, RecursionError):
        return None
    return kind if isinstance(kind, str) and kind in KINDS else None


def find_config(text: str, default: Any) -> Any:
    """Resolve the positional argument: a file, a shipped config, or an environment or task.

    Args:
        default: the class of the config to make of an environment, task or JSON Lines file.

    Raises:
        ConfigError: if it looks like a file and does not exist.
    """
    path = Path(text)
    try:
        exists = path.is_file()
    except OSError as error:
        raise ConfigError(f"config file {text!r}: {error.strerror}; check the path") from error
    text_run = isinstance(default, type) and issubclass(default, TextConfig)
    if text_run and (text.endswith(".jsonl") or text == "letters"):
        return default(data=text)
    if default is RLHFConfig and is_prompts_file(text):
        return RLHFConfig(task=text)
    if not exists and default is Config and names_a_world(text) and not text.endswith(".toml"):
        return Config(env_id=text)
    if exists or "/" in text or text.endswith(".toml"):
        return path
    shipped = shipped_configs()
    if text in shipped:
        return shipped[text]
    near = nearest(text, shipped, 0.75)
    if near and text.islower():  # names of environments have capital letters
        raise ConfigError(
            f"{text!r}: no such file, shipped config or environment; did you mean {near}?"
        )
    if text_run:
        raise ConfigError(f"{text!r}: no such file or shipped config; give a JSON Lines file "
                          "(.jsonl) or a config file (.toml)")  # fmt: skip
    return RLHFConfig(task=text) if default is RLHFConfig else Config(env_id=text)


def shipped_configs() -> dict[str, Path]:
    """Config files that come with the package, by name."""
    package = Path(__file__).parents[1]
    folders = (package / "configs", package.parent / "configs")  # installed, or a checkout
    folder = next((f for f in folders if f.is_dir()), None)
    return {} if folder is None else {p.stem: p for p in sorted(folder.rglob("*.toml"))}
