"""Regression caught: the end of a context that is run again, copied from where it is not, or kept for ever."""

from __future__ import annotations

from tandem.types import WeightVersion
from tests.null.paged_memory import VOCAB, alone, group, make


def test_a_turn_goes_on_in_the_midst_of_a_page() -> None:
    """What no full block holds, run again in every turn of a program; or a page of other tokens taken for it."""
    engine, runner = make()
    (first,) = engine.generate(group("a", [1, 2, 3, 4, 5], 1, 6, stop=()))
    context = [1, 2, 3, 4, 5, *first.tokens]  # 10 of 11 are known to the engine: two blocks of 4, and two more
    (second,) = engine.generate(group("b", [*context, 0, 0], 1, 2, stop=()))
    assert second.cached_tokens == 10 and runner.copied == 1
    (third,) = engine.generate(group("c", [*context[:9], VOCAB, 0, 0], 1, 2, stop=()))
    assert third.cached_tokens == 9 and runner.copied == 2
    (fourth,) = engine.generate(group("d", [*context[:8], VOCAB, 0], 1, 2, stop=()))
    assert fourth.cached_tokens == 8 and runner.copied == 2
    engine.receive(WeightVersion(1, "new"))
    (fifth,) = engine.generate(group("e", [*context, 0], 1, 2, stop=()))
    assert fifth.cached_tokens == 0 and runner.copied == 2
    for done, prompt in (
        (second, [*context, 0, 0]),
        (third, [*context[:9], VOCAB, 0, 0]),
        (fourth, [*context[:8], VOCAB, 0]),
    ):
        assert (done.tokens, done.logprobs) == alone(group("x", prompt, 1, 2, stop=())[0])


def test_ends_are_forgotten_with_their_pages() -> None:
    """An engine that serves one version for ever keeps the tokens of every request that ended."""
    engine, _ = make(8)
    ends = engine.scheduler.ends
    for number in range(40):
        engine.generate(group(f"a{number}", [number % 5, number // 5, 1], 1, 3, stop=()))
        engine.generate(group(f"b{number}", [0, 0, 0, 0], 1, 3 + number % 2, stop=()))
        assert len(ends._after) <= 8 and all(len(after) <= ends.MOST for after in ends._after.values())
    assert not ends.borrowed
