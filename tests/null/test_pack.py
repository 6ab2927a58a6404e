"""Packing: every prediction once, on the right path, under the budget."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tandem.algo.pack import (
    CONTEXT,
    SCORED,
    PromptTotal,
    _cost,
    _num_rows,
    _units,
    canonical,
    count_prompts,
    denominators,
    merge_totals,
    natural_key,
    pack,
    split_updates,
)
from tandem.types import Denominators, Microbatch, Sample


def make_sample(name: str, prompt: str, tokens: tuple[int, ...], mask: tuple[bool, ...]) -> Sample:
    """Values that name their place: advantage = base of the id + position, and so on."""
    base = 1000.0 * (sum(map(ord, name)) % 97)
    return Sample(
        name,
        prompt,
        tokens,
        mask,
        tuple(base + p if m else 0.0 for p, m in enumerate(mask)),
        tuple(-base - p if m else 0.0 for p, m in enumerate(mask)),
        tuple(0.25 * p for p in range(len(tokens))),
    )


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


def path_to(microbatch: Microbatch, row: int) -> tuple[int, ...]:
    """Rows from position 0 to `row`, by the segment that owns it."""
    for s, path in enumerate(microbatch.paths_S):
        if microbatch.segments_S[s] <= row < microbatch.segments_S[s + 1]:
            return path[: path.index(row) + 1]
    raise AssertionError(f"row {row} belongs to no segment")


def predictions(microbatches: list[Microbatch]) -> Counter:
    """(sample, tokens on the path, target, advantage, behaviour log-prob, weight) of every prediction."""
    found: Counter = Counter()
    for m in microbatches:
        for n, row in enumerate(m.rows_N):
            context = tuple(m.tokens_T[r] for r in path_to(m, row))
            found[
                m.sample_ids[m.sample_N[n]],
                context,
                m.targets_N[n],
                m.advantages_N[n],
                m.logprobs_N[n],
                m.weights_N[n],
            ] += 1
    return found


def expected_predictions(samples: list[Sample]) -> Counter:
    return Counter(
        (s.id, s.tokens[:p], s.tokens[p], s.advantages[p], s.logprobs[p], s.weights[p])
        for s in samples
        for p in range(len(s.tokens))
        if s.loss_mask[p]
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
        rows = len(m.tokens_T)
        assert rows <= budget or len(m.sample_ids) == 1
        assert m.segments_S[0] == 0 and m.segments_S[-1] == rows and len(m.segments_S) == len(m.paths_S) + 1
        assert list(m.segments_S) == sorted(set(m.segments_S)), "empty segment"
        owner_prompts: dict[int, set[int]] = {}
        for s, path in enumerate(m.paths_S):
            own = tuple(range(m.segments_S[s], m.segments_S[s + 1]))
            assert path[-len(own) :] == own
            assert tuple(m.positions_T[row] for row in path) == tuple(range(len(path)))
        for n, row in enumerate(m.rows_N):
            for r in path_to(m, row):
                owner_prompts.setdefault(r, set()).add(m.prompt_N[n])
        assert set(owner_prompts) == set(range(rows)), "a row that nothing reads"
        assert all(len(owners) == 1 for owners in owner_prompts.values())
        assert m.sample_N == tuple(i for i, count in enumerate(m.sample_tokens) for _ in range(count))
        assert [prompts[p].prompt_id for p in dict.fromkeys(m.prompt_N)] == list(
            dict.fromkeys(by_id[name].prompt_id for name in m.sample_ids)
        )
        of_prompt = {total.prompt_id: total for total in prompts}
        assert m.prompt_tokens == tuple(of_prompt[by_id[name].prompt_id].tokens for name in m.sample_ids)
        assert m.prompt_samples == tuple(of_prompt[by_id[name].prompt_id].samples for name in m.sample_ids)
        assert m.denominators == denominators(prompts)


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
    assert m.tokens_T == (5, 6, 7, 9)
    assert m.positions_T == (0, 1, 2, 2)
    assert m.segments_S == (0, 2, 3, 4)
    assert m.paths_S == ((0, 1), (0, 1, 2), (0, 1, 3))
    assert m.rows_N == (1, 2, 1, 3, 1)
    assert m.targets_N == (7, 8, 9, 8, 3)
    assert m.sample_N == (0, 0, 1, 1, 2)
    assert m.sample_tokens == (2, 2, 1) and m.prompt_tokens == (5, 5, 5) and m.prompt_samples == (3, 3, 3)
    assert m.denominators == Denominators(tokens=5, samples=3, prompts=1)
    assert m.reference_logprobs_N is None


def test_trailing_observation_has_no_rows() -> None:
    """Tokens after the last trained one are run through the model for nothing."""
    sample = make_sample("p/0", "p", (1, 2, 3, 4, 5), (False, True, False, False, False))
    (m,) = pack([sample], count_prompts([sample]), 8)
    assert m.tokens_T == (1,) and m.rows_N == (0,) and m.targets_N == (2,)


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
    sample = replace(plain, reference_logprobs=(9, -1, 9, -3))
    (m,) = pack([sample], count_prompts([sample]), 8)
    assert m.reference_logprobs_N == (-1, -3)


def filled(sample: Sample) -> Sample:
    """Every optional field, with values that name their field and place."""
    count = len(sample.tokens)
    scored = {name: tuple(100.0 * k + p for p in range(count)) for k, name in enumerate(SCORED)}
    kept = tuple(bytes([p]) for p in range(count))
    return replace(sample, **scored, kept=kept, unfiltered_logprobs=tuple(900.0 + p for p in range(count)))


@settings(max_examples=50, deadline=None)
@given(samples=batches(), budget=st.integers(1, 60), share=st.booleans())
def test_optional_fields_follow_their_prediction(samples: list[Sample], budget: int, share: bool) -> None:
    """A proximal, source or unfiltered log-prob, or a kept set, is that of another token, sample or field."""
    for m in pack([filled(sample) for sample in samples], count_prompts(samples), budget, share):
        by_id = {sample.id: sample for sample in samples}
        positions = [p for name in m.sample_ids for p, mask in enumerate(by_id[name].loss_mask) if mask]
        for k, name in enumerate(SCORED):
            assert getattr(m, f"{name}_N") == tuple(100.0 * k + p for p in positions)
        assert m.kept_N == tuple(bytes([p]) for p in positions)
        assert m.unfiltered_logprobs_N == tuple(900.0 + p for p in positions)


def test_a_batch_that_is_partly_filtered() -> None:
    """A sample without kept sets shifts those of its neighbours, or has no unfiltered log-probs."""
    plain = make_sample("p/0", "p", (1, 2, 3), (False, True, True))
    (m,) = pack([plain], count_prompts([plain]), 8)
    assert m.kept_N is None and m.unfiltered_logprobs_N is None and m.proximal_logprobs_N is None
    other = filled(make_sample("q/0", "q", (4, 5, 6), (False, False, True)))
    other = replace(other, **dict.fromkeys(SCORED))
    (m,) = pack([plain, other], count_prompts([plain, other]), 8)
    assert m.kept_N == (b"", b"", bytes([2]))
    assert m.unfiltered_logprobs_N == (plain.logprobs[1], plain.logprobs[2], 902.0)


def test_partly_scored_batches_are_programmer_errors() -> None:
    """A sample without proximal log-probs takes its neighbour's."""
    samples = [make_sample(f"p/{g}", "p", (1, 2, 3), (False, True, True)) for g in range(2)]
    samples[1] = replace(samples[1], proximal_logprobs=(0.0, -1.0, -1.0))
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
    assert m.prompt_N == (1, 1) and m.prompt_tokens == (12,) and m.prompt_samples == (4,)
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


def test_packing_a_thousand_long_samples_stays_linear() -> None:
    """Path or prefix building becomes quadratic in rows: the work is counted as rows laid out, not as time."""
    prompt = tuple(range(100))
    samples = [
        make_sample(f"{p}/{g}", str(p), prompt + (g,) * 200, (False,) * 100 + (True,) * 200)
        for p in range(20)
        for g in range(8)
    ]
    found = pack(samples, count_prompts(samples), 4096)
    assert sum(len(m.tokens_T) for m in found) == 20 * (100 + 8 * 199)
    assert sum(map(len, (path for m in found for path in m.paths_S))) == 20 * (100 + 8 * 299)


@pytest.mark.parametrize("mask", [(True, True), (False, False)])
def test_untrainable_samples_are_programmer_errors(mask: tuple[bool, ...]) -> None:
    """A sample without a prediction, or whose first token is trained, divides by zero further on."""
    sample = make_sample("p/0", "p", (1, 2), mask)
    with pytest.raises(AssertionError):
        pack([sample], (PromptTotal("p", 1, 1),), 8)


def cost_of(microbatch: Microbatch) -> float:
    """Row by row: 1, and the positions that it attends to over CONTEXT."""
    return sum(1 + (position + 1) / CONTEXT for position in microbatch.positions_T)


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


@given(batches())
@settings(max_examples=100, deadline=None)
def test_costs_are_those_of_the_rows(samples: list[Sample]) -> None:
    """A shared prompt counted once a sibling, or its siblings' rows as if they attended to their own alone."""
    rows = [_num_rows(sample) for sample in samples]
    for size, members in _units(samples, rows, 10_000):
        chosen = [samples[i] for i in members]
        (microbatch,) = pack(chosen, count_prompts(chosen), 10_000)
        assert len(microbatch.tokens_T) == size
        assert _cost(size, [rows[i] for i in members]) == pytest.approx(cost_of(microbatch))
