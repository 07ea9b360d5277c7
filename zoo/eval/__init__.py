"""Evaluation: what does a cache cost in quality, bytes and time? `python -m zoo.eval` scores the code that people run (docs/evaluation.md).

tasks/        what is asked: prompts made from seeds, each in a small file that names its paper and format
protocols.py  how a cache reads a prompt, and its bytes and seconds on the way
metrics.py    how an answer or a distribution is scored        stats.py    means, intervals, paired differences
run.py        which rows there are, in which order; one prompt is read as rarely as possible
harness.py    `zoo` as a model of lm-evaluation-harness (docs/evaluation-harness.md)
records.py    the folder of results: written row by row, continued after an interruption
"""
