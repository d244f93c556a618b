"""The policy-gradient objectives, as values in one table."""

from purejaxppo.objectives.base import KLController, Objective
from purejaxppo.objectives.table import OBJECTIVES

__all__ = ["OBJECTIVES", "KLController", "Objective"]
