"""The language of an answer, as py3langid sees it."""

from __future__ import annotations

import importlib.util
from collections.abc import Sequence
from functools import cache
from typing import TYPE_CHECKING

from regrow.errors import UserError

if TYPE_CHECKING:
    from py3langid.langid import LanguageIdentifier

CONFIDENCE = 0.5
"""The least probability of a language; other texts, such as `42`, have none."""
NONE = ("und", "zxx")
"""The codes for an undecided text, and for one without words."""


def check_languages(languages: Sequence[str]) -> None:
    """Raise UserError for an unknown code, or if py3langid is not installed."""
    if not languages:
        return
    if importlib.util.find_spec("py3langid") is None:
        raise UserError(
            "languages needs py3langid, which is not installed: pip install 'regrow[language]', "
            "or leave it out"
        )
    known = [code for code in _identifier().labels if code not in NONE]
    for code in languages:
        if code not in known:
            raise UserError(
                f"languages {code!r}: allowed are ISO 639 codes such as en, de, zh; known are "
                f"{', '.join(sorted(known))}"
            )


def is_other(text: str, languages: Sequence[str]) -> bool:
    """Whether the text is in a language that is none of `languages`; False if it has none."""
    if not languages:
        return False
    code, _ = _identifier().classify(text)
    return code not in (*languages, *NONE)


@cache
def _identifier() -> LanguageIdentifier:
    """Loaded once; this takes two seconds."""
    from py3langid.langid import MODEL_FILE, LanguageIdentifier

    return LanguageIdentifier.from_model_file(
        MODEL_FILE, norm_probs=True, min_confidence=CONFIDENCE
    )
