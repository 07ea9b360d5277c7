"""TASKS: what can be asked, by name. A task makes samples from seeds, watches a run, and scores what it saw."""

from __future__ import annotations

from zoo.eval.tasks.kl import KL
from zoo.eval.tasks.task import Material, Sample, Task

TASKS: dict[str, type[Task]] = {t.name: t for t in (KL,)}

__all__ = ["TASKS", "Material", "Sample", "Task"]
