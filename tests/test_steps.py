"""Every stage that a recipe can name has its file, with what the others have."""

from __future__ import annotations

import inspect

import pytest

from regrow import plugins
from regrow.steps import CONFIGS, STEPS


def test_a_file_a_stage() -> None:
    assert set(plugins.names(STEPS)) == set(CONFIGS)


@pytest.mark.parametrize("name", CONFIGS)
def test_what_a_step_gives(name: str) -> None:
    module = plugins.load(STEPS, name)
    checked = list(inspect.signature(module.check).parameters)
    assert checked == ["step", "checkpoint", "data", "options"]
    assert module.check.__doc__.startswith("Raise UserError")
    assert list(inspect.signature(module.run).parameters) == ["job", "step", "name"]
