"""Rows of a dataset on the Hugging Face hub, streamed."""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any

from regrow.errors import UserError

ID = re.compile(r"(?P<name>\w[\w.-]*/\w[\w.-]*)(?:@(?P<config>[\w.-]+))?(?::(?P<split>[\w.-]+))?")


def read(source: str) -> Iterator[dict[str, Any]]:
    """Rows of `org/name`, `org/name:split` or `org/name@config:split`; without a split, of train.

    Raises UserError, in one line, when the hub cannot be reached or has no such dataset.
    """
    found = ID.fullmatch(source)
    assert found is not None, source
    import datasets  # slow to import, and only hub sources need it
    from huggingface_hub.errors import HfHubHTTPError

    try:
        rows = datasets.load_dataset(
            found["name"], found["config"], split=found["split"] or "train", streaming=True
        )
        yield from rows
    except (OSError, ValueError, HfHubHTTPError) as error:
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise UserError(
            f"{source}: no such local path, and the hub gave no rows ({reason}); check the name "
            "and the network, or use a file"
        ) from error
