"""Makes `HParams` and its subclasses pytrees; a separate module, so that `config` needs no JAX."""

import dataclasses
from typing import Any

import jax

from purejaxppo.config import HParams


def register_hparams(kind: type[HParams]) -> None:
    """Make `HParams`, or a subclass, a pytree."""

    def fields(hparams: HParams) -> list[tuple[Any, Any]]:
        names = [f.name for f in dataclasses.fields(hparams)]
        return [(jax.tree_util.GetAttrKey(n), getattr(hparams, n)) for n in names]

    def unflatten(_: None, values: Any) -> HParams:
        """Skips `__post_init__`: values that transforms put into a pytree (gradients, axes) are not
        checked."""
        hparams = object.__new__(kind)
        for f, value in zip(dataclasses.fields(kind), values, strict=True):
            object.__setattr__(hparams, f.name, value)
        return hparams

    jax.tree_util.register_pytree_with_keys(
        kind,
        lambda x: (fields(x), None),
        unflatten,
        lambda x: ([value for _, value in fields(x)], None),
    )


def _all_kinds(kind: type[HParams]) -> list[type[HParams]]:
    return [kind, *(x for sub in kind.__subclasses__() for x in _all_kinds(sub))]


for _kind in _all_kinds(HParams):
    register_hparams(_kind)
