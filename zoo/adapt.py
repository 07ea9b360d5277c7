"""python -m zoo.calibrate pod MODEL --text FILE --adapt FOLDER: a model's weights, trained so that `pod` costs it less.

    loss = mean over tokens of KL(p || p_pod)        p the model's own next-token distribution with the full cache, p_pod the adapted one's
Distillation from the model itself: what it knows stays, and text is all that is needed. Trained are the projections of attention in every
layer: queries, keys, values, output. Matrix products run in bfloat16; the weights themselves and Adam's averages are float32. Attention is
the dense, differentiable form of `pod` (zoo/attention/pod.py), with the groups of the model's table.

The state is saved in FOLDER.training every few minutes and at Ctrl-C, and a run that was stopped goes on from there, with the same draws.
FOLDER is a checkpoint as any other; it appears whole, at the end. Its pod.json says how it was made, and holds the groups: the model is
read by these from then on, whatever another calibration finds.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import re
import shutil
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from zoo.attention.pod import Pod
from zoo.checkpoint import INDEX
from zoo.errors import ZooError
from zoo.hub import SMALL
from zoo.random import uniform

TRAINED = r"self_attn\.|attention\."  # Llama's and Mistral's names, GPT-NeoX's
HELD_OUT = 8  # passages
SAVE_EVERY = 180.0  # seconds
COPIED = {*SMALL, "LICENSE", "README.md"} - {INDEX}  # what a checkpoint has beside its weights


@dataclass(frozen=True)
class Plan:
    """minutes: of training, at most; steps: at most; tokens: of a passage, one a step; lr: Adam's, at its highest after a twentieth
    of the time, then falling to nothing; seed: which passages are drawn."""

    minutes: float = 30.0
    steps: int = 2**31
    tokens: int = 1024
    lr: float = 1e-3
    seed: int = 0


class Adaptation:
    """A model under training: `lm` in float32, `teacher` the same model as it was. source: what else a run that goes on must share."""

    def __init__(self, lm: Any, teacher: Any, method: Pod, groups: Tensor, source: str = "") -> None:
        self.lm, self.teacher, self.method, self.groups, self.source = lm, teacher, method, groups, source
        self.trained: dict[str, nn.Parameter] = {
            name: p.requires_grad_() for name, p in lm.model.named_parameters() if re.search(TRAINED, name)
        }
        self.optimizer = torch.optim.AdamW(self.trained.values(), betas=(0.9, 0.98), weight_decay=0.0)
        self.step, self.seconds, self.whole = 0, 0.0, True  # whole: not amid a change of the weights

    def divergence(self, ids: Tensor) -> Tensor:
        """KL(full || pod) in nats after each token of ids (B, T): (B, T)."""
        model = self.lm.model
        with torch.no_grad():
            true = self.teacher.model(ids).log_softmax(-1)
        with torch.autocast("cpu", torch.bfloat16):
            hidden = model.hidden(ids, None, self.method.dense(self.groups, self.lm.config.sliding_window))
            logits = model.logits(hidden)
        return (true.exp() * (true - logits.float().log_softmax(-1))).sum(-1)

    @torch.no_grad()
    def held_out(self, passages: Sequence[Sequence[int]]) -> float:
        """Mean KL after tokens that have something distant."""
        window = self.lm.config.sliding_window
        found = [self.divergence(torch.tensor([list(ids)]))[0, self.method.reaches(torch.arange(len(ids)), window)] for ids in passages]
        return float(torch.cat(found).mean())

    def train(self, text: Sequence[int], plan: Plan, folder: Path) -> None:
        """Until the plan's time or steps are over. A step draws a passage of the text by (seed, step). Ctrl-C saves the state first."""
        try:
            self.steps(text, plan, folder)
        except KeyboardInterrupt:
            if self.whole:
                self.save(folder)
            raise

    def steps(self, text: Sequence[int], plan: Plan, folder: Path) -> None:
        start, saved, mean = time.perf_counter() - self.seconds, time.perf_counter(), math.nan
        while (done := max(self.seconds / (60 * plan.minutes), self.step / plan.steps)) < 1:
            at = int(float(uniform(plan.seed, torch.tensor(self.step))) * (len(text) - plan.tokens + 1))
            ids = torch.tensor([list(text[at : at + plan.tokens])])
            for part in self.optimizer.param_groups:
                part["lr"] = plan.lr * min(1.0, 20 * done) * 0.5 * (1 + math.cos(math.pi * done)) if self.step else 0.0
            loss = self.divergence(ids).mean()
            if not math.isfinite(value := float(loss.detach())):
                raise ZooError(f"the loss of step {self.step + 1} is {value}; try a smaller --lr")
            loss.backward()  # type: ignore[no-untyped-call]
            nn.utils.clip_grad_norm_(self.trained.values(), 1.0)
            self.whole = False
            self.optimizer.step()
            self.step, self.seconds, self.whole = self.step + 1, time.perf_counter() - start, True
            self.optimizer.zero_grad()
            mean = value if math.isnan(mean) else 0.95 * mean + 0.05 * value
            if self.step % 10 == 0:
                print(f"step {self.step}, {self.seconds / 60:.1f} minutes: KL {mean:.3f}", file=sys.stderr, flush=True)
            if time.perf_counter() - saved > SAVE_EVERY:
                self.save(folder)
                saved = time.perf_counter()

    # Between runs

    def state(self) -> dict[str, Tensor]:
        """All that training has changed: weights, and Adam's averages."""
        tensors = {name: p.detach() for name, p in self.trained.items()}
        for name, p in self.trained.items():
            tensors |= {f"{name}/{key}": t for key, t in self.optimizer.state.get(p, {}).items()}
        return tensors

    def kind(self) -> str:
        """What a saved state must share with the run that goes on from it."""
        return f"{self.method} {self.groups.tolist()} {self.lm.config} {self.source}"

    def save(self, folder: Path) -> None:
        """The state, whole or not at all."""
        from safetensors.torch import save_file

        folder.mkdir(parents=True, exist_ok=True)
        tmp = folder / f"state.{os.getpid()}.tmp"
        try:
            about = {"step": str(self.step), "seconds": str(self.seconds), "kind": self.kind()}
            save_file({name: t.contiguous() for name, t in self.state().items()}, tmp, metadata=about)
            os.replace(tmp, folder / "state.safetensors")
        finally:
            tmp.unlink(missing_ok=True)

    def resume(self, folder: Path) -> bool:
        """Go on from a saved state, if there is one. Raises ZooError where it is another run's."""
        from safetensors import SafetensorError, safe_open

        path = folder / "state.safetensors"
        if not path.exists():
            return False
        try:
            with safe_open(path, "pt") as f:
                about, tensors = f.metadata(), {name: f.get_tensor(name) for name in f.keys()}  # noqa: SIM118
        except (OSError, SafetensorError) as e:
            raise ZooError(f"cannot read {path}: {e}; remove it to begin again") from e
        if about.get("kind") != self.kind():
            raise ZooError(f"{path} is of another model or text, other groups or other options; remove {folder} to begin again")
        for name, p in self.trained.items():
            p.data.copy_(tensors[name])
            state = {key.rpartition("/")[2]: t for key, t in tensors.items() if key.startswith(f"{name}/")}
            if state:
                self.optimizer.state[p] = state
        self.step, self.seconds = int(about["step"]), float(about["seconds"])
        return True


def write(lm: Any, source: Path, out: Path, dtype: torch.dtype, about: dict[str, Any]) -> None:
    """The checkpoint in folder `source` with lm's weights, in a folder of its own that appears whole; pod.json says how it was made."""
    from safetensors.torch import save_file

    work = out.with_name(f"{out.name}.{os.getpid()}.tmp")
    work.mkdir(parents=True)
    try:
        for file in source.iterdir():
            if file.is_file() and file.name in COPIED:
                shutil.copyfile(file, work / file.name)
        tensors = {name: p.detach().to(dtype).contiguous() for name, p in lm.model.named_parameters()}
        save_file(tensors, work / "model.safetensors", metadata={"format": "pt"})
        (work / "pod.json").write_text(json.dumps(about) + "\n")
        work.rename(out)
    finally:
        shutil.rmtree(work, ignore_errors=True)


def run(args: Any, text: str) -> dict[str, Any]:
    """What the command line does: train on the text but for its end, which says what came of it."""
    import zoo
    from zoo import hub
    from zoo.attention.pod import load_groups
    from zoo.attention.tables import own_table
    from zoo.checkpoint import lay_out
    from zoo.layer_groups import check
    from zoo.tokenizer import Tokenizer

    source, out, method = hub.find(args.model), Path(args.adapt), Pod(args.first, args.recent)
    if out.exists():
        raise ZooError(f"{out} is there already; give another folder, or remove it")
    config = lay_out(source).config
    if own_table("pod", config) is not None:
        raise ZooError(f"{source} is adapted already; start from the original")
    groups = load_groups(config)
    if bool((groups == torch.arange(len(groups))[:, None]).all()):
        raise ZooError("no layer shares keys with another: there is nothing to train for; calibrate pod with a lower --threshold")
    tokens = min(args.tokens or 1024, config.max_position_embeddings)
    check(method, tokens, config.sliding_window)
    ids = Tokenizer.load(source).encode(text)
    held_out = [ids[i : i + tokens] for i in range(len(ids) - tokens, tokens - 1, -tokens)][:HELD_OUT]
    train = ids[: len(ids) - tokens * len(held_out)]
    if not held_out:
        raise ZooError(f"the text has {len(ids)} tokens; two passages of {tokens} are needed: a longer text, or fewer --tokens")
    teacher = zoo.load(str(source), dtype=args.dtype or "bfloat16", compile="off")
    lm = zoo.load(str(source), dtype="float32", compile="off")
    folder = out.with_name(out.name + ".training")
    digest = hashlib.sha256(text.encode()).hexdigest()
    work = Adaptation(lm, teacher, method, groups, f"{source.resolve()} {tokens} {args.lr} {digest}")
    before = work.held_out(held_out)
    if work.resume(folder):
        print(f"going on from {folder}, step {work.step}", file=sys.stderr)
    else:
        print(f"{method}: KL from full {before:.3f} nats on {len(held_out)} held-out passages of {tokens} tokens", file=sys.stderr)
    work.train(train, Plan(args.minutes, args.steps, tokens, args.lr), folder)
    after = work.held_out(held_out)
    about = {
        "before": before,
        "after": after,
        "steps": work.step,
        "tokens": tokens,
        "held_out": tokens * len(held_out),
        "attn": str(method),
        "groups": groups.tolist(),
    }
    write(lm, source, out, teacher.dtype, about)
    shutil.rmtree(folder, ignore_errors=True)
    print(f"{method}: KL {before:.3f} before, {after:.3f} after {work.step} steps", file=sys.stderr)
    return {"path": str(out), **about}
