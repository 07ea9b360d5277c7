"""How much a method may keep: `budget=1024` or `budget=25%`."""

from __future__ import annotations

import math
import re
from dataclasses import dataclass


@dataclass(frozen=True)
class Budget:
    """Slots a layer and head may own on average, in tokens (`1024`) or as a share of the prompt (`25%`)."""

    number: float
    percent: bool = False

    @staticmethod
    def parse(text: str) -> Budget:
        """Raises ValueError."""
        found = re.fullmatch(r"(\d+(?:\.\d+)?)(%?)", text)
        if not found or (not found[2] and "." in found[1]):
            raise ValueError(f"{text!r} is neither a number of tokens such as 1024 nor a share such as 25%")
        return Budget(float(found[1]), bool(found[2]))

    def tokens(self, prompt: int) -> int:
        return math.ceil(prompt * self.number / 100) if self.percent else int(self.number)

    def __str__(self) -> str:
        return f"{self.number:g}" + "%" * self.percent
