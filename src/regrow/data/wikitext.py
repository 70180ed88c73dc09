"""Converts MediaWiki markup to prose, and cuts long text into sections at paragraph ends."""

from __future__ import annotations

import html
import re
from collections.abc import Iterable, Iterator

COMMENT = re.compile(r"<!--.*?(?:-->|\Z)", re.DOTALL)
# Elements whose content is no prose. <ref/> is removed first; else it would match up to a </ref>.
EMPTY_REF = re.compile(r"<ref\b[^<>]*/>", re.IGNORECASE)
NO_PROSE = re.compile(
    r"<(ref|references|math|gallery|timeline|table|pre|code|source|imagemap|hiero)\b[^<>]*>"
    r".*?</\1\s*>",
    re.DOTALL | re.IGNORECASE,
)
BREAK = re.compile(r"<(?:br|p|/p)\b[^<>]*>", re.IGNORECASE)
TAG = re.compile(r"</?[a-zA-Z][^<>]*>")
TEMPLATE = re.compile(r"\{\{(?:[^{}]|\{(?!\{)|\}(?!\}))*\}\}")
LINK = re.compile(r"\[\[([^\[\]]*)\]\]")
WEB_LINK = re.compile(r"\[(?:https?:|ftp:|news:|mailto:|//)[^\s\[\]]*[ \t]*([^\[\]\n]*)\]")
BARE_URL = re.compile(r"(?:https?|ftp)://[^\s<>\"]+")
DROPPED_LINK = re.compile(r"\s*(?:image|file|media|category|bild|special)\s*:", re.IGNORECASE)
LANGUAGE_LINK = re.compile(r"\s*(?:[a-z]{2,3}|simple)(?:-[a-z]+)*\s*:[^|]*\Z")
MAGIC_WORD = re.compile(r"__[A-Z]+__")
QUOTES = re.compile(r"'{2,}")
HEADING = re.compile(r"(={1,6})\s*(.*?)\s*=+\Z")
HOLLOW = re.compile(r"\(\s*[,;:]?\s*\)|\[\s*\]")  # left by a removed template or reference
SPACES = re.compile(r"[ \t\u00a0]+")
SPACE_BEFORE = re.compile(r" +([,.;:)])(?=\s|\Z)")
SPACE_AFTER = re.compile(r"\(\s*[,;]?\s+")
DROPPED_LINES = ("*", "#", ";", "|", "!", "{", "}")  # items of lists, rows of broken tables
NESTING = 12  # articles are nested less deeply; this bounds the work on broken markup


def to_prose(markup: str) -> str:
    """Convert to paragraphs and headings with blank lines between them, without lists and tables.

    `markup` is wikitext after XML unescaping. Templates, references, comments, images, categories
    and links to other languages are removed. Other links are replaced by their labels, and entities
    by characters. A heading is kept only if prose follows it; line ends inside a paragraph are
    kept. Broken markup raises no error; its remains are dropped.
    """
    text = COMMENT.sub("", markup) if "<!--" in markup else markup
    if "<" in text:
        text = EMPTY_REF.sub("", text)
        text = NO_PROSE.sub("", text)
    text = _until_stable(TEMPLATE, "", text)
    if "{|" in text:
        text = _without_tables(text)
    text = _links(text)
    if "<" in text:
        text = TAG.sub("", BREAK.sub("\n", text))
    text = QUOTES.sub("", BARE_URL.sub("", MAGIC_WORD.sub("", text)))
    return _lines(html.unescape(text))


def _until_stable(pattern: re.Pattern[str], replacement: str, text: str) -> str:
    """Replace innermost matches repeatedly, for nested markup."""
    for _ in range(NESTING):
        text, count = pattern.subn(replacement, text)
        if count == 0:
            break
    return text


def _without_tables(text: str) -> str:
    kept: list[str] = []
    opened: list[int] = []
    for line in text.split("\n"):
        start = line.lstrip(" :*#")
        if start.startswith("{|"):
            opened.append(len(kept))
        if opened and start.startswith("|}"):
            del kept[opened.pop() :]
            kept.append(start[2:].lstrip("}"))
        else:
            kept.append(line)
    return "\n".join(kept)  # rows of an unclosed table start with | or ! and are dropped with lists


def _links(text: str) -> str:
    for _ in range(NESTING):
        text, inner = LINK.subn(_label, text)
        text, outer = WEB_LINK.subn(r"\1", text)
        if inner + outer == 0:
            break
    return text


def _label(link: re.Match[str]) -> str:
    target, bar, label = link.group(1).partition("|")
    if DROPPED_LINK.match(target) or (not bar and LANGUAGE_LINK.match(target)):
        return ""
    if not bar:
        return target.lstrip(": ")
    return label if label.strip() else re.sub(r"\s*\([^()]*\)|,.*", "", target.rpartition(":")[2])


def _lines(text: str) -> str:
    """Keep the lines of prose; drops headings and "such as:" lines that only precede dropped lines.

    Returns the kept lines with the line ends or blank lines between them.
    """
    kept: list[tuple[str, bool]] = []  # (line with the gap before it, whether it is a heading)
    gap = ""
    for raw in text.split("\n"):
        if raw.startswith(DROPPED_LINES):
            if kept and kept[-1][0].endswith(":"):
                kept.pop()
            gap = "\n\n"
            continue
        line = _tidy(raw.lstrip(": \t"))
        heading = HEADING.match(line)
        if heading is not None and kept and kept[-1][1]:
            kept.pop()
        line = heading.group(2) if heading is not None else line
        if any(map(str.isalnum, line)) and not DROPPED_LINK.match(line):
            line_gap = "\n\n" if heading is not None else gap
            kept.append((line_gap + line, heading is not None))
            gap = "\n\n" if heading is not None else "\n"
        else:
            gap = "\n\n"
    while kept and kept[-1][1]:
        kept.pop()
    return "".join(line for line, _ in kept).strip("\n")


def _tidy(line: str) -> str:
    line = SPACES.sub(" ", line).strip()
    if "(" in line or "[" in line:
        line = HOLLOW.sub("", line)
        line = SPACE_AFTER.sub("(", line)
    line = line.replace("{{", "").replace("}}", "").replace("[[", "").replace("]]", "")
    return SPACE_BEFORE.sub(r"\1", SPACES.sub(" ", line)).strip()


BLANK_LINE = re.compile(r"\n[ \t]*\n\s*")


def sections(chunks: Iterable[str], size: int = 8_000) -> Iterator[str]:
    """Cut the concatenation of `chunks` into sections of about `size` characters.

    A section ends at the first blank line between `size` and `2 * size` characters, else at the
    last blank line between `size / 2` and `size`, else at a line end, else at a space. The white
    space at a cut is dropped; empty sections are skipped.
    """
    rest = ""
    for chunk in chunks:
        rest += chunk
        while len(rest) >= 2 * size:
            end, begin = _cut(rest, size)
            if rest[:end].strip():
                yield rest[:end].strip("\n")
            rest = rest[begin:]
    while rest.strip():
        end, begin = _cut(rest, size) if len(rest) > size else (len(rest), len(rest))
        yield rest[:end].strip("\n")
        rest = rest[begin:]


def _cut(text: str, size: int) -> tuple[int, int]:
    """The end of the first section of `text` and the begin of the next one."""
    blank = BLANK_LINE.search(text, size, 2 * size)
    if blank is None:
        earlier = list(BLANK_LINE.finditer(text, size // 2, size))
        blank = earlier[-1] if earlier else None
    if blank is not None:
        return blank.start(), blank.end()
    if len(text) < 2 * size:
        return len(text), len(text)
    for mark in ("\n", " "):
        at = text.rfind(mark, size, 2 * size)
        if at >= 0:
            return at, at + 1
    return 2 * size, 2 * size
