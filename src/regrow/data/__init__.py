"""Sources → documents → packed, masked token blocks, with splits that do not overlap."""

from __future__ import annotations

from typing import TYPE_CHECKING

from regrow.data.config import DataConfig, SourceConfig, Split

if TYPE_CHECKING:
    from regrow.data.sequences import Blocks, build_blocks

__all__ = ["Blocks", "DataConfig", "SourceConfig", "Split", "build_blocks"]


def __getattr__(name: str) -> object:
    # Configs are wanted everywhere, at once; what needs torch is imported when first asked for.
    if name == "Blocks":
        from regrow.data.sequences import Blocks

        return Blocks
    if name == "build_blocks":
        from regrow.data.sequences import build_blocks

        return build_blocks
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
