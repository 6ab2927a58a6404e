"""Credit by turn, by state and by a critic, against loops that read as the papers do."""

from __future__ import annotations

import statistics

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tandem.algo.advantage import samples_from_groups
from tandem.algo.config import AlgoConfig
from tandem.algo.credit import STD_FLOOR, gae, with_gae
from tandem.types import Group, Prompt
from tests.samples import Drawn, DrawnTurn, column, drawn_programs, having, program_of, trained


def turn(sampled: int, reward: float = 0.0, state: str = "") -> DrawnTurn:
    return DrawnTurn(sampled, 2, reward, state)


REWARDS = st.sampled_from([0.0, 0.0, 0.25, 1.0, -0.5])


def group_of(programs: list[Drawn], prompt: str = "p") -> Group:
    """As rollouts flatten them: by segment, with the score as the reward of the whole."""
    return Group(Prompt(prompt, ()), tuple(t for n, drawn in enumerate(programs) for t in program_of(drawn, n, prompt)))


def paid(program: Drawn) -> list[tuple[int, float, str]]:
    """Number, reward and state of each turn that sampled a token; the rest of the score falls to the last."""
    turns = [
        (number, turn.reward, turn.state)
        for number, turn in enumerate(turn for segment in program.segments for turn in segment)
        if turn.sampled
    ]
    if turns:
        number, reward, state = turns[-1]
        turns[-1] = (number, reward + program.score - sum(reward for _, reward, _ in turns), state)
    return turns


def to_go(rewards: list[float], discount: float) -> list[float]:
    return [sum(discount**k * reward for k, reward in enumerate(rewards[t:])) for t in range(len(rewards))]


def compared(mine: float, others: list[float], name: str) -> float:
    """The estimator's word on one value among `others`, itself among them."""
    centred = mine - statistics.fmean(others)
    if name == "dr_grpo" or len(others) < 2:
        return centred if name == "dr_grpo" else 0.0
    if name == "rloo":
        return centred * len(others) / (len(others) - 1)
    return centred / (statistics.stdev(others) + STD_FLOOR)


def expected(config: AlgoConfig, programs: list[Drawn]) -> dict[tuple[int, int], float]:
    """Advantage of each (program, turn)."""
    known = [paid(program) for program in programs]
    goes = [to_go([reward for _, reward, _ in turns], config.discount) for turns in known]
    everyone = [(i, t, *known[i][t]) for i in range(len(known)) for t in range(len(known[i]))]
    found = {}
    for i, t, number, _, state in everyone:
        alike = [
            goes[j][u]
            for j, u, other, _, where in everyone
            if (other == number if config.credit == "step" else where == state)
        ]
        value = compared(goes[i][t], alike, config.advantage)
        if config.credit == "gigpo":
            whole = compared(programs[i].score, [program.score for program in programs], config.advantage)
            value = whole + (config.step_weight * value if state else 0.0)
        found[i, number] = value
    return found


@pytest.mark.parametrize("advantage", ["grpo", "dr_grpo", "rloo"])
@pytest.mark.parametrize("credit", ["step", "gigpo"])
@settings(max_examples=60, deadline=None)
@given(
    programs=st.lists(drawn_programs(), min_size=1, max_size=5),
    discount=st.sampled_from([1.0, 0.9, 0.0]),
    weight=st.sampled_from([1.0, 0.3]),
)
def test_credit_equals_loops(
    credit: str, advantage: str, programs: list[Drawn], discount: float, weight: float
) -> None:
    """A turn's credit is that of another turn, state, group or segment, or is not discounted from its own turn on."""
    changes = {"step_weight": weight} if credit == "gigpo" else {}
    config = AlgoConfig(advantage=advantage, credit=credit, discount=discount, **changes)
    wanted = expected(config, programs)
    selection = samples_from_groups(config, [group_of(programs)])
    seen = 0
    for sample in selection.samples:
        _, _, number, segment = sample.id.split("/")
        turns = [turn for part in programs[int(number)].segments[: int(segment)] for turn in part]
        mine = programs[int(number)].segments[int(segment)]
        per_token = [wanted[int(number), len(turns) + k] for k, turn in enumerate(mine) for _ in range(turn.sampled)]
        found = [column(sample, "advantages")[p] for p in trained(sample)]
        assert found == pytest.approx(per_token, rel=1e-6, abs=1e-7)
        assert not {"turns", "step_rewards", "states"} & set(sample.columns.arrays)
        seen += 1
    assert seen == sum(fate == "trained" for fate in selection.fates.values())
    for trajectory_id, fate in selection.fates.items():
        if fate == "zero_advantage":
            _, _, number, _ = trajectory_id.split("/")
            assert any(abs(value) < 1e-7 for (i, _), value in wanted.items() if i == int(number))


def test_gigpo_by_hand() -> None:
    """States of one group are compared across groups, the first turn's credit is missing, or a lone state has some.

    Two programs reach the door; one opens it (score 1), the other turns back (score 0, -0.5 for it). discount 1/2.
    Returns: opens: 0 + 1/2 = 1/2, 1. turns back: 0 + 1/2 (-1/2 + 1/2 * 1/2) = -1/8, -1/4, 1/2 (its score 0 less what
    its steps earned). Hall: 1/2 and -1/8, mean 3/16: +-5/16. Door: 1 and -1/4, mean 3/8: +-5/8. Whole: +-1/2.
    """
    opens = Drawn(([turn(2, 0.0, "hall"), turn(1, 0.0, "door")],), 1.0)
    back = Drawn(([turn(1, 0.0, "hall"), turn(1, -0.5, "door"), turn(1, 0.0, "street")],), 0.0)
    config = AlgoConfig(advantage="dr_grpo", credit="gigpo", discount=0.5, step_weight=2.0)
    elsewhere = group_of([opens, Drawn(([turn(1, 9.0, "hall")],), 9.0)], "q")
    first, second, *_ = samples_from_groups(config, [group_of([opens, back]), elsewhere]).samples
    assert [column(first, "advantages")[p] for p in trained(first)] == [0.5 + 0.625, 0.5 + 0.625, 0.5 + 1.25]
    assert [column(second, "advantages")[p] for p in trained(second)] == [-0.5 - 0.625, -0.5 - 1.25, -0.5]


def test_steps_by_hand() -> None:
    """Returns to go are summed from the program's start, or turns of other numbers are compared.

    Rewards 1, 0 and 0, 1 (scores 1): returns 1, 0 and 1, 1. First turns are equal; second ones 0 and 1, +-1/2.
    """
    early, late = (Drawn(([turn(1, a), turn(1, b)],), 1.0) for a, b in ((1.0, 0.0), (0.0, 1.0)))
    config = AlgoConfig(advantage="dr_grpo", credit="step")
    samples = samples_from_groups(config, [group_of([early, late])]).samples
    assert [[column(s, "advantages")[p] for p in trained(s)] for s in samples] == [[0.0, -0.5], [0.0, 0.5]]


def test_a_program_of_one_turn_has_no_columns_of_turns() -> None:
    """Runs of one turn carry columns that nobody reads: 20 bytes a token."""
    (plain,) = program_of(Drawn(([turn(3)],), 1.0), 0, "p")
    assert set(plain.columns.arrays) == {"tokens", "loss_mask", "logprobs", "versions"}
    (paid_one,) = program_of(Drawn(([turn(3, 0.5, "here")],), 1.0), 0, "p")
    assert [column(paid_one, "step_rewards")[p] for p in trained(paid_one)] == [0.0, 0.0, 0.5]
    assert [column(paid_one, "states")[p] for p in trained(paid_one)] == ["", "", "here"]
    first, second = program_of(Drawn(([turn(1)], [turn(2), turn(1)]), 1.0), 0, "p")
    assert "turns" not in first.columns and [column(second, "turns")[p] for p in trained(second)] == [1, 1, 2]


@given(
    rewards=st.lists(st.tuples(REWARDS, st.floats(-2, 2)), min_size=1, max_size=8),
    discount=st.sampled_from([1.0, 0.9, 0.5]),
    decay=st.sampled_from([1.0, 0.95, 0.0]),
)
def test_gae_equals_the_sum_of_its_paper(rewards: list[tuple[float, float]], discount: float, decay: float) -> None:
    """The recursion drops a term, or bootstraps from a value behind the end."""
    values = [value for _, value in rewards]
    delta = [
        r + discount * (values[t + 1] if t + 1 < len(values) else 0.0) - values[t] for t, (r, _) in enumerate(rewards)
    ]
    wanted = [sum((discount * decay) ** k * d for k, d in enumerate(delta[t:])) for t in range(len(delta))]
    assert gae([r for r, _ in rewards], values, discount, decay) == pytest.approx(wanted)


@pytest.mark.parametrize("step", ["token", "turn"])
@settings(max_examples=60, deadline=None)
@given(draws=st.data(), programs=st.lists(drawn_programs(), min_size=1, max_size=4))
def test_advantages_of_a_critic(step: str, draws: st.DataObject, programs: list[Drawn]) -> None:
    """Segments of a program are cut apart, a turn's value is read behind its first token, or samples are counted."""
    config = AlgoConfig(advantage="gae", gae_step=step, discount=0.9, gae_lambda=0.8)
    groups = [group_of(programs), group_of(programs[:1], "q")]
    selection = samples_from_groups(config, groups)
    values = st.floats(-1, 1).map(lambda x: round(x, 3))
    samples = [
        having(s, values=draws.draw(st.lists(values, min_size=len(s.columns), max_size=len(s.columns))))
        for s in selection.samples
    ]
    order = draws.draw(st.permutations(range(len(samples))))
    found = {s.id: s for s in with_gae(config, [samples[i] for i in order])} if samples else {}
    advantages: dict[str, list[float]] = {}
    for n, (prompt, program) in enumerate([*(("p", program) for program in programs), ("q", programs[0])]):
        name = f"{prompt}/0/{n if prompt == 'p' else 0}"
        mine = sorted(
            (s for s in samples if s.id.rpartition("/")[0] == name), key=lambda s: int(s.id.rpartition("/")[2])
        )
        known = [column(s, "values")[p] for s in mine for p in trained(s)]
        counts = [turn.sampled for part in program.segments for turn in part if turn.sampled]
        rewards = [reward for _, reward, _ in paid(program)]
        if step == "turn":
            starts = [sum(counts[:k]) for k in range(len(counts))]
            by_turn = gae(rewards, [known[start] for start in starts], 0.9, 0.8)
            raw = [a for a, count in zip(by_turn, counts, strict=True) for _ in range(count)]
            goals = [
                a + known[start] for a, start, count in zip(by_turn, starts, counts, strict=True) for _ in range(count)
            ]
        else:
            spread = [r for reward, count in zip(rewards, counts, strict=True) for r in [*[0.0] * (count - 1), reward]]
            raw = gae(spread, known, 0.9, 0.8)
            goals = [a + v for a, v in zip(raw, known, strict=True)]
        for s in mine:
            advantages[s.id], raw = raw[: len(trained(s))], raw[len(trained(s)) :]
            assert [column(found[s.id], "returns")[p] for p in trained(s)] == pytest.approx(goals[: len(trained(s))])
            goals = goals[len(trained(s)) :]
    everything = [a for part in advantages.values() for a in part]
    for name, part in advantages.items():
        mean, std = statistics.fmean(everything), statistics.pstdev(everything)
        sample = found[name]
        wanted = [(a - mean) / (std + STD_FLOOR) for a in part]
        assert [column(sample, "advantages")[p] for p in trained(sample)] == pytest.approx(wanted, rel=1e-5, abs=1e-6)


def test_a_critic_by_hand() -> None:
    """Values 1/2 and 1/4 before two tokens, score 1, discount 1, lambda 1/2: deltas -1/4, 3/4; A = 1/8, 3/4."""
    (trajectory,) = program_of(Drawn(([turn(2)],), 1.0), 0, "p")
    config = AlgoConfig(advantage="gae", gae_lambda=0.5)
    (sample,) = samples_from_groups(config, [Group(Prompt("p", ()), (trajectory,))]).samples
    first, second = trained(sample)
    values = [{first: 0.5, second: 0.25}.get(p, 9.0) for p in range(len(sample.columns))]
    (found,) = with_gae(config, [having(sample, values=values)])
    assert [column(found, "returns")[p] for p in (first, second)] == [0.625, 1.0]
    half = 0.3125 / (0.3125 + STD_FLOOR)  # 1/8 and 3/4: mean 7/16, deviation 5/16
    assert [column(found, "advantages")[p] for p in (first, second)] == pytest.approx([-half, half])
