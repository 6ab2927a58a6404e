"""Constraints: which tokens may follow, counted out on small languages; what is refused; what is said of a text."""

from __future__ import annotations

import json
import re
import socket
import sys
from collections.abc import Iterable
from itertools import product
from random import Random
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tandem.engine.constraint import DeadEnd, Grammars, Matcher, unmet
from tandem.errors import ConfigError
from tandem.types import Constraint, Request, Sampling, kept_ids
from tests.grammars import END, OTHER_END, grammars_of, texts

for name in ("llguidance", "jsonschema_rs"):
    pytest.importorskip(name, reason="constraints are those of the extra serve")

LETTERS = ("a", "b", "c", "ab", "ca", "bcb", "abcabc", "d", END, "", OTHER_END, "ba")
PIECES = (
    *'{}[]":,0123456789abefnlrstu',
    "true",
    "false",
    "null",
    '{"',
    '":',
    '":[',
    ',"',
    '"}',
    "]}",
    "},",
    "12",
    "tr",
)
TOKENS = (*PIECES, "ue", '"a":', "10", END, OTHER_END)


def request(
    constraint: Constraint | None, tokens: tuple[int, ...] = (0,), stop: tuple[int, ...] = (), **more: Any
) -> Request:
    return Request("r", "p", tokens, Sampling(stop_token_ids=stop), seed=0, constraint=constraint, **more)


def matcher(grammars: Grammars, constraint: Constraint, stop: tuple[int, ...]) -> Matcher:
    asked = request(constraint, stop=stop)
    grammars.check(asked)
    return grammars.matcher(asked)


def allowed(asked: Matcher, taken: list[int]) -> list[int]:
    """After a prompt of one token and these."""
    return list(kept_ids(asked.masks([0, *taken])[0]))


def check_masks(constraint: Constraint, language: Iterable[str], tokens: tuple[str, ...]) -> None:
    """At every place that tokens lead to, exactly those that some text goes on with; the ends where one is whole.

    Where all texts go on with the same character it may be fewer: llguidance keeps to the tokens that the tokeniser
    makes of what is forced.
    """
    grammars, whole = grammars_of(tokens), set(language)
    beginnings = {text[:end] for text in whole for end in range(len(text) + 1)}
    stop = (tokens.index(END), tokens.index(OTHER_END))
    asked = request(constraint, stop=stop)
    grammars.check(asked)
    seen, open_ = {""}, [("", list[int]())]
    while open_:
        text, taken = open_.pop()
        wanted = [i for i, token in enumerate(tokens) if token and i not in stop and text + token in beginnings]
        found = allowed(grammars.matcher(asked), taken)
        if text not in whole and sum(one[:-1] == text for one in beginnings if one) == 1:
            assert found and {*found} <= {*wanted}, (text, taken)
        else:
            assert found == sorted([*wanted, *(stop if text in whole else ())]), (text, taken)
        for i in wanted:
            if (longer := text + tokens[i]) not in seen:
                seen.add(longer)
                open_.append((longer, [*taken, i]))
    assert len(seen) > 1 or whole <= {""}


EXPRESSIONS = ["a(b|ca){1,2}d?", "(ab)?(ca)?", "abcabc|abc|ab", "[a-c]{0,3}", "a?b?c?", "^ab$", "(?i)ABC", "a(?:bc|b)"]


@pytest.mark.parametrize("expression", EXPRESSIONS)
def test_masks_of_expressions_by_brute_force(expression):
    """A token that leads nowhere, one that is missing, an end in the middle of a text or none where it is whole."""
    strings = ("".join(some) for count in range(8) for some in product("abcd", repeat=count))
    language = [text for text in strings if re.fullmatch(expression, text)]
    check_masks(Constraint("regex", expression), language, LETTERS)


def test_masks_of_choices_and_grammars_by_brute_force():
    """A choice that begins another is cut off or never ends; a rule that calls itself counts wrong."""
    choices = ["ab", "abc", "abcabc", "d", "ba", "", "ab"]
    check_masks(Constraint("choice", json.dumps(choices)), choices, LETTERS)
    nested = {"a" * n + "b" * n for n in range(4)}
    rules = 'start: one | ""\none: "a" two? "b"\ntwo: "a" three? "b"\nthree: "ab"'
    check_masks(Constraint("grammar", rules), nested, LETTERS)
    check_masks(Constraint("grammar", 'root ::= "a" ("b" | "c" "a")? "d"'), {"ad", "abd", "acad"}, LETTERS)


leaves = st.one_of(
    st.builds(
        lambda some: {"enum": some},
        st.lists(
            st.sampled_from([0, 1, 12, "a", "ab", "", None, True, [1], {"a": 1}]),
            min_size=1,
            max_size=3,
            unique_by=json.dumps,
        ),
    ),
    st.just({"type": "boolean"}),
    st.builds(
        lambda low, more: {"type": "integer", "minimum": low, "maximum": low + more},
        st.integers(0, 9),
        st.integers(0, 14),
    ),
)


def wider(inner: st.SearchStrategy[Any]) -> st.SearchStrategy[Any]:
    arrays = st.builds(lambda one, most: {"type": "array", "items": one, "maxItems": most}, inner, st.integers(0, 2))
    either = st.builds(lambda one, two: {"anyOf": [one, two]}, inner, inner)
    objects = st.builds(
        lambda properties, names: (
            {"type": "object", "properties": properties, "additionalProperties": False}
            | {"required": [name for name in properties if name in names]}
        ),
        st.dictionaries(st.sampled_from(["a", "b", "ab"]), inner, min_size=1, max_size=2),
        st.sets(st.sampled_from(["a", "b", "ab"])),
    )
    return st.one_of(arrays, either, objects)


@settings(max_examples=60, deadline=None)
@given(schema=st.recursive(leaves, wider, max_leaves=3))
def test_masks_of_drawn_schemas_by_brute_force(schema):
    """A schema is not held: a number beyond its bounds, a key too few or twice, a comma before the end."""
    language = {*texts(schema)}
    if len(language) > 400:
        return
    jsonschema = pytest.importorskip("jsonschema", reason="the reference of the reference")
    assert all(jsonschema.Draft202012Validator(schema).is_valid(json.loads(text)) for text in language)
    check_masks(Constraint("json_schema", json.dumps(schema)), language, TOKENS)


def test_a_matcher_is_its_tokens():
    """State that outlives a preemption or a request is another's, or is read twice."""
    grammars, stop = grammars_of(TOKENS), (TOKENS.index(END),)
    constraint = Constraint("json_schema", '{"type": "array", "items": {"type": "boolean"}, "maxItems": 3}')
    taken = [TOKENS.index(token) for token in ("[", "true", ",", "tr", "ue", ",")]
    whole = matcher(grammars, constraint, stop)
    along = [allowed(whole, taken[:end]) for end in range(len(taken) + 1)]
    assert [allowed(matcher(grammars, constraint, stop), taken[:end]) for end in range(len(taken) + 1)] == along
    for carried in range(len(taken) + 1):
        asked = request(constraint, (7, 8, *taken[:carried]), stop, carried=carried)
        again = grammars.matcher(asked)
        found = [list(kept_ids(again.masks([7, 8, *taken[:end]])[0])) for end in range(carried, len(taken) + 1)]
        assert found == along[carried:]


def test_drafts_are_read_and_forgotten():
    """A draft moves the matcher, or what follows one is masked as if it were not there."""
    grammars, stop = grammars_of(TOKENS), (TOKENS.index(END),)
    constraint = Constraint("json_schema", '{"enum": [[1, 12], [1]]}')
    drafts = [TOKENS.index(token) for token in ("[", "1", "]")]
    asked = matcher(grammars, constraint, stop)
    masks = asked.masks([0], drafts)
    assert [list(kept_ids(mask)) for mask in masks] == [
        allowed(matcher(grammars, constraint, stop), drafts[:end]) for end in range(4)
    ]
    assert len(asked.masks([0], [*drafts[:2], TOKENS.index("{"), 0])) == 3, "a draft that cannot be drawn ends them"
    assert len(asked.masks([0], [*drafts, stop[0], 0])) == 4, "so does the end"
    assert asked.masks([0], drafts) == masks and asked.masks([0, drafts[0]]) == masks[1:2]


def test_a_stop_token_of_text_ends_only_a_whole_text():
    """A stop token that the text could have is drawn in its middle, which ends it there."""
    stop = (LETTERS.index("b"), LETTERS.index(END))
    grammars = grammars_of(LETTERS)
    found = matcher(grammars, Constraint("regex", "a[bd]?"), stop)
    assert [LETTERS[i] for i in allowed(found, [0])] == ["b", "d", END], "where it may end, b ends it"
    assert [LETTERS[i] for i in allowed(found, [0, 7])] == ["b", END]
    with pytest.raises(DeadEnd, match="no token of the vocabulary"):
        allowed(matcher(grammars, Constraint("regex", "a[b]c"), stop), [0])  # b alone goes on, and would end it


REFUSED = [
    ("json_schema", '{"not": {"type": "string"}}', "not"),
    ("json_schema", '{"type": "object", "properties": {"a": {"if": {"type": "string"}, "then": {}}}}', "if"),
    ("json_schema", '{"type": "array", "contains": {"type": "integer"}}', "contains"),
    ("json_schema", '{"type": "array", "uniqueItems": true}', "uniqueItems"),
    ("json_schema", '{"type": "string", "format": "postcode"}', "postcode"),
    ("json_schema", '{"oneOf": [{"type": "integer"}, {"type": "number"}]}', "oneOf"),
    ("json_schema", '{"type": "string", "pattern": "(?=a)b"}', "pattern|look-around"),
    ("json_schema", '{"type": "object", "not": {}, "x-guidance": {"lenient": true}}', "not"),
    ("json_schema", '{"oneOf": [{}, {"type": "null"}], "x-guidance": {"coerce_one_of": true}}', "oneOf"),
    ("json_schema", '{"$ref": "http://127.0.0.1:9/schema"}', "127.0.0.1:9"),
    ("json_schema", '{"type": "strin"}', "strin"),
    ("json_schema", "false", "is an object"),
    ("json_schema", '{"type": ', "no JSON"),
    ("json_schema", "[" * 100_000, "no JSON"),
    ("json_schema", "[]", "is an object"),
    ("regex", r"(a)\1", "backreferences"),
    ("regex", "(", "unclosed group"),
    ("choice", "[]", "JSON list"),
    ("choice", '"yes"', "JSON list"),
    ("choice", '["a", 1]', "JSON list"),
    ("grammar", 'start: "a" other', "other"),
    ("grammar", "root ::= (", "grammar"),
    ("yaml", "", "json_schema, json_object, regex, choice, grammar"),
]


@pytest.mark.parametrize(("kind", "text", "named"), REFUSED)
def test_what_cannot_be_held_is_refused_by_name(kind, text, named):
    """A keyword that the library does not hold is dropped, and the answers are something else than was asked."""
    with pytest.raises(ConfigError, match=named) as caught:
        grammars_of(TOKENS).check(request(Constraint(kind, text), stop=(1,)))
    assert str(caught.value).startswith("request 'r': ") and len(str(caught.value)) < 1200


def test_a_text_that_could_not_end_is_refused():
    """A complete text without a stop token goes on to max_new_tokens, or ends in the error of an empty mask."""
    with pytest.raises(ConfigError, match="stop_token_ids"):
        grammars_of(LETTERS).check(request(Constraint("regex", "ab")))
    grammars_of(LETTERS).check(request(None))


def test_without_the_library_only_constraints_are_refused(monkeypatch):
    """An engine that asks for no constraint fails to start, or the reason is a traceback."""
    for name in ("llguidance", "jsonschema_rs"):
        with monkeypatch.context() as patch:
            patch.setitem(sys.modules, name, None)
            grammars = grammars_of(LETTERS)
            grammars.check(request(None))
            with pytest.raises(ConfigError, match=r"pip install 'tandem\[serve\]'"):
                grammars.check(request(Constraint("json_schema", f'{{"title": "{name}"}}'), stop=(1,)))


def test_carried_tokens_that_do_not_fit_end_in_a_reason():
    """A text begun without the constraint goes on as if it held."""
    asked = request(Constraint("regex", "ab"), (0, 7), (LETTERS.index(END),), carried=1)
    with pytest.raises(DeadEnd, match="token 7, in place 1, does not go on as its constraint asks"):
        grammars_of(LETTERS).matcher(asked).masks([0, 7])


def test_a_choice_of_many():
    """The 2,001st way of a rule ends a text in the midst, as the library's parser takes no more."""
    many = ["a" * (1 + i // 64) + format(i % 64, "06b").translate({48: "c", 49: "d"}) for i in range(4000)]
    found = matcher(grammars_of(LETTERS), Constraint("choice", json.dumps(many)), (LETTERS.index(END),))
    taken = [0]
    for token in [*[0] * 63, *[2] * 6, LETTERS.index(END)]:
        assert token in kept_ids(found.masks(taken)[0]), taken
        taken.append(token)


def test_a_constraint_is_compiled_once_and_equal_masks_are_one(monkeypatch):
    """A schema is read for every request of a group; a text of a thousand tokens holds a thousand masks."""
    import llguidance

    made, own = list[str](), llguidance.LLMatcher
    grammars, stop = grammars_of(LETTERS), (LETTERS.index(END),)
    grammars.check(request(Constraint("regex", "(ab|c)*"), stop=stop))
    monkeypatch.setattr(llguidance, "LLMatcher", lambda *given, **more: made.append("") or own(*given, **more))
    one, two = (matcher(grammars, Constraint("regex", "(ab|c)*"), stop) for _ in range(2))
    assert not made
    assert one.masks([0])[0] is two.masks([0, 3, 3])[0] is two.masks([0, 3, 3, 2])[0]


def test_ids_beyond_the_tokeniser_are_no_text():
    """A model's unused rows are drawn where the tokeniser's own tokens end, or a mask is short of a word."""
    for vocab_size in (len(LETTERS), 32, 33, 100):
        grammars = grammars_of(LETTERS, vocab_size)
        mask = matcher(grammars, Constraint("regex", "[a-d]*"), (LETTERS.index(END),)).masks([0])[0]
        assert list(kept_ids(mask)) == [i for i, token in enumerate(LETTERS) if token not in ("", OTHER_END)]


def of_pieces(kind: str) -> Any:
    """A tokeniser of SentencePiece's kind, whose decoder takes a first space away; or one of WordPiece."""
    from tokenizers import Tokenizer, decoders, models, normalizers

    pieces = ["<unk>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256)), "▁", *"abcdefghijklx", "ab", "▁ab"]
    vocab = {piece: i for i, piece in enumerate(pieces)}
    if kind == "WordPiece":
        backend = Tokenizer(models.WordPiece(vocab, unk_token="<unk>"))
        backend.decoder = decoders.WordPiece()
        return backend
    if kind == "Unigram":
        model: Any = models.Unigram([(one, -float(i)) for i, one in enumerate(pieces)], unk_id=0, byte_fallback=True)
    else:
        model = models.BPE(vocab, [("a", "b"), ("▁", "ab")], byte_fallback=True, unk_token="<unk>", fuse_unk=True)
    backend = Tokenizer(model)
    backend.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    parts = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    backend.decoder = decoders.Sequence(parts)
    backend.add_special_tokens(["<unk>", "</s>"])
    return backend


@pytest.mark.parametrize("kind", ["BPE", "Unigram"])
def test_pieces_with_bytes_and_spaces(kind):
    """A piece's space or a byte's token is another text to the backend than to the tokeniser that decodes it."""
    backend = of_pieces(kind)
    asked, whole = request(Constraint("regex", "[a-c]{1,3} (ab|é)x"), stop=(1,)), re.compile("[a-c]{1,3} (ab|é)x")
    grammars = Grammars(backend.to_str, backend.get_vocab_size())
    grammars.check(asked)
    for seed in range(40):
        chosen, taken = Random(seed), [0]
        while taken[-1] != 1:
            taken.append(chosen.choice(list(kept_ids(grammars.matcher(asked).masks(taken)[0]))))
        assert whole.fullmatch(backend.decode(taken[1:])), backend.decode(taken[1:])


def test_a_tokeniser_that_the_library_does_not_read_is_told():
    """The error of a library in place of words, or masks of another tokeniser."""
    backend = of_pieces("WordPiece")
    with pytest.raises(
        ConfigError, match="constraints need a tokeniser that llguidance reads, and it refuses this one"
    ):
        Grammars(backend.to_str, 300).check(request(Constraint("regex", "a"), stop=(1,)))


UNMET = [
    (Constraint("json_object"), "{}", ""),
    (Constraint("json_object"), "[]", "is not of type"),
    (Constraint("json_object"), '{"a": 1, "a": 2}', "'a' twice"),
    (Constraint("json_object"), '{"a": NaN}', "NaN"),
    (Constraint("json_object"), '{"a": "b', "no JSON"),
    (Constraint("json_object"), '{"a": ' + "[" * 100_000, "no JSON"),
    (Constraint("json_schema", '{"type": "string", "format": "date"}'), '"2023-02-28"', ""),
    (Constraint("json_schema", '{"type": "string", "format": "date"}'), '"2023-02-29"', 'is not a "date"'),
    (Constraint("json_schema", '{"properties": {"a": {"items": {"maximum": 3}}}}'), '{"a": [1, 4]}', "at a/1"),
    (Constraint("json_schema", '{"maximum": 1e400}'), "1" * 400, "cannot be validated|"),
    (Constraint("regex", "a+b"), "aab", ""),
    (Constraint("regex", "a+b"), "aa", "ends before the regex"),
    (Constraint("regex", "a+b"), "aabc", "at byte 3"),
    (Constraint("regex", "[é]+"), "éé", ""),
    (Constraint("choice", '["yes", "no"]'), "ye", "none of the choices"),
    (Constraint("grammar", 'start: "a" "b"?'), "a", ""),
]


@pytest.mark.parametrize(("constraint", "text", "named"), UNMET)
def test_a_text_is_read_again(constraint, text, named):
    """A text that was cut off, or that only the backend takes for right, is handed over as what was asked."""
    found = unmet(constraint, text)
    assert (found == "") == (named == "") or named.endswith("|")
    assert re.search(named, found)


def test_a_pattern_takes_no_time_whatever_it_is():
    """A schema that a stranger wrote holds a server by a pattern that takes exponential time."""
    schema = '{"patternProperties": {"^(a+)+$": {}}}'
    assert unmet(Constraint("json_schema", schema), json.dumps({"a" * 60 + "!": 1})) == ""
    schema = json.dumps({"patternProperties": {r"^(a+)+\1(?=b)$": {}}})  # what only a search that goes back can match
    assert "cannot be validated" in unmet(Constraint("json_schema", schema), json.dumps({"a" * 60 + "!": 1}))


def test_nothing_is_fetched():
    """A schema that a stranger wrote has the server open an address of its own network, at the door or at the end."""
    with socket.create_server(("127.0.0.1", 0)) as listening:
        listening.setblocking(False)
        constraint = Constraint("json_schema", json.dumps({"$ref": f"http://127.0.0.1:{listening.getsockname()[1]}/x"}))
        with pytest.raises(ConfigError):
            grammars_of(TOKENS).check(request(constraint, stop=(1,)))
        assert "cannot be validated" in unmet(constraint, "1")
        with pytest.raises(BlockingIOError):
            listening.accept()
