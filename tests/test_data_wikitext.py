"""Markup in, prose out, by hand-made pairs."""

from __future__ import annotations

import time

import pytest

from regrow.data.wikitext import to_prose


@pytest.mark.parametrize(
    ("markup", "prose"),
    [
        ("'''Bold''' and ''italic'' l'arbre", "Bold and italic l'arbre"),
        ("A [[cat]], [[Felis|cats]], [[cat]]s.", "A cat, cats, cats."),
        ("[[Paris (Texas)|]] and [[Help:Boston, Massachusetts|]]", "Paris and Boston"),
        ("See [[:Category:Cats]].", "See Category:Cats."),
        ("Text.[[Category:Cats]][[de:Katze]][[zh-min-nan:Niau]]", "Text."),
        ("[[Wiktionary:cat|the word]]", "the word"),
        ("[[Image:a.png|thumb|A [[cat]] by [http://x.y Z] [[w|v]]]]After", "After"),
        ("[[image:a.png|thumb|unclosed\nAfter", "After"),
        ("A [http://x.y site] and [http://x.y] and http://x.y/z.", "A site and and"),
        ("{{a|{{b|{{c}}}}|x={y} }}Kept {{d}}here", "Kept here"),
        ("One<ref name=a/> two<ref>x [[y]] {{z}}</ref>, three.", "One two, three."),
        ("a<!-- b\n\nc -->d<!-- open", "ad"),
        ("x<br />y <small>z</small> H<sub>2</sub>O", "x\ny z H2O"),
        ("Let <math>x<y</math> be.", "Let be."),
        ("Before\n{| class=x\n| a\n{|\n|b\n|}\ncell\n|}\nAfter", "Before\n\nAfter"),
        ("Before\n{| class=x\n| a\n! b\nAfter", "Before\n\nAfter"),
        ("== H ==\nText.\n=== Empty ===\n* item\n== Links ==\n* [http://x y]", "H\n\nText."),
        ("== H ==\n=== I ===\nText.", "I\n\nText."),
        ("Kinds:\n* one\n* two\n\nMore.", "More."),
        ("One line\nsame paragraph.\n\n\nNext.", "One line\nsame paragraph.\n\nNext."),
        (":Indented.\n__TOC__", "Indented."),
        ("1 &lt; 2 &amp; &#945;&nbsp;&ndash; x", "1 < 2 & α – x"),
        ("He ({{lang|el}}, born [[1900]]) ( ) sat .", "He (born 1900) sat."),
        ("Odd {{ braces [[ and", "Odd braces and"),
    ],
)
def test_markup_becomes_the_expected_prose(markup: str, prose: str) -> None:
    assert to_prose(markup) == prose


@pytest.mark.parametrize("broken", ["{{", "[[", "{|\n", "<ref>", "[[Image:", "{{a|", "<!--", "'''"])
def test_broken_markup_is_converted_quickly(broken: str) -> None:
    start = time.perf_counter()
    to_prose(broken * 2_000)
    assert time.perf_counter() - start < 2
