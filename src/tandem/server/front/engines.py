"""An engine behind the router: how it is, what it has, which weights it serves."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Iterable
from typing import Any, NamedTuple, Protocol

import msgspec

from tandem.engine.affinity import Prefixes
from tandem.engine.space import Space
from tandem.server.config import FrontConfig
from tandem.server.front.client import Client, Lost

ANSWER_TOKENS = 512  # of one that was asked for elsewhere, as long as nothing is on its way from here
DIGITS = 16  # of a digest, in an engine's look
CAPACITY_TOKENS = 1 << 17  # of an engine that does not say what it holds


class Trying(Protocol):
    """A call at an engine."""

    def lose(self, reason: str) -> None:
        """It is waited for no longer."""


class Served(NamedTuple):
    """Weights, as an engine names them: its number of updates, and their hash."""

    step: int
    digest: str


class Loaded(NamedTuple):
    """An adapter of an engine: the call that it was told to load it by, and the digest that it came to ("": it says
    none)."""

    call: bytes
    digest: str


class Engine:
    """One. `ready` where it may be asked for something new."""

    def __init__(self, name: str, url: str, config: FrontConfig) -> None:
        self.name, self.config = name, config
        self.client = Client(url, config.connect_s)
        self.prefixes = Prefixes()
        self.well = False  # it answered when it was asked last
        self.said = "not asked yet"  # how it is, else
        self.well_s = time.monotonic()  # when it answered last, or began
        self.lost = False  # it has not for lost_s
        self.drained = False  # nothing new goes there
        self.behind = ""  # why its weights are not those of the others
        self.given_up = False  # it ended, and is not started again
        self.model = ""
        self.look: dict[str, Any] = {}  # as its /load says, where it has one
        self._space: Space | None = None
        self.took_s = 0.0  # when it was given weights from here
        self.told_held = ""  # the pause that it was told of
        self.adapters: dict[str, Loaded] = {}  # by name, of those that it was told of from here
        self.lacks: dict[str, str] = {}  # adapters that it should have, by name, and how it has not
        self.unshared = ""  # why its tenants have other shares than of all engines
        self.open = set[Trying]()
        self.answers = 0  # that these ask for
        self.others = 0  # that it had beside them, when it was last asked
        self.tokens = 0  # that they may come to hold
        self.counts = Counter[str]()  # calls, again (asked of another before), moved, failed, broken, restarts

    @property
    def ready(self) -> bool:
        return self.well and not (self.drained or self.behind or self.lacks or self.given_up)

    @property
    def state(self) -> str:
        """In words.

        >>> Engine("one", "http://127.0.0.1:1", FrontConfig()).state
        'failing: not asked yet'
        """
        if self.given_up or not self.well:
            return f"{'given up' if self.given_up else 'lost' if self.lost else 'failing'}: {self.said}"
        if self.drained:
            return "draining"
        behind = self.behind or "; ".join(self.lacks.values())
        return f"behind: {behind}" if behind else "ok"

    @property
    def capacity_tokens(self) -> int:
        pages, size = self.look.get("pages"), self.look.get("page_tokens")
        if not (isinstance(pages, dict) and isinstance(size, int)):
            return CAPACITY_TOKENS
        return max(1, size * sum(count for count in pages.values() if isinstance(count, int)))

    @property
    def served(self) -> Served | None:
        """What it says that it serves, where it does."""
        step, digest = self.look.get("step"), self.look.get("digest")
        return Served(step, digest) if isinstance(step, int) and isinstance(digest, str) else None

    def load(self, more_tokens: int = 0) -> float:
        """What it was asked for by this router, and by others as far as its own look says, over what it has room for.

        >>> Engine("one", "http://127.0.0.1:1", FrontConfig()).load(1 << 16)
        0.5
        """
        each = self.tokens // self.answers if self.answers else ANSWER_TOKENS
        return (self.tokens + self.others * each + more_tokens) / self.capacity_tokens

    def space(self) -> Space | None:
        """As its look says, of programs that say their names."""
        return self._space

    def moved(self, url: str) -> None:
        """It was started again, and listens elsewhere."""
        self.gone("it was started again")
        self.client, self.look, self.told_held = Client(url, self.config.connect_s), {}, ""
        self._space = None
        self.others = 0
        self.prefixes = Prefixes()
        self.well_s, self.lost = time.monotonic(), False

    def gone(self, reason: str) -> None:
        """It has nothing any more: what was asked of it is asked of another."""
        self.failed(reason)
        for one in list(self.open):
            one.lose(reason)
        self.client.close()

    def failed(self, reason: str) -> None:
        """It is asked for nothing until it answers again."""
        self.well, self.said = False, reason
        self.adapters = {}  # it may begin anew without them

    def took(self, served: Served | None) -> None:
        """It was given weights, and says which: looks that were asked for before do not know of it."""
        self.took_s, self.behind = time.monotonic(), ""
        if served is not None:
            self.look = {**self.look, "step": served.step, "digest": served.digest}

    async def ask(self, key: str) -> None:
        """How it is. Within health_deadline_s."""
        config, asked_s, own = self.config, time.monotonic(), self.answers
        try:
            status, body = await self.client.told("GET", "/health", key, limit_s=config.health_deadline_s)
            if status != 200:
                self.failed(_status(body) or f"/health answers {status}")
                self.well_s, self.lost = time.monotonic(), False  # what it has, it may still answer
                return
            if not self.model:
                self.model = await self.names(key)
            status, body = await self.client.told("GET", "/load", key, limit_s=config.health_deadline_s)
            if status == 200 and isinstance(look := read(body), dict):
                known: dict[str, Any] = {key: self.look[key] for key in ("step", "digest") if key in self.look}
                self._space = _space(look.pop("space", None))
                self.look = {**look, **known} if asked_s < self.took_s else look
                there = sum(count for name in ("running", "waiting") if isinstance(count := look.get(name), int))
                self.others = max(0, there - max(own, self.answers))
        except Lost as error:
            self.failed(str(error))
            if time.monotonic() - self.well_s > config.lost_s and not self.lost:
                self.lost = True
                self.gone(f"it has not answered for {config.lost_s:g} s ({error})")
            return
        self.well_s, self.lost = time.monotonic(), False
        self.well, self.said = True, ""

    async def names(self, key: str) -> str:
        """The model that it serves. Lost where it does not say."""
        status, body = await self.client.told("GET", "/v1/models", key, limit_s=self.config.health_deadline_s)
        if status in (401, 403):
            raise Lost(f"/v1/models answers {status}: it asks for a key. Set TANDEM_API_KEY to that of an admin")
        try:
            return str(read(body)["data"][0]["id"])
        except (KeyError, IndexError, TypeError) as error:
            raise Lost(f"/v1/models answers {status}, and names no model") from error


def newest(had: Served | None, told: Iterable[Served]) -> Served | None:
    """The weights that are to be served, of what engines say and what was known.

    An engine with more updates has newer weights. One that began anew has fewer, and older ones, even where it is the
    only one left. While no weights were ever updated, engines that were all started with others are believed.

    >>> newest(Served(3, "b"), [Served(0, "a"), Served(1, "b")]), newest(Served(0, "a"), [Served(0, "c")]).digest
    (Served(step=3, digest='b'), 'c')
    """
    counts = Counter(told)
    if not counts:
        return had
    if had is None:
        return max(counts, key=lambda one: (one.step, counts[one], one.digest))
    ahead = [one for one in counts if one.step > had.step]
    if ahead:
        return max(ahead, key=lambda one: (one.step, counts[one], one.digest))
    if had.step > 0 or any(one.digest == had.digest for one in counts):
        return had
    return max(counts, key=lambda one: (counts[one], one.digest))


def served_of(body: Any) -> Served | None:
    """Which weights an engine's answer says that it took; None where it says nothing of them."""
    if not isinstance(body, dict) or not isinstance(body.get("step"), int):
        return None
    return Served(body["step"], str(body.get("digest", ""))[:DIGITS])


def _space(said: Any) -> Space | None:
    try:
        return msgspec.convert(said, Space | None)
    except msgspec.ValidationError:
        return None


def lacking(name: str, wanted: Loaded, own: Loaded | None) -> str:
    """How an engine has not got an adapter; "" where it has.

    >>> lacking("sums", Loaded(b"call", "9f2c"), Loaded(b"call", "31aa"))
    'its adapter sums hashes to 31aa, and what was loaded first to 9f2c'
    """
    if own is None or own.call != wanted.call:
        return f"it has not loaded {name}"
    if own.digest != wanted.digest:
        return (
            f"its adapter {name} hashes to {own.digest[:DIGITS]}, and what was loaded first to {wanted.digest[:DIGITS]}"
        )
    return ""


def digest_of(body: Any) -> str:
    """Of the adapter that an engine's answer says that it loaded; "" where it says nothing of it."""
    return str(body.get("digest", "")) if isinstance(body, dict) else ""


def read(body: bytes) -> Any:
    """As JSON; None for what is none."""
    try:
        return msgspec.json.decode(body)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError):
        return None


def _status(body: bytes) -> str:
    found = read(body)
    return str(found.get("status", "")) if isinstance(found, dict) else ""
