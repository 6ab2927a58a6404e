"""Regression caught: ids that hang on what was encoded before, or a conversation encoded anew at each turn."""

from __future__ import annotations

import pytest
import tokenizers
from hypothesis import example, given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken, Tokenizer, models, normalizers, pre_tokenizers, trainers

from tandem.models import regrown
from tandem.models.regrown import Regrown

TEXT = ["yes and no, 12 + 30 = 42\n\n", "  the end of it all: the then\nthere", "42 42 yes yes"]
FORMS = {
    "byte level": (None, pre_tokenizers.ByteLevel(add_prefix_space=False)),
    "byte level, a space before": (None, pre_tokenizers.ByteLevel(add_prefix_space=True)),
    "first": (None, pre_tokenizers.Metaspace(prepend_scheme="first")),
    "always": (normalizers.Lowercase(), pre_tokenizers.Metaspace(prepend_scheme="always")),
    "prepended": (normalizers.Sequence([normalizers.Prepend("_"), normalizers.Replace(" ", "_")]), None),
}
PIECES = ["<s>", "<e>", "<e>x", "<eat>", "[W]", "END", "y", "yes", " and", "\n", " ", "42", "the", "<", "é"]


@pytest.fixture(scope="module")
def backends() -> dict[str, tokenizers.Tokenizer]:
    made = {}
    for name, (normalizer, pieces) in FORMS.items():
        backend = Tokenizer(models.BPE())
        if normalizer is not None:
            backend.normalizer = normalizer
        if pieces is not None:
            backend.pre_tokenizer = pieces
        alphabet = pre_tokenizers.ByteLevel.alphabet() if name.startswith("byte") else [chr(n) for n in range(32, 127)]
        trainer = trainers.BpeTrainer(vocab_size=340, initial_alphabet=alphabet, show_progress=False)
        backend.train_from_iterator(TEXT * 20, trainer)
        backend.add_special_tokens(
            ["<s>", "<e>", AddedToken("<eat>", lstrip=True), AddedToken("[W]", single_word=True)]
        )
        backend.add_tokens([AddedToken("<e>x", normalized=False), AddedToken("END", normalized=True)])
        made[name] = backend
    return made


@pytest.mark.parametrize("form", FORMS)
@given(st.lists(st.tuples(st.integers(0, 12), st.lists(st.sampled_from(PIECES), max_size=8)), max_size=6))
@example([(0, ["<s>", "yes"]), (2, [" and"]), (1, ["yes", " and"])])
@example([(0, ["<s>", "y", "<e>"]), (3, ["x"]), (3, [" ", "<eat>"])])
@example([(0, ["<s>", "[W]", "<s>"]), (3, ["yes"]), (1, ["yes"])])
@settings(max_examples=60, deadline=None)
def test_ids_are_those_of_the_whole(
    form: str, backends: dict[str, tokenizers.Tokenizer], asked: list[tuple[int, list[str]]]
) -> None:
    """A part of an earlier text is taken for this one's, or the rest is encoded as if it began a text."""
    backend, said = backends[form], list[str]()
    grows = Regrown(backend)
    for kept, more in asked:
        said = [*said[:kept], *more]
        text = "".join(said)
        assert grows.encode(text, False) == backend.encode(text, add_special_tokens=False).ids, text


def test_only_what_is_new_is_encoded(
    backends: dict[str, tokenizers.Tokenizer], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A conversation of n turns costs n * n / 2 of them."""
    backend, given = backends["byte level"], list[int]()
    own = regrown.encoded

    def counted(backend: tokenizers.Tokenizer, text: str, special: bool, yields: bool) -> tokenizers.Encoding:
        given.append(len(text))
        return own(backend, text, special, yields)

    monkeypatch.setattr(regrown, "encoded", counted)
    grows, text, turn = Regrown(backend), "", "<s>yes and no<e>\n"
    for _ in range(50):
        grows.encode(f"{text}<s>", False)
        text += turn
        grows.encode(text, False)
    assert sum(given) < 3 * 50 * len(turn)
    assert grows.apart.keys() == {backend.token_to_id("<s>"), backend.token_to_id("<e>x")}
