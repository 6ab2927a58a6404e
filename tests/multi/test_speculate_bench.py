"""`tandem bench speculate` on a tiny model."""

from __future__ import annotations

from typing import Any

import pytest

from tandem.bench import speculate as bench
from tandem.bench.work import random_requests
from tandem.cli.bench_tables import show_speculate
from tandem.engine.batch import Sequence
from tandem.engine.draft import Drafter
from tandem.engine.lengths import Lengths
from tandem.errors import WorldError
from tandem.report.speculation import speculation_png
from tandem.run import parts


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch, tmp_path: Any) -> None:
    monkeypatch.setattr(parts, "times_file", lambda decoder, config: tmp_path / "times.json")
    model = "new:width=32,layers=2,heads=4,kv_heads=2,ff_width=48,max_position=1024"
    small = {"SEQUENCES": (1, 2), "RATES": (0.9,), "SYNTHETIC": (1,), "NEW": 12, "STEPS": 3, "CONTEXT": 16, "LINES": 9}
    for name, value in ({"MODEL": model} | small).items():
        monkeypatch.setattr(bench, name, value)


def test_all_works_are_measured_and_shown(small: None, tmp_path: Any, capsys: pytest.CaptureFixture[str]) -> None:
    """A work, a drafter or a point of the table is left out, the engine's own times are not kept, or no picture."""
    found = bench.speculate(1)
    assert [(row["sequences"], row["drafts"]) for row in found["table"]] == [
        (n, d) for n in (1, 2) for d in bench.DRAFTS
    ]
    rows = [(row["work"], row["sequences"], row["drafter"]) for row in found["rows"]]
    history = [
        (work, n, by) for work, n in (("code edit", 1), ("code edit", 2), ("siblings", 1)) for by in bench.DRAFTERS
    ]
    assert rows == [*history, ("synthetic", 1, "0.9")]
    assert all(row["ratio"] > 0 and 1 <= row["tokens_a_step"] <= 9 for row in found["rows"])
    assert len(Lengths(8, tmp_path / "times.json").steps.table()) >= 2 * 4
    show_speculate(found)
    said = capsys.readouterr().out
    assert "pays at" in said and "synthetic 1" in said
    assert speculation_png(found)[:4] == b"\x89PNG"


def test_a_text_that_drafts_change_ends_the_bench(small: None) -> None:
    """Texts are not compared: a drafter that changes one has a speed."""

    class Other(Drafter):
        def draft(self, sequences: list[Sequence], most: list[int]) -> list[list[int]]:
            for sequence in sequences:
                sequence.tokens[-1] = 5
            return [[] for _ in sequences]

    built = bench._parts()
    plain, wrong = (bench._engine(built, bench.DraftConfig(by, 2, lengths="fixed")) for by in ("none", "lookup"))
    wrong.scheduler.drafting.drafter = Other()
    asked = random_requests(1, 9, plain.vocab_size, 6, bench.random.Random(0))
    with pytest.raises(WorldError, match="by lookup changed a text"):
        bench.compare("work", 1, {"none": plain, "lookup": wrong}, 1, lambda turn: asked, bench.together)
