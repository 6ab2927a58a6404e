"""Regression caught: a speed table whose ratios are not those of the measurements beside each other."""

from __future__ import annotations

import json
import sys

import pytest

from tandem.errors import WorldError
from tandem.run import bench as benches
from tandem.run.bench import Figure, _run, compare, limit


def peer(*rows: dict, code: int = 0) -> list[str]:
    text = "\n".join(json.dumps(row) for row in rows)
    return [sys.executable, "-c", f"print('loading'); print({text!r}); raise SystemExit({code})"]


def test_ratio_is_taken_within_a_round():
    """A ratio of medians instead of the median ratio: a machine that slows down between rounds changes the verdict."""
    rounds = [
        [Figure("tandem", "decode 64x128", ours, None), Figure("vllm", "decode 64x128", theirs, None)]
        for ours, theirs in ((100.0, 50.0), (10.0, 20.0), (90.0, 30.0))
    ]
    row = compare(rounds)[0]
    assert row["tandem"] == 90.0
    assert row["peers"]["vllm"] == {"tok/s": 30.0, "ratio": 2.0}
    assert row["share_of_limit"] is None


def test_times_compare_upside_down():
    """A time read as a rate: the slower side wins."""
    row = compare([[Figure("tandem", "step", None, 2.0), Figure("trl", "step", None, 10.0)]])[0]
    assert row["unit"] == "s" and row["peers"]["trl"]["ratio"] == pytest.approx(5.0)


def test_a_rate_counts_at_its_best_and_a_step_at_its_median():
    """One slow first step, or one lucky fast one, stands for all."""
    figures = [Figure("tandem", "train", x, None) for x in (1.0, 9.0, 8.0)]
    figures += [Figure("tandem", "step", None, x) for x in (30.0, 4.0, 5.0)]
    train, step = compare([figures])
    assert train["tandem"] == 9.0 and step["tandem"] == 5.0


def test_price_is_exact_time_over_library_time():
    """A price upside down, or one put beside a peer that is another system."""
    rounds = [
        [
            Figure("tandem", "decode 64x128", exact, None),
            Figure("tandem", "grpo step", None, 3.3),
            Figure("library", "decode 64x128", fast, None),
            Figure("library", "grpo step", None, 3.0),
            Figure("hf", "grpo step", None, 9.0),
        ]
        for exact, fast in ((100.0, 125.0), (50.0, 60.0), (90.0, 99.0))
    ]
    decode, step = compare(rounds)
    assert decode["price"] == pytest.approx(1.2) and step["price"] == pytest.approx(1.1)
    assert "price" not in compare([[Figure("tandem", "w", 1.0, None), Figure("hf", "w", 2.0, None)]])[0]


def test_parity_takes_exact_and_library_in_turn(monkeypatch):
    """One side measured in all its rounds before the other, while the machine warms up or slows down."""
    asked = []

    def run(command):
        asked.append(command[-1])
        peer = {"parity/library": "library", "other": "other"}.get(command[-1], "tandem")
        return [Figure(peer, "w", float(len(asked)), None)]

    monkeypatch.setattr(benches, "_run", run)
    result = benches.bench("parity", ["other"], 2)
    assert asked == ["parity", "parity/library", "other"] * 2
    assert result["rows"][0]["price"] == pytest.approx(2 / (1 / 2 + 4 / 5))
    asked.clear()
    benches.bench("engine", [], 1)
    assert asked == ["engine"]


def test_both_sides_of_parity_do_the_same_work(monkeypatch):
    """A price of other prompts, or of the exact kernels twice; the start is no work of either."""
    kernels = []

    def engine(decodes, chosen):
        kernels.append(chosen)
        return [Figure("tandem", "start", None, 1.0), *(Figure("tandem", f"decode {n}", 1.0, None) for n, _ in decodes)]

    monkeypatch.setattr(benches, "_engine", engine)
    monkeypatch.setattr(benches, "_demo", lambda chosen: kernels.append(chosen))
    monkeypatch.setattr(benches, "_steps", lambda _, work: [Figure("tandem", work, None, 2.0)])
    exact, fast = list(benches.WORKS["parity"]()), list(benches.WORKS["parity/library"]())
    assert kernels == ["exact", "exact", "library", "library"]
    assert [f.work for f in exact] == [f.work for f in fast] == ["decode 64", "decode 1", "grpo step 16x8x24"]
    assert {f.peer for f in exact} == {"tandem"} and {f.peer for f in fast} == {"library"}


def test_limit_is_the_roofline_by_hand():
    """A share of the limit above what the machine can do."""
    flop, parameters = 269e6, 134.5e6
    assert limit("decode 1x128", 1e12, 25e9) == pytest.approx(25e9 / (2 * parameters))  # reads the weights
    assert limit("decode 64x128", 1e12, 1e15) == pytest.approx(1e12 / flop)  # multiplies
    assert limit("train 16x256", 3 * flop * 100, 1.0) == pytest.approx(100.0)
    assert limit("start", 1.0, 1.0) is None


def test_limits_come_from_the_machine():
    """The limit of one run beside the speed of another."""
    figures = [
        Figure("limit", "matrix FLOP/s", 3 * 269e6 * 100, None),
        Figure("limit", "memory bytes/s", 1.0, None),
        Figure("tandem", "train 16x256", 50.0, None),
    ]
    assert compare([figures])[0]["share_of_limit"] == pytest.approx(0.5)


def test_a_peer_is_any_command_that_prints_json_lines():
    """Progress bars on standard output break the table."""
    rows = {"peer": "vllm", "work": "decode 1x128", "tok_s": 36.0}, {"peer": "vllm", "work": "start", "s": 55}
    assert _run(peer(*rows)) == [Figure("vllm", "decode 1x128", 36.0, None), Figure("vllm", "start", None, 55)]


@pytest.mark.parametrize("command", [peer({"peer": "x", "work": "w", "s": 1.0}, code=3), peer(), ["no-such-program"]])
def test_a_peer_that_fails_stops_the_bench(command):
    """A crashed peer is left out, and tandem has no rival."""
    with pytest.raises(WorldError, match="the peer"):
        _run(command)
