"""Which characters of a text each of its tokens wrote."""

from __future__ import annotations

from collections.abc import Callable, Sequence


class Pieces:
    """Counts characters by token, for one tokeniser. A character of several tokens counts for the last of them.

    >>> Pieces(lambda ids: bytes(ids).decode(errors="replace")).lengths([72, 195, 182, 33], "Hö!")
    [1, 0, 1, 1]
    """

    def __init__(self, decode: Callable[[list[int]], str]) -> None:
        self.decode = decode
        self._first = _Seen(lambda token: decode([token]))
        self._later = _Seen(self._after)

    def lengths(self, ids: Sequence[int], text: str) -> list[int]:
        """Characters of each token of `ids`, whose text is `text`; their sum is the text's length."""
        if not ids:
            return []
        pieces = [self._first[ids[0]], *map(self._later.__getitem__, ids[1:])]
        return list(map(len, pieces)) if "".join(pieces) == text else self._grown(list(ids), text)

    def _after(self, token: int) -> str:
        """Its text behind another token, which SentencePiece's spaces and WordPiece's joints depend on."""
        before = next(iter(self._first))
        return self.decode([before, token])[len(self._first[before]) :]

    def _grown(self, ids: list[int], text: str) -> list[int]:
        """By what the text grows with each token. Only tokens since the last whole character are decoded again, so that
        a long text costs no more a token than a short one."""
        lengths, whole, open_from = [], 0, 0  # ids[whole:open_from] is the text's last whole piece
        for end in range(1, len(ids) + 1):
            grown = self.decode(ids[whole:end])
            if grown.endswith("\ufffd") and end < len(ids):
                lengths.append(0)
                continue
            lengths.append(max(0, len(grown) - len(self.decode(ids[whole:open_from]))))
            whole, open_from = open_from, end
        lengths[-1] += len(text) - sum(lengths)
        return lengths if lengths[-1] >= 0 else [*[0] * (len(ids) - 1), len(text)]


class _Seen(dict[int, str]):
    """Texts of token ids, each found once."""

    def __init__(self, find: Callable[[int], str]) -> None:
        self.find = find

    def __missing__(self, token: int) -> str:
        self[token] = self.find(token)
        return self[token]
