"""How much a method may keep: `budget=1024`, `budget=25%` or `budget=25%/256`."""

from __future__ import annotations

import math
import re
from dataclasses import dataclass
from decimal import Decimal


@dataclass(frozen=True)
class Budget:
    """Slots a layer and head may own on average: in tokens (`1024`), as a share of the prompt (`25%`), or as a share that is never fewer
    than so many slots (`25%/256`)."""

    number: float
    percent: bool = False
    least: int = 0

    @staticmethod
    def parse(text: str) -> Budget:
        """Raises ValueError."""
        found = re.fullmatch(r"(\d+(?:\.\d+)?)(?:(%)(?:/(\d{1,9}))?)?", text)
        if not found or (not found[2] and "." in found[1]):
            raise ValueError(f"{text!r} is neither a number of tokens such as 1024 nor a share such as 25% or 25%/256")
        return Budget(float(found[1]), bool(found[2]), int(found[3] or 0))

    def tokens(self, prompt: int) -> int:
        return max(math.ceil(prompt * self.number / 100), self.least) if self.percent else int(self.number)

    def __str__(self) -> str:
        return f"{Decimal(str(self.number)).normalize():f}" + "%" * self.percent + (f"/{self.least}" if self.least else "")
