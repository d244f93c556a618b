"""The objectives for tokens by name. Does not import JAX, so that settings can be checked."""

import dataclasses
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any

from purejaxppo.objectives.base import Objective, imported
from purejaxppo.objectives.table import OBJECTIVES


@dataclass(frozen=True)
class TokenObjective:
    """An objective for sequences of tokens. Responses to one prompt form a group of K."""

    objective: Objective
    """The policy loss, and whether there is a critic."""
    baseline: Callable[..., Any] | None = None
    """`returns[G, K] -> (baseline[G, K], scale[G, K])`: the advantage is (return - baseline) *
    scale. None uses the critic, or no baseline if there is none."""
    per_token: bool = False
    """Whether a token's advantage is computed from its reward-to-go instead of the return of the
    whole response."""
    averaging: str = "tokens"
    """The default of `RLHFConfig.averaging`."""
    clip: tuple[float, float] = (0.2, 0.2)
    """The defaults of `clip_eps` and `clip_higher`."""
    clip_higher: float = 1.0
    """The default of `clip_higher` as a multiple of `clip_eps`, if that is given."""
    overlong: bool = False
    """Whether `overlong_buffer` is a fifth of `response_length` by default."""
    defaults: Mapping[str, Any] = field(default_factory=lambda: MappingProxyType({}))
    """Values for other settings left at auto."""

    @property
    def name(self) -> str:
        return self.objective.name

    @property
    def uses_groups(self) -> bool:
        """Whether the baseline is computed from the responses to the same prompt."""
        return self.baseline is not None


_CLIP = OBJECTIVES["ppo_clip"]
_LEAVE_ONE_OUT = imported("rlhf.advantages", "leave_one_out")
_STANDARDIZED = imported("rlhf.advantages", "standardized")
_CENTRED = imported("rlhf.advantages", "centred")


def _without_critic(name: str, maximises: str, loss: str | None = None) -> Objective:
    own = _CLIP.loss if loss is None else imported("rlhf.losses", loss)
    return dataclasses.replace(_CLIP, name=name, maximises=maximises, has_critic=False, loss=own)


_PER_TOKEN = "min(r A, clip(r) A) per token"
_ALL = (
    TokenObjective(
        dataclasses.replace(_CLIP, maximises=f"{_PER_TOKEN}, A from a critic by GAE"),
    ),
    TokenObjective(
        _without_critic("reinforce_pp", f"{_PER_TOKEN}, A = reward-to-go, normalised"),
        per_token=True,
        defaults=MappingProxyType({"advantage_normalization": "batch"}),
    ),
    TokenObjective(
        _without_critic("rloo", f"{_PER_TOKEN}, A = return - mean return of the others"),
        _LEAVE_ONE_OUT,
        averaging="constant",
    ),
    TokenObjective(
        _without_critic("grpo", f"{_PER_TOKEN}, A = (return - group mean) / group std"),
        _STANDARDIZED,
        averaging="sequences",
    ),
    TokenObjective(
        _without_critic("dr_grpo", f"{_PER_TOKEN}, A = return - group mean"),
        _CENTRED,
        averaging="constant",
    ),
    TokenObjective(
        _without_critic("dapo", f"{_PER_TOKEN}, A as in grpo, groups with equal scores left out"),
        _STANDARDIZED,
        clip=(0.2, 0.28),
        clip_higher=1.4,
        overlong=True,
        defaults=MappingProxyType({"oversampling": 2}),
    ),
    TokenObjective(
        _without_critic(
            "gspo", "min(s A, clip(s) A), s the response's ratio, A as in grpo",
            "sequence_surrogate",
        ),
        _STANDARDIZED,
        averaging="sequences",
        clip=(3e-4, 4e-4),
    ),
    TokenObjective(
        _without_critic(
            "gspo_token",
            "min(s A, clip(s) A), s the response's ratio, A = reward-to-go - mean return of the "
            "others",
            "token_sequence_surrogate",
        ),
        _LEAVE_ONE_OUT,
        per_token=True,
        averaging="sequences",
        clip=(3e-4, 4e-4),
    ),
)  # fmt: skip
TOKEN_OBJECTIVES: Mapping[str, TokenObjective] = MappingProxyType({x.name: x for x in _ALL})
"""The objectives for tokens by name (`RLHFConfig.objective`)."""
