"""Recorded programs simulated: traces as files have them, the makespan that was measured, the policies side by side."""

from __future__ import annotations

import json
import random
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from tandem.cli.main import main
from tandem.engine.config import EngineConfig, ProgramsConfig
from tandem.engine.costs import Rows, StepCost
from tandem.engine.record import read, repeated
from tandem.errors import ConfigError
from tandem.sim.gates import interval, judge, pinball
from tandem.sim.programs import Replay, compare
from tandem.sim.traces import Recorded, Timed, Turn, fit_requests, ideal_hits, load

DATA = Path(__file__).parents[3] / "shared" / "data"
PROFILE = DATA / "sweagent_glm45_profile" / "stage_timings.bs4.jsonl"
COST = StepCost(base_s=5e-3, prefill_token_s=2.5e-4, context_token_s=1e-8, decode_token_s=1.5e-3)
POLICIES = ("off", "fcfs", "plas", "ttl", "continuum", "thunder", "oracle")


def programs(count: int = 24, seed: int = 0, tools: tuple[str, ...] = ("fast", "slow")) -> list[Recorded]:
    """Contexts that grow to some thousand tokens; tools of two kinds, one in a hundred times as long."""
    rng, found = random.Random(seed), []
    for number in range(count):
        context, turns = 300, []
        for _ in range(rng.randint(4, 9)):
            output, tool = rng.randint(20, 90), rng.choice(tools)
            tool_s = rng.lognormvariate(-3.0 if tool == "fast" else -0.5, 0.8)
            turns.append(Turn(context, output, tool_s, tool))
            context += output + rng.randint(30, 300)
        found.append(Recorded(f"p{number}", tuple(turns)))
    return found


def config(**more: object) -> EngineConfig:
    followed = ProgramsConfig(half_life_s=1.0, tick_s=0.25, **more)  # type: ignore[arg-type]
    return EngineConfig(page_tokens=16, batch_tokens=2048, max_sequences=64, programs=followed)


def test_programs_aware_of_memory_end_sooner_where_it_is_short_and_as_soon_where_it_is_not() -> None:
    """Policies that cost time where there is memory for all, or bring none where there is not."""
    made, dear = programs(), replace(COST, prefill_token_s=1e-3)
    short = {one.policy: one for one in compare(made, POLICIES, config(), 300, dear, 12)}
    ample = {one.policy: one for one in compare(made, POLICIES, config(), 4000, dear, 12)}
    for policy in ("ttl", "continuum", "thunder", "oracle"):
        assert short[policy].turns_min > 1.25 * short["off"].turns_min, policy
        assert short[policy].found > 2 * short["off"].found
    for policy in POLICIES:
        assert ample[policy].turns_min >= 0.98 * ample["off"].turns_min, policy
        assert ample[policy].turns == short[policy].turns == sum(len(one.turns) for one in made)


def test_a_replay_is_the_same_each_time() -> None:
    """A clock, a hash seed or an order of a set in a decision."""
    made = programs(10)
    assert compare(made, POLICIES, config(), 300, COST, 6) == compare(made, POLICIES, config(), 300, COST, 6)


def test_one_program_alone_takes_what_its_steps_cost() -> None:
    """Time that nobody spends, tools that run twice or not at all, a prompt that is run again though it is there."""
    turns = (Turn(40, 3, 2.0), Turn(60, 2, 1.5), Turn(30, 1, 9.0))  # the third forgets all but the first prompt
    found = Replay([Recorded("a", turns, setup_s=4.0)], config(), 50, COST).run()
    steps = [
        *(Rows(40, 40 * 41 // 2, 0), Rows(0, 41, 1), Rows(0, 42, 1)),  # 42 of 43 tokens were run
        *(Rows(60 - 42, sum(range(43, 61)), 0), Rows(0, 61, 1)),
        Rows(0, 30, 1),
    ]
    wanted = 4.0 + sum(COST.of(rows) for rows in steps) + 2.0 + 1.5
    assert found.turns == 3 and found.run_tokens == 42 + 19 + 14
    assert found.makespan_s == pytest.approx(wanted, rel=0.02)


def test_the_cost_of_a_step_is_found_again_from_requests() -> None:
    """Coefficients of a profile that are not those by which it was made."""
    rng = np.random.default_rng(0)
    cost, waits, requests, ends = StepCost(0.02, 3e-4, 2e-9, 1e-3), 0.5, [], 0.0
    for _ in range(60):
        prompt, output = int(rng.integers(500, 9000)), int(rng.integers(5, 300))
        cached = int(rng.integers(0, prompt))
        prefill = cost.of(Rows(prompt - cached, sum(range(cached + 1, prompt + 1)), 0))
        decode = output * (cost.base_s + cost.decode_token_s + cost.context_token_s * (prompt + output / 2)) + waits
        requests.append(Timed(ends, prefill, decode, prompt, cached, output))
        ends += decode + 10.0
    found, apart = fit_requests(requests)  # one at a time: what a step costs, and its row, are one number
    assert found.base_s + found.decode_token_s == pytest.approx(0.021, rel=1e-6)
    assert found.prefill_token_s == pytest.approx(3e-4, rel=1e-6)
    assert found.context_token_s == pytest.approx(2e-9, rel=1e-4)
    assert apart + (found.base_s - cost.base_s) == pytest.approx(0.5, abs=0.02)


@pytest.mark.skipif(not PROFILE.exists(), reason="needs the SWE-agent profile in ../shared")
def test_the_profiles_makespan_is_predicted_from_its_own_step_times() -> None:
    """A simulated engine that is faster or slower than the real one whose steps it was told."""
    trace = load(PROFILE)
    assert (len(trace.programs), trace.at_once, sum(len(one.turns) for one in trace.programs)) == (64, 4, 2832)
    assert trace.makespan_s == pytest.approx(7080.02, abs=0.01) and trace.cost is not None
    engine = EngineConfig(page_tokens=256, batch_tokens=8192, max_sequences=64)
    (found,) = compare(trace.programs, ["off"], engine, 20_000, trace.cost, trace.at_once)
    assert found.makespan_s == pytest.approx(trace.makespan_s, rel=0.05)


@pytest.mark.skipif(not DATA.exists(), reason="needs Mooncake's trace in ../shared")
def test_mooncakes_ideal_hits(capsys: pytest.CaptureFixture[str]) -> None:
    """A block counted that follows one which is not there, or a last block counted as if it were full."""
    path = DATA / "mooncake" / "conversation_trace.jsonl"
    assert ideal_hits(path) == (54_098_411, 144_793_823)
    assert main(["simulate", str(path)]) == 0 and "37.4%" in capsys.readouterr().out


def test_ideal_hits_by_hand(tmp_path: Path) -> None:
    """The same, by hand."""
    rows = [(700, [1, 2]), (1100, [1, 2, 3]), (600, [4, 2]), (512, [1])]
    path = tmp_path / "trace.jsonl"
    path.write_text("".join(json.dumps({"input_length": n, "hash_ids": ids}) + "\n" for n, ids in rows))
    assert ideal_hits(path) == (1024 + 512, 2912)


@pytest.mark.skipif(not DATA.exists(), reason="needs TraceLab's examples in ../shared")
def test_tracelabs_example() -> None:
    """Milliseconds read as seconds, or rounds of one session as programs."""
    trace = load(DATA / "tracelab_examples" / "multi_session_large.csv")
    assert len(trace.programs) == 48 and sum(len(one.turns) for one in trace.programs) == 303
    assert trace.programs[0].start_s == 0.117 and trace.programs[0].turns[0] == Turn(2318, 200, 0.3, "", 0)


def recorded(tmp_path: Path, **more: object) -> Path:
    path = tmp_path / "record.jsonl"
    settings = config(record=str(path), **more)
    replay = Replay(programs(40, seed=3), settings, 500, COST, 12)
    replay.run()
    del replay  # which writes what is left
    return path


@pytest.mark.parametrize("mode", ["shadow", "enforce"])
@pytest.mark.parametrize("policy", ["continuum", "thunder", "oracle"])
def test_decisions_come_out_again(tmp_path: Path, policy: str, mode: str) -> None:
    """A decision that rests on something which its record does not hold."""
    count, other = repeated(read(recorded(tmp_path, policy=policy, mode=mode)))
    assert count > 100 and not other


def test_another_decision_is_noticed(tmp_path: Path) -> None:
    """A check of a record that says the same of anything."""
    lines = list(read(recorded(tmp_path, policy="thunder", mode="enforce")))
    balances = [line for line in lines if line["at"] == "balance" and line["answer"]["restore"]]
    kept = [line for line in lines if line["at"] == "keep"]
    balances[0]["answer"]["restore"] = []
    kept[0]["answer"]["keep_s"] = 1.0
    assert repeated(iter(lines))[1] == sorted((balances[0], kept[0]), key=lines.index)


def test_a_record_is_a_trace_of_its_programs(tmp_path: Path) -> None:
    """Turns lost on the way through a record, a tool's time put to the wrong turn."""
    path, made = recorded(tmp_path, policy="thunder", mode="enforce"), programs(40, seed=3)
    trace = load(path)
    assert len(trace.programs) == 40 and trace.cost is not None
    found = {one.name: one.turns for one in trace.programs}
    for one in made:
        for wanted, turn in zip(one.turns, found[one.name], strict=True):
            assert (turn.prompt, turn.output, turn.tool) == wanted[:2] + wanted[3:4]
        times = [turn.tool_s for turn in found[one.name][:-1]]
        wanted_s = [turn.tool_s for turn in one.turns[:-1]]
        assert all(-1e-5 < time_s - tool_s < 0.6 for time_s, tool_s in zip(times, wanted_s, strict=True))


def test_gates_open_for_what_names_tell_and_stay_shut_for_what_they_do_not(tmp_path: Path) -> None:
    """A gate that any predictor passes, one that none does, or one that a program's own turns have taught."""
    path = recorded(tmp_path, policy="continuum", mode="shadow")
    gates = {gate.what: gate for gate in judge(read(path))}
    tool = gates["tool_s: pinball loss"]
    assert tool.passed and tool.value < 0.8 * tool.limit
    assert gates["tool_s: calibration"].passed and any("oracle" in gate.more for gate in gates.values())
    lines, rng = list(read(path)), random.Random(1)
    for line in lines:
        if line["at"] == "turn":
            line["tool"] = rng.choice(("one", "other"))
    tool = next(gate for gate in judge(lines) if gate.what == "tool_s: pinball loss")
    assert tool.value > 0.97 * tool.limit


def test_pinball_and_interval_by_hand() -> None:
    """Weights of the two sides swapped; an interval that holds the mean of something else."""
    assert pinball(10.0, 7.0, 0.9) == pytest.approx(2.7) and pinball(7.0, 10.0, 0.9) == pytest.approx(0.3)
    low, high = interval([-1.0] * 30 + [-3.0] * 30)
    assert -2.4 < low < -2.0 < high < -1.6


def test_simulate_says_what_is_wrong(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A stack trace for a file that is no trace, a pool that no program fits in, a policy that nobody knows."""
    path = tmp_path / "x.jsonl"
    path.write_text('{"a": 1}\n')
    with pytest.raises(ConfigError, match="'a'. Known are"):
        load(path)
    assert main(["simulate", str(path)]) == 2
    record = recorded(tmp_path, policy="ttl", mode="enforce")
    assert main(["simulate", str(record), "--kv-tokens", "100"]) == 2
    assert main(["simulate", str(record), "--policy", "best"]) == 2
    said = capsys.readouterr().err
    assert "--kv-tokens 100" in said and "--policy best" in said
    assert main(["simulate", str(record), "--policy", "off", "--at-once", "4", "--json"]) == 0
    (row,) = json.loads(capsys.readouterr().out)["rows"]
    assert row["policy"] == "off" and row["turns"] == sum(len(one.turns) for one in programs(40, seed=3))
    assert main(["simulate", str(record), "--gates"]) in (0, 1)
    assert "asked again: all the same" in capsys.readouterr().out


def test_a_torn_last_line_is_left_out_and_another_schema_refused(tmp_path: Path) -> None:
    """A record that nobody can read since its engine was killed, or one of another schema taken for this one's."""
    path = recorded(tmp_path, policy="ttl", mode="enforce")
    lines = path.read_bytes().splitlines(keepends=True)
    path.write_bytes(b"".join(lines[:20]) + lines[20][:10])
    assert len(list(read(path))) == 20
    path.write_bytes(lines[0].replace(b'"schema":1', b'"schema":9') + lines[1])
    with pytest.raises(ConfigError, match="schema=9"):
        list(read(path))
