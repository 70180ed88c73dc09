"""An evaluation says when a model came nearer to the teacher and yet lost a task."""

from __future__ import annotations

import math

import numpy
import pytest

from regrow.stage_dir import Figure
from regrow.stages.evaluate.contradictions import contradictions, standard_errors
from regrow.stages.evaluate.eval_model import MetricResult

ROWS = 200


def result(kl: dict[str, float], correct: int, name: str = "acc/lambada") -> MetricResult:
    """A model with a KL for each text, and the first `correct` of ROWS rows right."""
    figures = [Figure(name=f"kl/{text}", value=v, convention="") for text, v in kl.items()]
    return MetricResult(figures, [], {name: [float(row < correct) for row in range(ROWS)]})


def test_a_lower_kl_with_a_lower_score_is_named() -> None:
    results = {
        "teacher": result({}, 150),
        "pruned": result({"wiki": 0.6, "novel": 0.7}, 100),
        "distilled": result({"wiki": 0.5, "novel": 0.6}, 80),
    }
    (sentence,) = contradictions(results, "teacher")
    assert "distilled is nearer to the teacher than pruned" in sentence
    assert "acc/lambada fell from 0.5000 to 0.4000" in sentence


@pytest.mark.parametrize(
    ("kl", "correct"),
    [
        ({"wiki": 0.5, "novel": 0.6}, 100),  # the score is equal
        ({"wiki": 0.5, "novel": 0.6}, 99),  # the score fell by less than two standard errors
        ({"wiki": 0.5, "novel": 0.8}, 80),  # further from the teacher on one text
        ({"other": 0.1}, 80),  # no text in common
    ],
)
def test_nothing_is_said_otherwise(kl: dict[str, float], correct: int) -> None:
    before = result({"wiki": 0.6, "novel": 0.7}, 100)
    assert contradictions({"pruned": before, "distilled": result(kl, correct)}, None) == []


def test_the_teacher_is_not_compared() -> None:
    results = {"teacher": result({"wiki": 0.5}, 100), "distilled": result({"wiki": 0.4}, 10)}
    assert contradictions(results, "teacher") == []


def test_standard_errors_are_those_of_paired_differences() -> None:
    generator = numpy.random.default_rng(0)
    before, after = generator.random((2, 50))
    total = sum(new - old for old, new in zip(before, after, strict=True))
    mean = total / 50
    variance = sum((new - old - mean) ** 2 for old, new in zip(before, after, strict=True)) / 49
    expected = mean / math.sqrt(variance / 50)
    assert standard_errors(list(before), list(after)) == pytest.approx(expected, rel=1e-12)


def test_rows_that_do_not_match_are_not_compared() -> None:
    assert standard_errors([1.0, 1.0], [0.0]) == 0.0
    assert standard_errors([1.0, 1.0], [0.0, 0.0]) == -math.inf
