"""TASKS: what can be asked, by name. A task makes samples from seeds, watches a run, and scores what it saw."""

from __future__ import annotations

from zoo.eval.tasks.attn import AttentionError
from zoo.eval.tasks.cwe import CommonWords
from zoo.eval.tasks.data import Data
from zoo.eval.tasks.fwe import FrequentWords
from zoo.eval.tasks.kl import KL
from zoo.eval.tasks.lines import Lines
from zoo.eval.tasks.needle import Needle
from zoo.eval.tasks.niah import Needles
from zoo.eval.tasks.passkey import Passkey
from zoo.eval.tasks.ppl import Perplexity
from zoo.eval.tasks.task import Material, Sample, Task
from zoo.eval.tasks.vt import VariableTracking

EVERY = (KL, Perplexity, AttentionError, Passkey, Lines, Needles, Needle, VariableTracking, CommonWords, FrequentWords, Data)
TASKS: dict[str, type[Task]] = {task.name: task for task in EVERY}

__all__ = ["TASKS", "Material", "Sample", "Task"]
