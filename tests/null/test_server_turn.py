"""Regression caught: an answer that streams is another one than the same answer whole, where it is cut unluckily."""

from __future__ import annotations

from itertools import pairwise
from types import SimpleNamespace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tandem.program.formats.choose import FORMATS
from tandem.program.formats.parsed import thought
from tandem.server.answers import Places
from tandem.server.text import HALF, Text
from tandem.server.turn import MARKERS, TAGS, TAGS_OF, Delta, Turn
from tandem.types import StopReason, ToolCall

BYTES = [bytes([value]) for value in range(256)]
TOOLS = ({"type": "function", "function": {"name": "add", "parameters": {"properties": {"a": {"type": "integer"}}}}},)
CALL = ToolCall("add", {"a": 1})


def decode(ids: list[int]) -> str:
    return b"".join(BYTES[one] for one in ids).decode("utf-8", "replace")


def pieces(text: str, cuts: set[int]) -> list[str]:
    places = [0, *sorted(cut for cut in cuts if 0 < cut < len(text)), len(text)]
    return [text[start:end] for start, end in pairwise(places)]


def joined(deltas: list[Delta]) -> Delta:
    return Delta(
        "".join(one.reasoning for one in deltas),
        "".join(one.content for one in deltas),
        tuple(call for one in deltas for call in one.calls),
    )


def taken(turn: Turn, parts: list[str]) -> Delta:
    return joined([*(turn.feed(part) for part in parts), turn.finish()])


@given(
    st.text(alphabet="aéλ😀<|>", max_size=12),
    st.sets(st.integers(1, 40)),
    st.lists(st.sampled_from(["<|", "a<", "|>é", "λ"]), max_size=2),
)
def test_texts_do_not_hang_on_their_cuts(text: str, cuts: set[int], stops: list[str]) -> None:
    """Half a character goes out as U+FFFD, or a part of a stop string before it is known to be one."""
    ids = list(text.encode())
    found = min((place for stop in stops if (place := text.find(stop)) >= 0), default=-1)
    if found >= 0:  # the engine ends at the token with which a stop string is whole
        ends = min(len(text[: text.find(stop) + len(stop)].encode()) for stop in stops if stop in text)
        ids = ids[:ends]
    reader = Text(decode, stops, frozenset([2]))
    places = [0, *sorted(cut for cut in cuts if cut < len(ids)), len(ids)]
    fed = [reader.feed(ids[start:end]) for start, end in pairwise(places)]
    reason = StopReason.STOP_STRING if found >= 0 else StopReason.STOP_TOKEN
    whole = decode(ids)
    first = min((place for stop in stops if (place := whole.find(stop)) >= 0), default=len(whole))
    assert "".join(fed) + reader.finish(reason) == whole[:first]
    assert not any(HALF in one for one in fed)


@pytest.mark.parametrize("stop", ["<|", "λ>", "a<|a"])
def test_a_stop_string_comes_in_parts(stop: str) -> None:
    """The first half of a stop string is sent before the second half comes."""
    reader = Text(decode, (stop,), frozenset())
    fed = [reader.feed([byte]) for byte in f"so a {stop[:-1]} b {stop}".encode()]
    assert "".join(fed) + reader.finish(StopReason.STOP_STRING) == f"so a {stop[:-1]} b "


def test_a_text_may_end_in_half_a_character() -> None:
    """What bytes an answer of limited length ends in is lost, or comes before the next byte could make them whole."""
    reader = Text(decode, (), frozenset())
    assert [reader.feed([97, 0xF0]), reader.feed([0x9F])] == ["", ""]
    assert reader.finish(StopReason.LENGTH) == f"a{HALF}"


@given(st.text(alphabet="<think>/\n a", max_size=30), st.sets(st.integers(1, 40)), st.booleans())
def test_reasoning_is_split_as_the_formats_do(text: str, cuts: set[int], opened: bool) -> None:
    """A tag that is cut, or blank lines about it, go to the wrong side."""
    opening = "<think>" if opened else ""
    reasoning, content = thought(opening + text)
    assert taken(Turn(opening, None, None), pieces(text, cuts)) == Delta(reasoning, content)


@pytest.mark.parametrize("name", [name for name in FORMATS if name != "harmony"])
@given(words=st.text(alphabet="ab `<[\n", max_size=8), cuts=st.sets(st.integers(1, 90)), thinks=st.booleans())
def test_calls_do_not_hang_on_their_cuts(name: str, words: str, cuts: set[int], thinks: bool) -> None:
    """A call is sent as text because its opening was cut, or text before it is sent twice."""
    opening, closing = tags = TAGS_OF.get(name, TAGS)
    text = (f"{opening}\nso\n{closing}\n\n" if thinks else "") + f"{words}\n{FORMATS[name].write([CALL], TOOLS)}"

    def turn() -> Turn:
        return Turn("", lambda whole: FORMATS[name].parse(whole, TOOLS), MARKERS.get(name), tags)

    whole = taken(turn(), [text])
    assert taken(turn(), pieces(text, cuts)) == whole
    if not words.strip():
        assert whole.calls and whole.content == "" and whole.reasoning == ("so" if thinks else "")


def test_places_of_tokens_are_of_whole_characters() -> None:
    """Each token of a character counts as one: what is behind it is looked for beyond the end of the text."""
    tokens = [b"a", b" \xe2", b"\x98", b"\x83", b"\xff", b"bc", b"\xf0\x9f", b"\x99\x82!", b"d"]
    words: Any = SimpleNamespace(token_bytes=tokens.__getitem__)
    text = b"".join(tokens).decode("utf-8", "replace")
    assert text == "a ☃\ufffdbc🙂!d"
    wanted = [4, 5, 6, 6, 7, 8, 10, 10, 12]
    assert Places(words, 4).of(range(9)) == wanted
    parts = Places(words, 4)
    assert [*parts.of(range(3)), *parts.of([]), *parts.of(range(3, 9))] == wanted
