"""Where tests show what a run shows: nowhere."""

from __future__ import annotations


class Silent:
    """A display that shows nothing."""

    def __enter__(self) -> Silent:
        return self

    def __exit__(self, *given: object) -> None: ...

    def update(self, row: object) -> None: ...

    def note(self, text: str) -> None: ...
