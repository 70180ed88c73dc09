"""Which models of the installed transformers can be cut, and along which axes.

    python benchmarks/families.py [TYPE ...] [--out docs/families.md] [--seconds 300]

derives the table of every causal language model class from the default config of its class (see
EXAMPLES for those whose defaults are no model), proves each axis on a tiny random copy, and writes
the page. A type that takes longer than `--seconds` is listed as such. Nothing is downloaded. What
was derived before is read from the cache folder, so a second run is quick. The page also has the
time for the configs of two large models (LARGE), which is measured without that cache.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import signal
import tempfile
import time
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
import transformers
from transformers import CONFIG_MAPPING, logging
from transformers.models.auto.modeling_auto import (
    MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
    MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES,
    MODEL_FOR_MULTIMODAL_LM_MAPPING_NAMES,
)

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
LARGE: dict[str, dict[str, Any]] = {
    "Llama 3 70B": {
        "model_type": "llama",
        "hidden_size": 8192,
        "intermediate_size": 28672,
        "num_hidden_layers": 80,
        "num_attention_heads": 64,
        "num_key_value_heads": 8,
        "vocab_size": 128256,
        "max_position_embeddings": 8192,
        "rms_norm_eps": 1e-5,
    },
    "Qwen3 235B-A22B": {
        "model_type": "qwen3_moe",
        "hidden_size": 4096,
        "intermediate_size": 12288,
        "moe_intermediate_size": 1536,
        "num_hidden_layers": 94,
        "num_attention_heads": 64,
        "num_key_value_heads": 4,
        "head_dim": 128,
        "num_experts": 128,
        "num_experts_per_tok": 8,
        "norm_topk_prob": True,
        "vocab_size": 151936,
    },
}
"""Configs of the published sizes."""
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
Under *packed*, `no` means that documents in one sequence see each other: regrow then gives each
sequence one document. Under *repair*, `no` means that there is no repair
after a cut.

**{decoders} types have a table. {some} of them can be cut in depth and in the MLP or the experts,
and {every} along every axis that they have.** Deriving and proving one takes {median:.0f} s at
the median, and {longest:.0f} s at most, on one thread of a CPU that other work shared.
{large}

{table}

## Multimodal models

Of a multimodal folder, regrow measures, cuts, repairs and distils the text model. All other
tensors are carried over byte for byte, and the stock class opens the whole folder. It cannot cut
`hidden`, into which the model's projector writes, and `vocab`, as its processor knows tokens by
their ids. These types have a text model with a table, which is named in brackets:

{multimodal}

## Packed text

{packed}

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
    odd: dict[str, str] = field(default_factory=dict)
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
                return Result(name, reason=f"multimodal; its text model is a {kind}")
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


def multimodal(results: list[Result]) -> str:
    """The multimodal types whose text model has a table."""
    known = {result.name for result in results if not result.reason}
    names = {**MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES, **MODEL_FOR_MULTIMODAL_LM_MAPPING_NAMES}
    found = []
    for name in sorted(names):
        with contextlib.suppress(Exception):  # a class without a default config
            text = CONFIG_MAPPING[name]().text_config.model_type
            if text in known:
                found.append(f"{name} ({text})")
    return ", ".join(found) + "."


def packed(results: list[Result]) -> str:
    """Why documents see each other, by type."""
    by_reason: dict[str, list[str]] = defaultdict(list)
    for result in results:
        if "documents" in result.odd:
            reason = result.odd["documents"].replace("model.layers.{layer}.", "")
            by_reason[reason].append(result.name)
    return "\n".join(f"- {', '.join(names)}: {reason}." for reason, names in by_reason.items())


def large() -> str:
    """The time to derive and prove the tables of large models, without the cache folder."""
    said = []
    for name, config in LARGE.items():
        with tempfile.TemporaryDirectory() as folder, patch.dict(os.environ, REGROW_CACHE=folder):
            start, cpu = time.perf_counter(), time.process_time()
            found = families.derived(config)
            taken, cpu = time.perf_counter() - start, time.process_time() - cpu
        assert set(found.proven) == {axis for axis in AXES if axis in found.family.config_keys}
        count = found.family.count(config) / 1e9
        said.append(
            f"{taken:.0f} s ({cpu:.0f} s of CPU time) for {name} ({count:.0f} B parameters)"
        )
    return f"No weights are read, so a large model costs the same: {', and '.join(said)}."


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
        multimodal=multimodal(with_table),
        packed=packed(with_table),
        large=large(),
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
