"""`niah`: needles in a haystack, in RULER's form (arXiv 2404.06654; its niah.py and constants.py).

    single      one number for one key                  multikey     four keys, one of them asked for
    multivalue  one key with four numbers               multiquery   four keys, all of them asked for
Needles "One of the special magic numbers for {adjective}-{noun} is: {seven digits}." stand between lines of noise (`passkey`'s filler), or
with --text between its sentences, from a random one on, at distinct ones of 40 depths. Where one number is asked for, the prompt is in
the singular. It ends with the beginning of the answer. --depths puts the needle of `single` there.
128 tokens are generated (RULER's number); right: the share of the numbers that stand in them.
"""

from __future__ import annotations

from zoo.errors import ZooError
from zoo.eval.tasks.passkey import FILLER
from zoo.eval.tasks.task import Answers, Draft, Material, Sample, at_depths, depth_of, fit, joined
from zoo.eval.tasks.words import pair

KINDS = {"single": (1, 1, 1), "multikey": (4, 1, 1), "multivalue": (1, 4, 1), "multiquery": (4, 1, 4)}  # keys, values of each, queries
BEFORE = (
    "Some special magic {what} are hidden within the following text. Make sure to memorize it. I will quiz you about the {what} "
    "afterwards.\n"
)
AFTER = (
    "\nWhat are all the special magic {what} for {query} mentioned in the provided text? The special magic {what} for {query} mentioned in "
    "the provided text are"
)
DEPTHS = [round(100 * i / 39) / 100 for i in range(40)]


def singular(template: str) -> str:
    return template.replace("Some", "A").replace("are all", "is").replace("are", "is")


class Needles(Answers):
    name = "niah"
    new_tokens = 128

    def variants(self, material: Material) -> list[str]:
        chosen = material.variants.get(self.name) or tuple(KINDS)
        if unknown := [v for v in chosen if v not in KINDS]:
            raise ZooError(f"--niah {unknown[0]!r} is unknown; choose of {', '.join(KINDS)}")
        return [v for kind in chosen for v in (at_depths(kind, material.depths) if kind == "single" else [kind])]

    def sample(self, material: Material, variant: str, length: int, number: int) -> Sample:
        kind = variant.partition(",")[0]
        keys, values, queries = KINDS[kind]

        def write(parts: int) -> Draft:
            r = material.random(self.name, variant, length, number)
            pairs = [(pair(r), [str(r.randint(10**6, 10**7 - 1)) for _ in range(values)]) for _ in range(keys)]
            needles = [f"One of the special magic numbers for {key} is: {value}." for key, some in pairs for value in some]
            r.shuffle(needles)
            asked = r.sample(pairs, queries)
            expected = [value for _, some in asked for value in some]
            if material.own:
                sentences = material.passage(parts, r)
                depths = [depth_of(variant, d) for d in r.sample(DEPTHS, len(needles))]
                places = sorted(int(len(sentences) * d) for d in depths)
            else:
                sentences = [FILLER] * parts
                places = sorted(min(parts, int(depth_of(variant, p / parts) * parts)) for p in r.sample(range(parts), len(needles)))
            for place, needle in zip(reversed(places), needles, strict=True):
                sentences.insert(place, needle)
            one = len(expected) == 1
            before, after = (singular(BEFORE), singular(AFTER)) if one else (BEFORE, AFTER)
            about = {"what": "number" if one else "numbers", "query": joined([key for key, _ in asked])}
            context = before.format(**about) + (" " if material.own else "\n").join(sentences)
            return Draft(context, after.format(**about), " " + joined(expected), expected)

        return fit(material.tokenizer, length, keys * values, write, f"{self.name} {kind}")
