"""The setting `encoder`. Does not import JAX."""

from purejaxppo.checks import ConfigError

ENCODERS = ("mlp", "cnn")


def parse_encoders(text: str) -> dict[str, str]:
    """Parse `NAME=KIND,NAME=KIND`; empty for `auto`, `mlp` and `cnn`.

    Raises:
        ConfigError: if it has another form.
    """
    if text == "auto" or text in ENCODERS:
        return {}
    pairs = [part.strip().partition("=") for part in text.split(",")]
    names = [name for name, _, _ in pairs]
    if not all(name and kind in ENCODERS for name, _, kind in pairs):
        raise ConfigError(
            f"encoder = {text!r}: must be auto, mlp or cnn, or give encoders to entries of the "
            "observation, each mlp or cnn, such as view=cnn,direction=mlp"
        )
    if len(set(names)) < len(names):
        raise ConfigError(f"encoder = {text!r}: name each entry once")
    return {name: kind for name, _, kind in pairs}
