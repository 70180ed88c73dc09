"""Which models of the installed transformers can be cut, and along which axes.

    python benchmarks/families.py [TYPE ...] [--out docs/families.md] [--seconds 300]

derives the table of every causal language model class from the default config of its class (see
EXAMPLES for those whose defaults are no model), proves each axis on a tiny random copy, and writes
the page. A type that takes longer than `--seconds` is listed as such. Nothing is downloaded. What
was derived before is read from the cache folder, so a second run is quick.
"""

from __future__ import annotations

import argparse
import contextlib
import signal
import time
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import transformers
from transformers import CONFIG_MAPPING, logging
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from regrow import families
from regrow.errors import UserError

AXES = ("layers", "mlp", "heads", "kv_heads", "hidden", "vocab", "experts", "expert_mlp")
EXAMPLES: dict[str, dict[str, Any]] = {
    "hunyuan_v1_dense": {"head_dim": 128},
    "hunyuan_v1_moe": {"head_dim": 128},
    "ministral": {"head_dim": 128},
    "nemotron": {"num_key_value_heads": 8},
}
"""Fields without which the default config of a class builds no model."""
HERE = Path(__file__).parents[1]
PAGE = """# Which models can be cut

This page lists every class of causal language models in transformers {version} (torch {torch}),
and the axes along which regrow cuts it. It is made by

    python benchmarks/families.py

Eight types have a table that is written by hand: {typed}. The tables of all other types are
derived from their class, and this page was derived for those eight too. regrow builds a tiny copy
of a config, changes one size after the other, and sees which axes of which tensors change. Then
it proves each axis: units that are zero are removed from a tiny random model, and the logits must
stay the same. A layer is removed, and the logits must be those of the model that skips it. The
cut folder is opened by the stock class. An axis is offered only if this proof succeeds. It runs
for your own config, once ([how to read what it finds](add-a-family.md)).

`yes` means proven, `no` means refused, and an empty cell means that the model has no such axis.
Under *packed*, `no` means that documents in one sequence see each other: regrow then refuses to
measure or to train the model on packed text. Under *repair*, `no` means that there is no repair
after a cut.

**{decoders} types have a table. {some} of them can be cut in depth and in the MLP or the experts,
and {every} along every axis that they have.** Deriving and proving one takes {median:.0f} s at
the median, and {longest:.0f} s at most, on one thread of a shared CPU.

{table}

## Why not

{reasons}

## No table

{others}
"""


@dataclass
class Result:
    """What was found out about one type."""

    name: str
    proven: tuple[str, ...] = ()
    axes: tuple[str, ...] = ()
    refused: dict[str, str] = field(default_factory=dict)
    odd: tuple[str, ...] = ()
    reason: str = ""
    seconds: float = 0.0


class TooLongError(BaseException):  # model code is run under `except Exception`
    """A type took longer than it may."""


@contextlib.contextmanager
def at_most(seconds: int) -> Iterator[None]:
    """Raise TooLongError in this context after so many seconds."""

    def stop(*_: Any) -> None:
        raise TooLongError

    signal.signal(signal.SIGALRM, stop)
    signal.alarm(seconds)
    try:
        yield
    finally:
        signal.alarm(0)


def examine(name: str, seconds: int) -> Result:
    """Derive and prove the table of one type's default config."""
    start = time.perf_counter()
    try:
        with at_most(seconds):
            config = CONFIG_MAPPING[name](**EXAMPLES.get(name, {})).to_dict()
            inner = config.get("text_config")
            if isinstance(inner, dict) and "num_attention_heads" not in config:
                kind = inner.get("model_type", "another type")
                return Result(name, reason=f"multimodal; its text model alone is a {kind}")
            found = families.derived(config)
    except TooLongError:
        return Result(name, reason=f"not derived within {seconds} s")
    except UserError as error:
        return Result(name, reason=str(error).partition("derived: ")[2] or str(error))
    except Exception as error:
        first = (str(error).strip().splitlines() or [""])[0]
        return Result(
            name, reason=f"its default config is no model: {type(error).__name__} {first}"
        )
    axes = tuple(axis for axis in AXES if axis in found.family.config_keys)
    taken = time.perf_counter() - start
    return Result(name, found.proven, axes, dict(found.family.refused), found.odd, "", taken)


def cell(result: Result, axis: str) -> str:
    """The table's cell for one axis of one type."""
    return "" if axis not in result.axes else "yes" if axis in result.proven else "no"


def table(results: list[Result]) -> str:
    """One row for each type with a table."""
    lines = ["| type | " + " | ".join(AXES) + " | packed | repair |"]
    lines.append("|---|" + "---|" * (len(AXES) + 2))
    for result in results:
        cells = [cell(result, axis) for axis in AXES]
        cells += ["no" if "documents" in result.odd else "yes"]
        cells += ["no" if "repair" in result.refused else "yes"]
        lines.append(f"| {result.name} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def reasons(results: list[Result]) -> str:
    """One line for each type with a refused axis."""
    lines = []
    for result in results:
        by_reason: dict[str, list[str]] = defaultdict(list)
        for axis, reason in result.refused.items():
            if axis == "repair" or axis in result.axes:
                by_reason[reason.replace("model.layers.{layer}.", "")].append(axis)
        if by_reason:
            said = "; ".join(f"{', '.join(axes)}: {why}" for why, axes in by_reason.items())
            lines.append(f"- **{result.name}**: {said}.")
    return "\n".join(lines)


def others(results: list[Result]) -> str:
    """The types without a table, by reason."""
    by_reason: dict[str, list[str]] = defaultdict(list)
    for result in results:
        by_reason[result.reason].append(result.name)
    return "\n".join(f"- {', '.join(names)}: {reason}." for reason, names in by_reason.items())


def page(results: list[Result]) -> str:
    """The whole page."""
    with_table = [result for result in results if not result.reason]
    some = [r for r in with_table if "layers" in r.proven and {"mlp", "experts"} & {*r.proven}]
    every = [r for r in with_table if set(r.proven) == set(r.axes)]
    seconds = sorted(result.seconds for result in with_table)
    return PAGE.format(
        version=transformers.__version__,
        torch=torch.__version__.partition("+")[0],
        typed=", ".join(families.typed()),
        decoders=len(with_table),
        some=len(some),
        every=len(every),
        median=seconds[len(seconds) // 2],
        longest=seconds[-1],
        table=table(with_table),
        reasons=reasons(with_table),
        others=others([result for result in results if result.reason]),
    )


def main() -> None:
    """Derive all tables and write the page."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("types", nargs="*")
    parser.add_argument("--out", type=Path, default=HERE / "docs/families.md")
    parser.add_argument("--seconds", type=int, default=300)
    arguments = parser.parse_args()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    results = []
    for name in sorted(arguments.types or MODEL_FOR_CAUSAL_LM_MAPPING_NAMES):
        results.append(examine(name, arguments.seconds))
        last = results[-1]
        what = last.reason or f"{', '.join(last.proven)}; refused {last.refused}; {last.odd}"
        print(f"{name}: {what} ({last.seconds:.1f} s)", flush=True)
    arguments.out.write_text(page(results), encoding="utf-8")


if __name__ == "__main__":
    main()
