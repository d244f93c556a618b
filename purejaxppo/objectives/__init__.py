"""What differs between policy-gradient objectives: one value each, in one table."""

from purejaxppo.objectives.base import KLController, Objective
from purejaxppo.objectives.table import OBJECTIVES

__all__ = ["OBJECTIVES", "KLController", "Objective"]
