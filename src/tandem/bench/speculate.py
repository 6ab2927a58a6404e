"""`bench speculate`: what drafts are worth on this machine, and what they cost where they are worth nothing.

First the times of steps by (sequences, drafts of each), which the engine goes by and which are kept for it. Then the
same requests without drafts and with each drafter's, A B A B, on SmolLM2: code that is to be written again with a name
changed, siblings of a group one after the other, and drafts that stand at a given rate. All texts are compared: a
drafter that changes one ends the bench. Prompts are in the cache when the clock starts; each turn has prompts of its
own, so that no drafter knows an answer from the turn before.
"""

from __future__ import annotations

import random
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from functools import cache, partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import tandem
from tandem.bench.peers import Figure, beside_limit
from tandem.bench.sweep import start_decoding, stop_decoding
from tandem.bench.work import MODEL, random_requests
from tandem.engine.config import By, DraftConfig, EngineConfig
from tandem.engine.draft import Drafter
from tandem.engine.lengths import Lengths
from tandem.engine.tally import Tally
from tandem.errors import WorldError
from tandem.numerics.interval import wilson_interval
from tandem.plan import roofline
from tandem.plan.roofline import SMOLLM2, Machine, timed

if TYPE_CHECKING:
    from tandem.engine.batch import Sequence as Live
    from tandem.engine.engine import Engine
    from tandem.run.parts import Parts
    from tandem.types import Request

SEQUENCES = (1, 2, 4, 8, 16, 32)
MOST = 8  # drafts of a sequence
DRAFTS = (0, 1, 2, 4, 8)  # of each sequence, in the table
CONTEXT = 256  # of the table
WARM_UP, STEPS = 2, 9  # of a point of the table; the median of the steps counts
DRAFTERS: tuple[By, ...] = ("lookup", "suffix")
RATES = (0.0, 0.3, 0.6, 0.9)
SYNTHETIC = (1, 8, 32)  # sequences
NEW = 128  # tokens of an answer
SIBLINGS, TEMPERATURE = 4, 0.6
LINES = 36  # of a piece of code
NEVER, WANTED = 0.97, {("code edit", 1, "suffix"): 2.5, ("siblings", 1, "suffix"): 2.5}
Texts = list[tuple[int, ...]]
Answer = Callable[["Engine", Sequence["Request"]], Texts]


def speculate(rounds: int) -> dict[str, Any]:
    """The table, and a row a work and drafter."""
    parts = _parts()
    steps, table = measured_table(_engine(parts, DraftConfig("lookup", MOST)))
    engines = {"none": _engine(parts, DraftConfig())}
    for drafter in DRAFTERS:
        engines[drafter] = _engine(parts, DraftConfig(drafter, MOST))
    rates = {f"{rate:g}": _engine(parts, DraftConfig("synthetic", MOST, acceptance=rate)) for rate in RATES}
    for engine in (*engines.values(), *rates.values()):
        if engine.scheduler.drafting.lengths is not None:
            engine.scheduler.drafting.lengths.steps.take(steps)
    rows: list[dict[str, Any]] = []
    for count in SEQUENCES:
        rows += compare("code edit", count, engines, rounds, partial(edits, parts, count), together)
    rows += compare("siblings", 1, engines, rounds, partial(siblings, parts), one_by_one)
    made = {"none": engines["none"]} | rates
    for count in SYNTHETIC:
        asked = random_requests(count, 64, engines["none"].vocab_size, NEW, random.Random(count))
        for name, engine in rates.items():
            together(engine, [replace(one, id=f"{name} {one.id}") for one in asked])  # which it drafts from then on
        rows += compare("synthetic", count, made, rounds, partial(_same, asked), together)
    return {"bench": "speculate", "rounds": rounds, "most": MOST, "table": table, "rows": rows}


def _same(requests: list[Request], turn: int) -> list[Request]:
    return requests


def peered(machine: Machine) -> Iterator[Figure]:
    """A single stream of code edits on the 4-bit codes of the file, drafted by suffix: what a peer's own speculative
    decoding is beside."""
    parts = _parts(codes=True)
    engine = _engine(parts, DraftConfig("suffix", MOST))
    found = []
    for turn in range(3):
        asked = edits(parts, 1, turn)
        _warm(engine, asked)
        found.append(timed(partial(together, engine, asked)))
    least_s = machine.least_s(roofline.decode_cost(SMOLLM2, 1, CONTEXT + NEW / 2, roofline.Q4_FILE_BYTES))
    yield from beside_limit(f"code edit 1x{NEW} q4", NEW * least_s, found, NEW)


class _Forced(Lengths):
    """So many drafts a sequence, whatever they cost; only some steps are timed."""

    drafts, timing = 0, False

    def ask(self, names: Sequence[int], most: Sequence[int], rows: int) -> list[int]:
        return [min(self.drafts, one) for one in most]

    def took(self, sequences: int, rows: int, seconds: float, draws_alone: bool) -> None:
        if self.timing:
            super().took(sequences, rows, seconds, draws_alone)

    def forget(self, name: int) -> None:
        """There is nothing to forget."""


class _Anything(Drafter):
    """A token, again and again."""

    def draft(self, sequences: list[Live], most: list[int]) -> list[list[int]]:
        return [[1] * count for count in most]


def measured_table(engine: Engine) -> tuple[dict[str, tuple[float, float]], list[dict[str, Any]]]:
    """Times of steps as an engine keeps them (it has kept them now), and as rows: sequences, drafts of each, seconds,
    and of those what another draft of each adds to a step without, relative to it."""
    drafting = engine.scheduler.drafting
    assert drafting.lengths is not None
    forced = _Forced(MOST, drafting.lengths.file)
    drafting.lengths, drafting.drafter = forced, _Anything()
    rows = []
    for count in SEQUENCES:
        start_decoding(engine, count, CONTEXT, len(DRAFTS) * (WARM_UP + STEPS) + 2 * MOST, random.Random(count))
        took = []
        for drafts in DRAFTS:
            forced.drafts = drafts
            for step in range(WARM_UP + STEPS):
                forced.timing = step >= WARM_UP
                took.append(timed(engine.step))
            rows.append({"sequences": count, "drafts": drafts, "step_s": statistics.median(took[-STEPS:])})
        forced.timing = False
        stop_decoding(engine)
    forced.keep()
    plain_s = {row["sequences"]: row["step_s"] for row in rows if not row["drafts"]}
    for row in rows:
        added = row["step_s"] / plain_s[row["sequences"]] - 1
        row["a_draft"] = added / row["drafts"] if row["drafts"] else 0.0  # what must stand of them for it to pay
    return forced.steps.kept(), rows


def compare(
    work: str,
    count: int,
    engines: dict[str, Engine],
    rounds: int,
    requests: Callable[[int], Sequence[Request]],
    answer: Answer,
) -> list[dict[str, Any]]:
    """A row a drafter: engines answer the requests of a turn one after the other, in `rounds` turns and one before.

    WorldError where a text is not that without drafts."""
    seconds: dict[str, list[float]] = {name: [] for name in engines}
    counts: dict[str, list[Any]] = {name: [] for name in engines}
    tokens: list[int] = []
    for turn in range(rounds + 1):
        texts: dict[str, Texts] = {}
        for name, engine in engines.items():
            asked = [replace(one, id=f"{work} {count} {turn} {name} {one.id}") for one in requests(turn)]
            _warm(engine, asked)
            before, began_s = engine.stats, time.perf_counter()
            texts[name] = answer(engine, asked)
            took_s = time.perf_counter() - began_s
            if turn:  # memory is touched first in the one before
                seconds[name].append(took_s)
                after = engine.stats
                names = ("drafted_at", "accepted_at", "draft_s", "batches")
                counts[name].append([getattr(after, one) - getattr(before, one) for one in names])
        if odd := [name for name, found in texts.items() if found != texts["none"]]:
            raise WorldError(
                f"bench speculate, {work}: drafts by {odd[0]} changed a text. That must not be; report it."
            )
        tokens.append(sum(map(len, texts["none"])))
    return [_row(work, count, name, tokens[1:], seconds, counts[name]) for name in engines if name != "none"]


def _row(
    work: str, count: int, name: str, tokens: list[int], seconds: dict[str, list[float]], counts: list[Any]
) -> dict[str, Any]:
    """tokens, seconds, counts: of each turn."""
    drafted_at, accepted_at, draft_s, batches = (sum(one) for one in zip(*counts, strict=True))
    if not isinstance(drafted_at, Tally):
        drafted_at = accepted_at = Tally()
    shares = [(n, right, *wilson_interval(right, n)) for n, right in zip(drafted_at, accepted_at, strict=True) if n]
    rates = {who: [n / took for n, took in zip(tokens, seconds[who], strict=True)] for who in ("none", name)}
    both = zip(rates[name], rates["none"], strict=True)
    return {
        "work": work,
        "sequences": count,
        "drafter": name,
        "plain_tok_s": statistics.median(rates["none"]),
        "tok_s": statistics.median(rates[name]),
        "ratio": statistics.median(drafted / plain for drafted, plain in both),
        "wanted": WANTED.get((work, count, name), NEVER),
        "tokens_a_step": sum(tokens) / (batches * count),
        "draft_share": draft_s / sum(seconds[name]),
        "at": [{"drafted": n, "accepted": right, "low": low, "high": high} for n, right, low, high in shares],
    }


def together(engine: Engine, requests: Sequence[Request]) -> Texts:
    return [done.tokens for done in engine.generate(requests)]


def one_by_one(engine: Engine, requests: Sequence[Request]) -> Texts:
    return [text for request in requests for text in together(engine, [request])]


def _warm(engine: Engine, requests: Sequence[Request]) -> None:
    """Their prompts are in the cache."""
    one = [replace(r, id=f"warm {r.id}", sampling=replace(r.sampling, max_new_tokens=1)) for r in requests]
    engine.generate(one)


def edits(parts: Parts, count: int, turn: int) -> list[Request]:
    """Pieces of tandem's own code, each to be written again with a small change; greedily, as an editor asks. The first
    lines of the answers are given: where a small model begins is its own affair."""
    from tandem.types import Message, Request, Sampling

    pieces = _pieces()
    sampling = Sampling(temperature=0.0, max_new_tokens=NEW, stop_token_ids=parts.tokenizer.stop_token_ids)
    requests = []
    for i in range(count):
        piece = pieces[(turn * 577 + i * 131 + count * 7) % len(pieces)]
        asked = f"```python\n{piece}\n```\nWrite this code again, with a comment at its end that says what it does."
        prompt = parts.tokenizer.render_messages([Message("user", asked)], add_generation_prompt=True)
        first = "\n".join(piece.splitlines()[:3])
        tokens = (*prompt, *parts.tokenizer.encode(f"```python\n{first}\n"))
        requests.append(Request(f"{i}", f"edit {turn} {i}", tokens, sampling, i))
    return requests


@cache
def _pieces() -> list[str]:
    """So many lines of each of tandem's files, from a function or a class on."""
    pieces = []
    for path in sorted(Path(tandem.__file__).parent.rglob("*.py")):
        lines = path.read_text(encoding="utf-8").splitlines()
        starts = [i for i, line in enumerate(lines[:-LINES]) if line.startswith(("def ", "class "))]
        pieces += ["\n".join(lines[first : first + LINES]).rstrip() for first in starts]
    return pieces


def siblings(parts: Parts, turn: int) -> list[Request]:
    """Samples of one prompt."""
    from tandem.types import Message, Request, Sampling

    text = f"What is {turn * 7 + 12} + {turn * 13 + 35}? Explain step by step in detail."
    tokens = tuple(parts.tokenizer.render_messages([Message("user", text)], add_generation_prompt=True))
    sampling = Sampling(temperature=TEMPERATURE, max_new_tokens=NEW)
    return [Request(f"{i}", f"sum {turn}", tokens, sampling, seed=turn << 8 | i) for i in range(SIBLINGS)]


def _parts(codes: bool = False) -> Parts:
    from tandem.models.config import ModelConfig
    from tandem.run.parts import build_parts

    return build_parts(ModelConfig(MODEL), EngineConfig(kv_memory_bytes=1 << 26), learns=not codes)


def _engine(parts: Parts, draft: DraftConfig) -> Engine:
    """On the weights of `parts`, with room for what is measured."""
    from tandem.run.parts import engine_on

    memory = max(SEQUENCES) * (1024 + 2 * NEW) * parts.engine.runner.layout.groups[0].token_bytes
    decoder = parts.engine.runner.decoder  # type: ignore[attr-defined]
    return engine_on(decoder, EngineConfig(kv_memory_bytes=memory, draft=draft), parts.tokenizer)
