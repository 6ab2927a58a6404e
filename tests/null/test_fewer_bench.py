"""Regression caught: a speed in fewer bits that is not the one measured beside bf16 and beside peers."""

from __future__ import annotations

import json
import sys
import types

from tandem.bench import beside as benches
from tandem.bench.peers import Figure
from tandem.cli.main import main
from tandem.plan.roofline import Machine
from tests.null.test_bench import LIMITS, Still


def test_fewer_bits_stand_beside_bf16_and_peers(monkeypatch):
    """Tandem in 8 bits measured by itself where peers are given, or a rate of other tokens, or of bf16 twice."""
    asked, built, still = [], [], Still()

    def run(side, units):
        asked.append(side.command[-1])
        peer = {"numerics/bf16": "bf16", "ls": "other"}.get(side.command[-1], "tandem")
        return [*LIMITS, Figure(peer, "w", 6.0 if peer == "tandem" else 2.0)]

    monkeypatch.setattr(benches, "run_side", run)
    peers = benches.bench("numerics", ["ls"], 2)["rows"][0]["peers"]
    assert asked == ["numerics", "numerics/bf16", "ls"] * 2
    assert {name: found["ratio"] for name, found in peers.items()} == {"bf16": 3.0, "other": 3.0}

    monkeypatch.setattr(benches, "build_engine", lambda **kinds: built.append(kinds) or still)
    monkeypatch.setattr(benches, "build_learner", lambda *_, **kinds: (built.append(kinds) or still, []))
    monkeypatch.setattr(benches, "_chats", lambda *_: [])
    monkeypatch.setattr(benches, "answer", lambda *_: (2.0, 1.0))
    monkeypatch.setattr(benches, "timed", lambda run: (run(), 4.0)[1])
    rates = {"decode 64x128": 64 * 64, "prefill 16x1024": 8 * 1024, "train 16x256": 4 * 256}
    for name, peer in (("numerics", "tandem"), ("numerics/bf16", "bf16")):
        figures = set(benches.WORKS[name][0](Machine(1.0, 1.0)))
        assert figures == {Figure(peer, work, rate) for work, rate in rates.items()}
    assert built == [{"weights": "w8a8"}, {"eights": True}, {"weights": "same"}, {"eights": False}]


def test_peers_of_fewer_bits_are_run_in_turn(monkeypatch, capsys):
    """`--peer` taken by a bench that has a table of its own, and dropped; seconds of quantising read as a rate."""
    rows = [{"work": "int4_g64, gptq", "cpu_s": 4.0}]
    own = types.SimpleNamespace(quantise=lambda rounds: {"rows": rows})
    monkeypatch.setitem(sys.modules, "tandem.bench.quantise", own)
    (figure,) = (figure for part in benches.WORKS["quantise"] for figure in part(Machine(1.0, 1.0)))
    assert figure == Figure("tandem", "int4_g64, gptq", 4.0, "s")

    def run(side, units):
        peer = {"numerics/bf16": "bf16", "ls": "gptqmodel"}.get(side.command[-1], "tandem")
        return [*LIMITS, figure] if peer == "tandem" else [Figure(peer, "int4_g64, gptq", 10.0, "s")]

    monkeypatch.setattr(benches, "run_side", run)
    for work in ("quantise", "numerics"):
        assert main(["bench", work, "--peer", "ls", "--rounds", "1", "--json"]) == 0
        (row,) = json.loads(capsys.readouterr().out)["rows"]
        assert row["peers"]["gptqmodel"] == {"s": 10.0, "ratio": 2.5} and ("bf16" in row["peers"]) == (
            work == "numerics"
        )
        assert main(["bench", work, "--peer", "ls", "--rounds", "1"]) == 0 and "gptqmodel" in capsys.readouterr().out
