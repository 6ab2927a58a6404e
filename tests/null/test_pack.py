"""Packing: every prediction once, on the right path, under the budget."""

from __future__ import annotations

import itertools
import sys
import tracemalloc
from collections import Counter
from itertools import pairwise
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tandem.algo import pack as pack_module
from tandem.algo.pack import (
    CONTEXT,
    PromptTotal,
    _balanced,
    _Batch,
    _first_fit,
    _units,
    canonical,
    count_prompts,
    denominators,
    merge_totals,
    natural_key,
    pack,
    split_updates,
)
from tandem.columns import COLUMNS, Columns
from tandem.errors import ConfigError
from tandem.types import Denominators, Microbatch, Sample
from tests.samples import SCORED, column, having, owners_of, paths_of, trained, without


def make_sample(name: str, prompt: str, tokens: tuple[int, ...], mask: tuple[bool, ...]) -> Sample:
    """Values that name their place: advantage = base of the id + position, and so on."""
    base = 1000.0 * (sum(map(ord, name)) % 97)
    columns = Columns.of(
        tokens=tokens,
        loss_mask=mask,
        advantages=[base + p if m else 0.0 for p, m in enumerate(mask)],
        logprobs=[-base - p if m else 0.0 for p, m in enumerate(mask)],
        versions=[p if m else -1 for p, m in enumerate(mask)],
    )
    return Sample(name, prompt, columns)


@st.composite
def batches(draw: st.DrawFn) -> list[Sample]:
    """Prompts with siblings that share the prompt, and often some of the answer; masks with holes (turns)."""
    samples = []
    for p in range(draw(st.integers(1, 5))):
        prompt = tuple(draw(st.lists(st.integers(0, 2), min_size=1, max_size=6)))
        for g in range(draw(st.integers(1, 6))):
            answer = tuple(draw(st.lists(st.integers(0, 2), min_size=1, max_size=8)))
            mask = draw(st.lists(st.booleans(), min_size=len(answer), max_size=len(answer)).filter(any))
            samples.append(make_sample(f"p{p}/{g}", f"p{p}", prompt + answer, (False,) * len(prompt) + tuple(mask)))
    return draw(st.permutations(samples))


PREDICTED = ("tokens", "advantages", "logprobs")


def predictions(microbatches: list[Microbatch]) -> Counter:
    """(sample, tokens on the path, target, advantage, behaviour log-prob) of every prediction."""
    found: Counter = Counter()
    for m in microbatches:
        contexts = [tuple(m.tokens_T[path].tolist()) for path in paths_of(m)]
        values = (m.predictions[name].tolist() for name in PREDICTED)
        found.update(zip(owners_of(m), (contexts[row] for row in m.rows_N), *values, strict=True))
    return found


def expected_predictions(samples: list[Sample]) -> Counter:
    return Counter(
        (s.id, tuple(column(s, "tokens")[:p]), *(column(s, name)[p] for name in PREDICTED))
        for s in samples
        for p in trained(s)
    )


@settings(max_examples=150, deadline=None)
@given(samples=batches(), budget=st.integers(1, 60), share=st.booleans())
def test_every_prediction_once_on_its_own_path(samples: list[Sample], budget: int, share: bool) -> None:
    """A prediction is lost, doubled, or reads a row whose past is not the sample's own tokens."""
    found = pack(samples, count_prompts(samples), budget, share)
    assert predictions(found) == expected_predictions(samples)


@settings(max_examples=150, deadline=None)
@given(samples=batches(), budget=st.integers(1, 60), share=st.booleans())
def test_structure_of_microbatches(samples: list[Sample], budget: int, share: bool) -> None:
    """Rows outside their segment, wrong positions, a prompt's row in another's path, a sample split, budget broken."""
    prompts = count_prompts(samples)
    by_id = {sample.id: sample for sample in samples}
    found = pack(samples, prompts, budget, share)
    placed = [name for m in found for name in m.sample_ids]
    assert sorted(placed) == sorted(by_id)
    for m in found:
        rows, segments = len(m.tokens_T), m.segments_S.tolist()
        assert rows <= budget or len(m.sample_ids) == 1
        assert segments[0] == 0 and segments[-1] == rows and len(segments) == len(m.first_S) + 1 == len(m.parent_S) + 1
        assert segments == sorted(set(segments)), "empty segment"
        ends: list[int] = []  # of each segment: positions on its path
        for (start, stop), first, parent in zip(pairwise(segments), m.first_S, m.parent_S, strict=True):
            assert first == 0 if parent < 0 else 0 < first <= ends[parent], "a path with a hole, or through the future"
            assert share or parent < 0
            ends.append(first + stop - start)
        paths, readers = paths_of(m), dict[int, set[str]]()
        for name, row in zip(owners_of(m), m.rows_N.tolist(), strict=True):
            assert len(set(paths[row])) == len(paths[row]) and paths[row][-1] == row
            for r in paths[row]:
                readers.setdefault(r, set()).add(name)
        assert set(readers) == set(range(rows)), "a row that nothing reads"
        assert all(len({by_id[name].prompt_id for name in names}) == 1 for names in readers.values())
        assert all(len(names) == 1 for names in readers.values()) or share
        assert [samples[index].id for index in m.members] == list(m.sample_ids)
        assert m.sample_tokens.tolist() == [len(trained(by_id[name])) for name in m.sample_ids]
        of_prompt = {total.prompt_id: total for total in prompts}
        assert m.prompt_tokens.tolist() == [of_prompt[by_id[name].prompt_id].tokens for name in m.sample_ids]
        assert m.denominators == denominators(prompts)
        arrays = (
            m.tokens_T,
            m.segments_S,
            m.first_S,
            m.parent_S,
            m.rows_N,
            m.members,
            m.sample_tokens,
            m.prompt_tokens,
        )
        assert {array.dtype for array in arrays} == {np.dtype(np.int32)}


@settings(max_examples=80, deadline=None)
@given(samples=batches(), budget=st.integers(1, 60))
def test_sharing_never_costs_rows(samples: list[Sample], budget: int) -> None:
    """Sharing duplicates rows of a group that it split, and runs more tokens than a plain pack."""
    prompts = count_prompts(samples)

    def rows(share: bool) -> int:
        return sum(len(m.tokens_T) for m in pack(samples, prompts, budget, share))

    assert rows(True) <= rows(False)


def test_hand_worked_shared_prefix() -> None:
    """The last shared row fails to predict each sibling's own first token, or a sibling gets rows it does not need."""
    mask = (False, False, True, True)
    samples = [
        make_sample("p/0", "p", (5, 6, 7, 8), mask),
        make_sample("p/1", "p", (5, 6, 9, 8), mask),
        make_sample("p/2", "p", (5, 6, 3), mask[:3]),  # its one target is predicted by the last shared row
    ]
    (m,) = pack(samples, count_prompts(samples), budget_tokens=4)
    assert m.tokens_T.tolist() == [5, 6, 7, 9]
    assert m.segments_S.tolist() == [0, 2, 3, 4]
    assert m.first_S.tolist() == [0, 2, 2] and m.parent_S.tolist() == [-1, 0, 0]
    assert paths_of(m) == [[0], [0, 1], [0, 1, 2], [0, 1, 3]]
    assert m.rows_N.tolist() == [1, 2, 1, 3, 1]
    assert m.predictions["tokens"].tolist() == [7, 8, 9, 8, 3]
    assert m.members.tolist() == [0, 1, 2] and owners_of(m) == ["p/0", "p/0", "p/1", "p/1", "p/2"]
    assert m.sample_tokens.tolist() == [2, 2, 1] and m.prompt_tokens.tolist() == [5, 5, 5]
    assert m.denominators == Denominators(tokens=5, samples=3, prompts=1)
    assert set(m.predictions.arrays) == {"tokens", "advantages", "logprobs"}


def test_trailing_observation_has_no_rows() -> None:
    """Tokens after the last trained one are run through the model for nothing."""
    sample = make_sample("p/0", "p", (1, 2, 3, 4, 5), (False, True, False, False, False))
    (m,) = pack([sample], count_prompts([sample]), 8)
    assert (m.tokens_T.tolist(), m.rows_N.tolist(), m.predictions["tokens"].tolist()) == ([1], [0], [2])


def test_first_fit_decreasing_by_hand() -> None:
    """The packer opens microbatches that it could have filled: rows 6, 5, 4, 3, 2 fit twice into 10."""
    samples = [make_sample(f"s{n}", f"s{n}", tuple(range(n + 1)), (False,) * n + (True,)) for n in (2, 3, 4, 5, 6)]
    found = pack(samples, count_prompts(samples), 10)
    assert [m.sample_ids for m in found] == [("s4", "s6"), ("s2", "s3", "s5")]


def test_long_sample_has_its_own_microbatch() -> None:
    """A sample beyond the budget is split, dropped or loops for ever."""
    long = make_sample("p/0", "p", tuple(range(30)), (False,) + (True,) * 29)
    short = make_sample("p/1", "p", (0, 1, 2), (False, True, True))
    found = pack([long, short], count_prompts([long, short]), 8)
    assert sorted(m.sample_ids for m in found) == [("p/0",), ("p/1",)]


def test_group_beyond_the_budget_keeps_sharing() -> None:
    """A group larger than the budget loses its shared prefix altogether."""
    prompt = tuple(range(10))
    samples = [make_sample(f"p/{g}", "p", prompt + (50 + g, 60, 61), (False,) * 10 + (True,) * 3) for g in range(8)]
    found = pack(samples, count_prompts(samples), 18)
    assert [len(m.tokens_T) for m in found] == [18, 18]
    assert all(len(m.sample_ids) == 4 for m in found)


def test_reference_logprobs_follow_their_tokens() -> None:
    """The KL term reads the reference log-prob of a neighbouring token."""
    plain = make_sample("p/0", "p", (1, 2, 3, 4), (False, True, False, True))
    sample = having(plain, reference_logprobs=(9, -1, 9, -3))
    (m,) = pack([sample], count_prompts([sample]), 8)
    assert m.predictions["reference_logprobs"].tolist() == [-1.0, -3.0]


TAUGHT = ("teacher_ids", "teacher_logprobs")


def filled(sample: Sample) -> Sample:
    """Every optional column, with values that name their column and place."""
    count = len(sample.columns)
    scored = {name: [100.0 * k + p for p in range(count)] for k, name in enumerate(SCORED)}
    kept = [bytes([p]) for p in range(count)]
    of_turns = {"turns": range(count), "states": [f"state {p}" for p in range(count)]}
    earned = {name: [base + p for p in range(count)] for name, base in (("step_rewards", 1e3), ("values", 2e3))}
    bases = (("unfiltered_logprobs", 900.0), ("returns", 3e3), ("selection_weights", 4e3), ("distil_weights", 5e3))
    more = {name: [base + p for p in range(count)] for name, base in (*bases, ("span_logprobs", 6e3), ("spans", 7000))}
    if count:  # several numbers a token
        more |= {name: [[base + p, base] for p in range(count)] for name, base in zip(TAUGHT, (8000, 9e3), strict=True)}
    written = {"preferred": range(count), "failed": [p % 2 for p in range(count)]}
    written |= {name: [base + p for p in range(count)] for name, base in (("margins", 1e4), ("loss_weights", 1.1e4))}
    every = having(
        sample, **scored, kept=kept, likely=[b"l" + one for one in kept], **of_turns, **earned, **more, **written
    )
    assert set(every.columns.arrays) == set(COLUMNS)
    return every


@settings(max_examples=50, deadline=None)
@given(samples=batches(), budget=st.integers(1, 60), share=st.booleans())
def test_optional_columns_follow_their_prediction(samples: list[Sample], budget: int, share: bool) -> None:
    """A proximal, source or unfiltered log-prob, or a kept set, is that of another token, sample or column."""
    by_id = {sample.id: filled(sample) for sample in samples}
    for m in pack(list(by_id.values()), count_prompts(samples), budget, share):
        assert set(m.predictions.arrays) == COLUMNS.keys() - {"loss_mask", "versions"}
        for name in m.predictions.arrays:
            wanted = [column(by_id[i], name)[p] for i in m.sample_ids for p in trained(by_id[i])]
            assert m.predictions[name].tolist() == wanted, name


def test_a_batch_that_is_partly_filtered() -> None:
    """A sample without kept sets shifts those of its neighbours, or has no unfiltered log-probs."""
    plain = make_sample("p/0", "p", (1, 2, 3), (False, True, True))
    (m,) = pack([plain], count_prompts([plain]), 8)
    assert set(m.predictions.arrays) == {"tokens", "advantages", "logprobs"}
    other = without(
        filled(make_sample("q/0", "q", (4, 5, 6), (False, False, True))),
        *SCORED,
        "values",
        "returns",
        "selection_weights",
        *TAUGHT,
    )
    (m,) = pack([plain, other], count_prompts([plain, other]), 8)
    assert m.predictions["kept"].tolist() == [b"", b"", bytes([2])]
    assert m.predictions["unfiltered_logprobs"].tolist() == [*column(plain, "logprobs")[1:], 902.0]


def test_partly_scored_batches_are_programmer_errors() -> None:
    """A sample without proximal log-probs takes its neighbour's."""
    samples = [make_sample(f"p/{g}", "p", (1, 2, 3), (False, True, True)) for g in range(2)]
    samples[1] = having(samples[1], proximal_logprobs=(0.0, -1.0, -1.0))
    with pytest.raises(AssertionError, match="lack proximal_logprobs"):
        pack(samples, count_prompts(samples), 8)


@settings(max_examples=50, deadline=None)
@given(samples=batches(), seed=st.randoms(use_true_random=False))
def test_canonical_order_does_not_depend_on_arrival(samples: list[Sample], seed) -> None:
    """Two orders of the same groups are packed, and so rounded, in two ways."""
    mixed = seed.sample(samples, len(samples))
    assert canonical(mixed, count_prompts(mixed)) == canonical(samples, count_prompts(samples))


def test_natural_order_by_hand() -> None:
    """p/3/10 comes before p/3/9, or ids that begin with a number cannot be compared with others."""
    ordered = ["2", "10", "a", "p/3/9", "p/3/10", "p/20/1", "q"]
    assert sorted(["p/20/1", "q", "p/3/10", "10", "p/3/9", "a", "2"], key=natural_key) == ordered
    assert sorted(["p/01", "p/1"], key=natural_key) == sorted(["p/1", "p/01"], key=natural_key)
    samples = [make_sample(f"q/{g}", "q", (1, 2), (False, True)) for g in (10, 9)]
    samples.append(make_sample("p/0", "p", (1, 2), (False, True)))
    members, totals = canonical(samples, count_prompts(samples))
    assert [s.id for s in members] == ["p/0", "q/9", "q/10"] and [t.prompt_id for t in totals] == ["p", "q"]


def test_totals_of_untrained_samples_reach_the_microbatch() -> None:
    """Denominators are counted from the packed samples instead of the whole batch."""
    sample = make_sample("q/0", "q", (1, 2, 3), (False, True, True))
    prompts = (PromptTotal("p", tokens=40, samples=8), PromptTotal("q", tokens=12, samples=4))
    (m,) = pack([sample], prompts, 8)
    assert m.denominators == Denominators(tokens=52, samples=12, prompts=2)
    assert m.prompt_tokens.tolist() == [12]
    assert merge_totals([*prompts, PromptTotal("p", 1, 1)])[0] == PromptTotal("p", 41, 9)


@settings(max_examples=50, deadline=None)
@given(samples=batches(), updates=st.integers(1, 4))
def test_updates_deal_out_whole_prompts(samples: list[Sample], updates: int) -> None:
    """A prompt is trained in two updates of a step, in none, or under another update's denominators."""
    parts = split_updates(samples, count_prompts(samples), updates)
    assert len(parts) == min(updates, len({sample.prompt_id for sample in samples}))
    assert sorted(s.id for members, _ in parts for s in members) == sorted(s.id for s in samples)
    for members, totals in parts:
        assert {total.prompt_id: total for total in totals} == {t.prompt_id: t for t in count_prompts(members)}


def work_of(prompts: int, siblings: int, length: int, budget: int) -> tuple[int, int]:
    """Lines of pack.py and columns.py that a pack runs, every turn of a loop counted, and its peak bytes."""
    prompt, mask = tuple(range(length // 3)), (False,) * (length // 3) + (True,) * (length - length // 3)
    samples = [
        make_sample(f"{p}/{g}", str(p), prompt + (g,) * (length - len(prompt)), mask)
        for p in range(prompts)
        for g in range(siblings)
    ]
    totals, lines = count_prompts(samples), 0
    files = {pack.__code__.co_filename, Columns.of.__func__.__code__.co_filename}

    def count(frame: Any, event: str, _: Any) -> Any:
        nonlocal lines
        lines += event == "line"
        return count if frame.f_code.co_filename in files else None

    before = sys.gettrace()
    sys.settrace(count)
    try:
        pack(samples, totals, budget)
    finally:
        sys.settrace(before)
    tracemalloc.start()
    try:
        pack(samples, totals, budget)
        return lines, tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()


def test_packing_stays_linear() -> None:
    """A loop over tokens, a path written out for each row, or siblings compared pair by pair."""
    lines, peak = work_of(prompts=20, siblings=8, length=300, budget=4096)
    long_lines, long_peak = work_of(prompts=20, siblings=8, length=1200, budget=4 * 4096)
    assert long_lines < 1.1 * lines, "lines run by the token"
    assert long_peak < 4.4 * peak
    for prompts, siblings in ((80, 8), (20, 32)):
        more_lines, more_peak = work_of(prompts, siblings, length=300, budget=4 * 4096)
        assert more_lines < 4.4 * lines and more_peak < 4.4 * peak, (prompts, siblings)


@pytest.mark.parametrize(
    ("mask", "says"), [((True, True), "nothing predicts the first"), ((False, False), "no token to train on")]
)
def test_untrainable_samples_are_programmer_errors(mask: tuple[bool, ...], says: str) -> None:
    """A sample without a prediction, or whose first token is trained, divides by zero further on."""
    good = make_sample("q/0", "q", (1, 2), (False, True))
    sample = make_sample("p/0", "p", (1, 2), mask)
    for samples in ([sample], [good, sample], [sample, good]):
        with pytest.raises(AssertionError, match=f"p/0.*{says}"):
            pack(samples, (PromptTotal("p", 1, 1), PromptTotal("q", 1, 1)), 8)


def cost_of(microbatch: Microbatch) -> float:
    """Row by row: 1, and the positions that it attends to over CONTEXT."""
    return sum(1 + len(path) / CONTEXT for path in paths_of(microbatch))


def test_a_long_sample_weighs_what_it_attends_to() -> None:
    """Bins of equal rows and unequal work: whoever has the long sample is waited for."""
    lengths = {"long": 6001, **{f"s{i}": 301 for i in range(40)}}
    samples = [make_sample(n, n, tuple(range(t)), (False, *(True,) * (t - 1))) for n, t in lengths.items()]
    found = pack(samples, count_prompts(samples), 12_000, share_prefix=False)
    assert len(found) == 2 and all(len(m.tokens_T) <= 12_000 for m in found)
    costs = [cost_of(m) for m in found]
    assert max(costs) / min(costs) < 1.03  # a short sample costs 315 of 12,000
    (heavy,) = (m for m in found if "long" in m.sample_ids)
    assert len(heavy.tokens_T) < 0.9 * max(len(m.tokens_T) for m in found)


@given(batches(), st.integers(1, 60), st.sampled_from([1, 3]))
@settings(max_examples=100, deadline=None)
def test_costs_are_those_of_the_rows(samples: list[Sample], budget: int, branch: int) -> None:
    """A shared prompt counted once a sibling, or its siblings' rows as if they attended to their own alone."""
    batch = _Batch.of(samples)
    assert batch.rows == [max(trained(sample)) for sample in samples]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(pack_module, "BRANCH", branch)
        units = _units(samples, batch, budget)
        found = pack(samples, count_prompts(samples), budget)
    assert sorted(index for unit in units for index in unit.members) == list(range(len(samples)))
    assert all(unit.rows <= budget or len(unit.members) == 1 for unit in units)
    assert sum(unit.rows for unit in units) == sum(len(m.tokens_T) for m in found)
    assert sum(unit.cost for unit in units) == pytest.approx(sum(map(cost_of, found)))


def fewest_rows(samples: list[Sample]) -> int:
    """Distinct beginnings of the samples of each prompt: a row each is the least that any tree takes."""
    begun = {
        (sample.prompt_id, tuple(column(sample, "tokens")[: end + 1]))
        for sample in samples
        for end in range(max(trained(sample)))
    }
    return len(begun)


@given(batches())
@settings(max_examples=150, deadline=None)
def test_a_tree_runs_each_beginning_once(samples: list[Sample]) -> None:
    """Turns of a program, or siblings, that share more than their prompt are run as copies of it."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(pack_module, "BRANCH", 1)
        found = pack(samples, count_prompts(samples), 10_000)
    assert predictions(found) == expected_predictions(samples)
    assert sum(len(m.tokens_T) for m in found) == fewest_rows(samples)


def test_turns_of_a_program_by_hand() -> None:
    """A program whose context starts anew each turn is trained as copies: 3 x 40 tokens of context for one."""
    system, first, second = tuple(range(20)), tuple(range(100, 120)), tuple(range(200, 220))
    contexts = {"a/0": system, "a/1": system + first, "a/2": system + first + second, "b/0": system}
    samples = [
        make_sample(f"{name}", "p", context + (7, 8 + n), (False,) * len(context) + (True, True))
        for n, (name, context) in enumerate(contexts.items())
    ]
    (m,) = pack(samples, count_prompts(samples), 1000)
    assert m.sample_ids == ("a/0", "a/1", "a/2", "b/0")
    # The system message; 7 after it for a/0; what a/1 and a/2 share; 7 after that for a/1; a/2's own; 7 for b/0.
    assert np.diff(m.segments_S).tolist() == [20, 1, 20, 1, 21, 1]
    assert m.first_S.tolist() == [0, 20, 20, 40, 40, 20] and m.parent_S.tolist() == [-1, 0, 0, 2, 2, 0]
    assert predictions([m]) == expected_predictions(samples)


def test_a_tree_of_many_levels(monkeypatch: pytest.MonkeyPatch) -> None:
    """A program of hundreds of turns, each of which begins with all before it, ends in a RecursionError."""
    monkeypatch.setattr(pack_module, "BRANCH", 1)
    samples = [make_sample(f"p/{t}", "p", tuple(range(t)), (False,) * (t - 1) + (True,)) for t in range(2, 600)]
    (m,) = pack(samples, count_prompts(samples), 10**9)
    assert len(m.tokens_T) < sum(len(s.columns) - 1 for s in samples)
    assert sorted(m.predictions["tokens"].tolist()) == list(range(1, 599))
    assert (m.tokens_T[m.rows_N] == m.predictions["tokens"] - 1).all()


@given(st.lists(st.integers(1, 9), min_size=1, max_size=6), st.integers(10, 30))
@settings(max_examples=150, deadline=None)
def test_balance_against_every_way_to_deal_out(sizes: list[int], capacity: int) -> None:
    """Bins whose dearest costs more than the bound of longest-first over the best way there is, found by trying all."""
    bins = _balanced(sizes, [float(size) for size in sizes], capacity)
    assert sorted(index for chosen in bins for index in chosen) == list(range(len(sizes)))
    spent = [sum(sizes[index] for index in chosen) for chosen in bins]
    assert max(spent) <= capacity
    best = min(
        max(sum(size for size, bin_ in zip(sizes, dealt, strict=True) if bin_ == b) for b in range(len(bins)))
        for dealt in itertools.product(range(len(bins)), repeat=len(sizes))
    )
    first_fit = max(sum(sizes[index] for index in chosen) for chosen in _first_fit(sizes, capacity))
    assert max(spent) <= max(best * (4 / 3 - 1 / (3 * len(bins))), best) + 1e-9 or max(spent) == first_fit


@pytest.mark.parametrize("share", [True, False])
def test_answers_that_are_compared_stay_together(share: bool) -> None:
    """A prompt's samples are parted, or lie apart in a microbatch, where a loss needs them side by side."""
    samples = []
    for number in range(12):
        prompt = (1, *(number,) * (number % 5))
        for side in range(2):
            answer = (7 + side, *(3,) * (1 + (5 * number + 3 * side) % 7))
            mask = (False,) * len(prompt) + (True,) * len(answer)
            samples.append(make_sample(f"p{number}/{side}", f"p{number}", prompt + answer, mask))
    whole = pack(samples, count_prompts(samples), 24, share, whole=True)
    assert len(whole) > 4 and sorted(name for m in whole for name in m.sample_ids) == sorted(s.id for s in samples)
    for m in whole:
        assert len(m.tokens_T) <= 24
        for one, other in zip(m.sample_ids[::2], m.sample_ids[1::2], strict=True):
            assert one.split("/")[0] == other.split("/")[0]
    pairs = (samples[start : start + 2] for start in range(0, 24, 2))
    rows = max(len(m.tokens_T) for pair in pairs for m in pack(pair, count_prompts(pair), 99, share, whole=True))
    pack(samples, count_prompts(samples), rows, share, whole=True)
    with pytest.raises(ConfigError, match=rf"take {rows} rows of the {rows - 1} .* Raise learner.microbatch_tokens"):
        pack(samples, count_prompts(samples), rows - 1, share, whole=True)
