"""Characters of a text given to other tokens than those that wrote them."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

from tandem.models.tokenizer import byte_alphabet
from tandem.rollout.pieces import Pieces

WORDS = ["the", " the", " a", "n", " é", " 日本", "\n\n", "🙂", ".", " .", "'s"]


def numbered(tokens: list[str]) -> dict[str, int]:
    return {token: place for place, token in enumerate(dict.fromkeys(tokens))}


def byte_level() -> Tokenizer:
    """GPT-2's kind: a token is any run of bytes, also of a part of a character."""
    spelling = byte_alphabet()
    tokens = [*spelling, *("".join(spelling[byte] for byte in word.encode()) for word in WORDS)]
    backend = Tokenizer(models.BPE(vocab=numbered(tokens), merges=[]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    return backend


def sentencepiece() -> Tokenizer:
    """Llama 2's kind: the first token's space is dropped, and bytes that no token has are tokens of their own."""
    tokens = [*(f"<0x{byte:02X}>" for byte in range(256)), *(word.replace(" ", "▁") for word in WORDS), "▁"]
    backend = Tokenizer(models.BPE(vocab=numbered(tokens), merges=[], byte_fallback=True))
    steps = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    backend.decoder = decoders.Sequence(steps)
    return backend


def wordpiece() -> Tokenizer:
    tokens = ["the", "##n", "##s", "a", ".", ",", "é", "日", "##本"]
    backend = Tokenizer(models.WordPiece(vocab=numbered(tokens)))
    backend.decoder = decoders.WordPiece(cleanup=False)
    return backend


KINDS = {kind.__name__: kind() for kind in (byte_level, sentencepiece, wordpiece)}


def grown(decode, ids: list[int]) -> list[int]:
    """By decoding every beginning of the whole: what grows with a token is its own, whole characters only."""
    sizes, seen = [], 0
    for end in range(1, len(ids) + 1):
        text = decode(ids[:end])
        size = len(text) if end == len(ids) else len(text.rstrip("\ufffd"))
        sizes.append(max(0, size - seen))
        seen = max(seen, size)
    return sizes


@pytest.mark.parametrize("kind", KINDS)
@given(st.lists(st.integers(0, 10**6), max_size=12), st.lists(st.text("aé日🙂 \n", max_size=3), max_size=4))
def test_against_every_beginning(kind: str, drawn: list[int], words: list[str]) -> None:
    """A space, a joint or a character of several tokens that moves to a neighbour."""
    backend = KINDS[kind]
    decode = lambda ids: backend.decode(ids, skip_special_tokens=False)  # noqa: E731
    first = 0 if kind == "wordpiece" else 256  # tokens of whole characters
    ids = [first + number % (backend.get_vocab_size() - first) for number in drawn]
    if first:
        ids += [byte for word in words for byte in word.encode()]
    pieces, text = Pieces(decode), decode(ids)
    assert pieces.lengths(ids, text) == grown(decode, ids)
    assert pieces.lengths(ids, text) == Pieces(decode).lengths(ids, text)  # by what was seen before, and by nothing


@pytest.mark.parametrize("kind", KINDS)
@given(st.lists(st.integers(0, 10**6), max_size=40))
def test_the_sum_is_the_text(kind: str, drawn: list[int]) -> None:
    """Bytes that are no character, as a model draws them at a high temperature, shift all that follows."""
    backend = KINDS[kind]
    ids = [number % backend.get_vocab_size() for number in drawn]
    text = backend.decode(ids, skip_special_tokens=False)
    lengths = Pieces(lambda ids: backend.decode(ids, skip_special_tokens=False)).lengths(ids, text)
    assert len(lengths) == len(ids) and sum(lengths) == len(text) and min(lengths, default=0) >= 0


def test_a_long_text_is_decoded_in_parts() -> None:
    """Quadratic time: every beginning of a long text decoded anew because one of its characters has two tokens."""
    asked: list[int] = []

    def decode(ids: list[int]) -> str:
        asked.append(len(ids))
        return bytes(ids).decode(errors="replace")

    ids = list(("ab" * 1000 + "é" + "cd" * 1000).encode())
    assert Pieces(decode).lengths(ids, bytes(ids).decode()) == [1] * 2000 + [0, 1] + [1] * 2000
    assert max(asked) <= 4 and sum(asked) < 8 * len(ids)


@pytest.mark.parametrize("kind", KINDS)
def test_texts_of_known_tokens_are_not_decoded_again(kind: str) -> None:
    """A run in which every token of every step is decoded by itself: SentencePiece's first space hides a mistake."""
    backend, asked = KINDS[kind], []

    def decode(ids: list[int]) -> str:
        asked.append(ids)
        return backend.decode(ids, skip_special_tokens=False)

    words = ["the", "##n", "a"] if kind == "wordpiece" else ["the", "▁the", "▁a"]
    byte = "" if kind != "byte_level" else "Ġ"
    ids = [backend.token_to_id(word.replace("▁", byte) if byte else word) for word in words]
    pieces, text = Pieces(decode), backend.decode(ids, skip_special_tokens=False)
    first = pieces.lengths(ids, text)
    assert asked
    asked.clear()
    assert pieces.lengths(ids, text) == first and not asked
