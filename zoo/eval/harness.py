"""python -m zoo.eval.harness: lm-evaluation-harness with this code as its model `zoo`. Everything else is lm_eval's own command line.

    python -m zoo.eval.harness --model zoo --model_args model=smollm2-135m,attn=subgen:budget=25%,when=prompt --tasks arc_easy --limit 100
    python -m zoo.eval.harness --help

lm_eval looks for models in its own registry only: it reads no entry points, and `--include_path` is for tasks. So this module registers
`zoo` and then calls lm_eval's main; from Python, `import zoo.eval.harness` before `lm_eval.simple_evaluate(model="zoo", ...)` will do.
zoo/eval/harness_lm.py says what is measured. Needs the extra `harness`.
"""

from __future__ import annotations

import sys

from zoo import cli
from zoo.errors import ZooError

TARGET = "zoo.eval.harness_lm:ZooLM"


def register() -> None:
    """Make lm_eval know the model `zoo`. Raises ZooError where lm_eval is not installed."""
    try:
        import lm_eval.models  # noqa: F401  lm_eval's own, which it leaves out once its registry holds any other
        from lm_eval.api.registry import model_registry
    except ImportError as e:
        raise ZooError(f"lm_eval cannot be imported ({e}); install it with pip install -e '.[harness]'") from None
    if "zoo" not in model_registry:
        model_registry.register("zoo", target=TARGET)


def main(argv: list[str] | None = None) -> None:
    """lm_eval's command line, with `zoo` among its models."""
    register()
    from lm_eval.__main__ import cli_evaluate

    sys.argv = ["lm_eval", *(sys.argv[1:] if argv is None else argv)]
    cli_evaluate()


if __name__ == "__main__":
    sys.exit(cli.run(main))
else:
    register()
