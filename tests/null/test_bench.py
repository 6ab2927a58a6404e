"""Regression caught: a speed table whose ratios are not those of the measurements beside each other."""

from __future__ import annotations

import json
import sys
import time
import types
from collections import Counter

import pytest

from tandem.bench import beside as benches
from tandem.bench import numerics as numerics_bench
from tandem.bench import programs as programs_bench
from tandem.bench import sft as sft_bench
from tandem.bench.beside import compare
from tandem.bench.peers import Figure, Side, beside_limit, peer_side, read_figure, run_side
from tandem.cli.main import main
from tandem.errors import ConfigError, WorldError
from tandem.plan.roofline import Machine
from tandem.report.throughput import throughput_figure, throughput_png
from tests.null import paged_memory


def saying(text: str, code: int = 0) -> Side:
    return Side((sys.executable, "-c", f"print('loading'); print({text!r}); raise SystemExit({code})"))


def peer(*rows: dict, code: int = 0) -> Side:
    return saying("\n".join(json.dumps(row) for row in rows), code)


LIMITS = (Figure("limit", "matrix FLOP/s", 1e12), Figure("limit", "memory bytes/s", 25e9))


def test_ratio_is_taken_within_a_round():
    """A ratio of medians instead of the median ratio: a machine that slows down between rounds changes the verdict."""
    rounds = [
        [Figure("tandem", "decode 64x128", ours), Figure("vllm", "decode 64x128", theirs)]
        for ours, theirs in ((100.0, 50.0), (10.0, 20.0), (90.0, 30.0))
    ]
    row = compare(rounds)[0]
    assert row["tandem"] == 90.0
    assert row["peers"]["vllm"] == {"tok/s": 30.0, "ratio": 2.0}
    assert row["share_of_limit"] is None


def test_fewer_bits_are_compared_within_a_turn():
    """A ratio of medians, the wrong way round, or one of the turn in which memory is touched first."""
    seconds = iter([9.0, 1.0, 2.0, 1.0, 3.0, 1.0, 8.0, 2.0])
    asked = []
    turns = numerics_bench.take_turns(["bf16", "w8a8"], 3, lambda kind: asked.append(kind) or next(seconds))
    row = numerics_bench.row_of("decode", turns, 1.5)
    assert asked == ["bf16", "w8a8"] * 4
    assert row["seconds"] == {"bf16": 3.0, "w8a8": 1.0} and row["ratio"] == {"w8a8": 3.0}


def test_times_compare_upside_down():
    """A time read as a rate: the slower side wins."""
    row = compare([[Figure("tandem", "step", 2.0, "s"), Figure("trl", "step", 10.0, "s")]])[0]
    assert row["unit"] == "s" and row["peers"]["trl"]["ratio"] == pytest.approx(5.0)


def test_a_rate_counts_at_its_best_and_a_step_at_its_median():
    """One slow first step, or one lucky fast one, stands for all."""
    figures = [Figure("tandem", "train", x) for x in (1.0, 9.0, 8.0)]
    figures += [Figure("tandem", "step", x, "s") for x in (30.0, 4.0, 5.0)]
    train, step = compare([figures])
    assert train["tandem"] == 9.0 and step["tandem"] == 5.0


def test_less_memory_is_better():
    """A peak of memory read as a rate: who holds more wins."""
    row = compare([[Figure("tandem", "sft memory", 3.0, "GB"), Figure("trl", "sft memory", 12.0, "GB")]])[0]
    assert row["unit"] == "GB" and row["peers"]["trl"] == {"GB": 12.0, "ratio": 4.0}
    assert read_figure('{"work": "sft memory", "gb": 10.8}', {"sft memory": "GB"}) == Figure(
        "peer", "sft memory", 10.8, "GB"
    )


def test_chats_of_the_bench_are_as_long_as_they_say():
    """A rate of chats of other lengths than the peer's, or other chats in each round."""
    rows = list(sft_bench.chats(30))
    assert rows == list(sft_bench.chats(30))
    lengths = [tuple(len(message["content"]) for message in row["messages"]) for row in rows[:15]]
    for (asked, answered), wanted in zip(lengths, sft_bench.CHARACTERS, strict=True):
        assert abs(asked - wanted[0]) <= 2 and abs(answered - wanted[1]) <= 2


def test_price_is_exact_time_over_library_time():
    """A price upside down, or one put beside a peer that is another system."""
    rounds = [
        [
            Figure("tandem", "decode 64x128", exact),
            Figure("tandem", "grpo step", 3.3, "s"),
            Figure("library", "decode 64x128", fast),
            Figure("library", "grpo step", 3.0, "s"),
            Figure("hf", "grpo step", 9.0, "s"),
        ]
        for exact, fast in ((100.0, 125.0), (50.0, 60.0), (90.0, 99.0))
    ]
    decode, step = compare(rounds)
    assert decode["price"] == pytest.approx(1.2) and step["price"] == pytest.approx(1.1)
    assert "price" not in compare([[Figure("tandem", "w", 1.0), Figure("hf", "w", 2.0)]])[0]


def test_parity_takes_exact_and_library_in_turn(monkeypatch):
    """One side measured in all its rounds before the other, while the machine warms up or slows down."""
    asked = []

    def run(side, units):
        asked.append(side.command[-1])
        peer = {"parity/library": "library", "ls": "other"}.get(side.command[-1], "tandem")
        return [*LIMITS, Figure(peer, "w", float(len(asked)))] if side.own else [Figure(peer, "w", float(len(asked)))]

    monkeypatch.setattr(benches, "run_side", run)
    result = benches.bench("parity", ["ls"], 2)
    assert asked == ["parity", "parity/library", "ls"] * 2
    assert result["rows"][0]["price"] == pytest.approx(2 / (1 / 2 + 4 / 5))
    asked.clear()
    benches.bench("engine", [], 1)
    assert asked == ["engine"]


def test_both_sides_of_parity_do_the_same_work(monkeypatch):
    """A price of other prompts, or of the exact kernels twice; the start is no work of either."""
    kernels, demos = [], []

    def engine(machine, decodes, chosen):
        kernels.append(chosen)
        yield Figure("tandem", "start", 1.0, "s")
        for n, _ in decodes:
            yield from beside_limit(f"decode {n}", 0.5, [1.0], 1)

    def run(work, new, *, kernels: str, **_):
        demos.append(kernels)
        return [Figure("tandem", work, 2.0, "s")]

    monkeypatch.setattr(benches, "_engine", engine)
    monkeypatch.setattr(benches, "_run", run)
    machine = Machine(1.0, 1.0)
    exact, fast = (list(benches.WORKS[name][0](machine)) for name in ("parity", "parity/library"))
    assert kernels == demos == ["exact", "library"]
    works = ["decode 64"] * 2 + ["decode 1"] * 2 + ["grpo step 16x8x24"]
    assert [f.work for f in exact] == [f.work for f in fast] == works
    assert {f.peer for f in exact} == {"limit", "tandem"} and {f.peer for f in fast} == {"limit", "library"}


# SmolLM2: elements of the layers and the head, bytes of keys and values of a token, flop of a query and a key.
BODY, HEAD, KV, MET = 106_168_320, 49152 * 576, 23_040, 69_120
FILL, LAST = BODY * 29 / 30 + 576 * 384, BODY / 30 - 576 * 384  # what each token of a prompt needs; only the last one


GROUPS = 8 * (512 * (2 * FILL + 513 / 2 * MET * 29 / 30 + MET / 30) + 2 * (LAST + HEAD))
LIMITED = {  # work: flop, bytes, tokens; a group's prompt is read once, whatever its samples, and its limit is a time
    "decode 1x128": (2 * (BODY + HEAD) + 112 * MET, 2 * (BODY + HEAD) + 112 * KV, 1),
    "decode 64x128": (64 * (2 * (BODY + HEAD) + 112 * MET), 2 * (BODY + HEAD) + 64 * 112 * KV, 64),
    "decode step 256": (256 * (2 * (BODY + HEAD) + 80 * MET), 2 * (BODY + HEAD) + 256 * 80 * KV, 256),
    "decode 1x128 q4": (2 * (BODY + HEAD) + 112 * MET, BODY * 5 / 8 + HEAD * 17 / 16 + 112 * KV, 1),
    "prefill 16x1024": (
        16 * (1024 * (2 * FILL + 1025 / 2 * MET * 29 / 30 + MET / 30) + 2 * (LAST + HEAD)),
        2 * (BODY + HEAD) + 16 * 1024 * KV,
        16 * 1024,
    ),
    "train 16x256": (
        3 * 16 * (512 * (BODY + HEAD) + 256 * 257 / 2 * MET),
        (BODY + HEAD) * (4 + 8 + 24 + 2),
        16 * 256,
    ),
    "groups 8x512x16x32": (
        GROUPS + 31 * 128 * (2 * (BODY + HEAD) + 529 * MET),
        2 * (BODY + HEAD) + 8 * 512 * KV + 31 * (2 * (BODY + HEAD) + 8 * 512 * KV + 128 * 17 * KV),
        None,
    ),
}


class Still:
    """An engine and a learner that do nothing; `batches`: what the engine was given."""

    def __init__(self) -> None:
        self.engine, self.batches = self, []

    def generate(self, requests):
        self.batches.append(requests)

    def step(self, *_):
        pass


def still_figures(monkeypatch, machine) -> tuple[list[Figure], Still]:
    """What `engine` and `learner` give where every answer takes 1 s, and every step 1/8 s."""
    still = Still()
    monkeypatch.setitem(sys.modules, "tandem.run.parts", types.ModuleType("tandem.run.parts"))
    monkeypatch.setattr(benches, "build_engine", lambda *_, **__: still)
    monkeypatch.setattr(benches, "build_learner", lambda *_: (still, []))
    monkeypatch.setattr(benches, "_chats", lambda parts, count, new, attempt: [count] * count)
    monkeypatch.setattr(benches, "answer", lambda *_: (1.0, 0.125))
    monkeypatch.setattr(benches, "timed", lambda run: (run(), 1.0)[1])
    parts = (*benches.WORKS["engine"], *benches.WORKS["learner"])
    return [figure for part in parts for figure in part(machine)], still


@pytest.mark.parametrize(("flop_s", "bytes_s", "side"), [(1e12, 1e18, 0), (1e18, 25e9, 1)])
def test_limit_is_the_roofline_by_hand(monkeypatch, flop_s, bytes_s, side):
    """A share of the limit above what the machine can do: without the output head, the keys and values, a shape that is
    not the one that ran, or a group's prompt read once a sample."""
    figures, _ = still_figures(monkeypatch, Machine(flop_s, bytes_s))
    limits = {f.work: f for f in figures if f.peer == "limit"}
    assert set(LIMITED) < set(limits) == {f.work for f in figures} - {"start"}
    for work, row in LIMITED.items():
        least_s, tokens = row[side] / (flop_s, bytes_s)[side], row[2]
        assert limits[work].value == pytest.approx(tokens / least_s if tokens else least_s), work
        assert limits[work].unit == ("tok/s" if tokens else "s")


def test_figures_are_of_the_work_that_their_name_says(monkeypatch):
    """A rate of other tokens than ran, or groups whose samples share no prompt, or share their noise."""
    figures, still = still_figures(monkeypatch, Machine(1.0, 1.0))
    ours = {f.work: f.value for f in figures if f.peer == "tandem"}
    assert (ours["decode 64x128"], ours["decode step 64"], ours["train 16x256"]) == (64 * 128, 64 * 8, 16 * 256)
    assert (ours["prefill 16x1024"], ours["groups 8x512x16x32"]) == (16 * 1024, 1.0)
    groups = still.batches[-2]  # behind it the codes' warm-up
    assert [len(request.tokens) for request in groups] == [512] * 8 * 16
    assert {request.sampling.max_new_tokens for request in groups} == {32}
    assert Counter(Counter(request.tokens for request in groups).values()) == {16: 8}
    assert len({request.seed for request in groups}) == len({request.id for request in groups}) == 8 * 16


def test_share_of_a_time_is_the_limit_over_it():
    """Twice the least time read as 200 % of the limit."""
    (row,) = compare([list(beside_limit("groups 8x512x16x32", 1.5, [3.0]))])
    assert (row["share_of_limit"], row["unit"], row["tandem"]) == (0.5, "s", 3.0)
    (row,) = compare([list(beside_limit("train 16x256", 1.5, [3.0, 6.0], 4096))])
    assert (row["share_of_limit"], row["unit"], row["tandem"]) == (0.5, "tok/s", 4096 / 3)


def test_a_large_batch_stands_beside_the_rate_of_a_smaller_one():
    """A ratio of medians over rounds in which the machine slowed down, or one where the other work was not run."""
    rounds = [
        [Figure("tandem", "decode 64x128", small), Figure("tandem", "decode 256x64", large)]
        for small, large in ((100.0, 130.0), (50.0, 60.0), (90.0, 126.0))
    ]
    small, large = compare(rounds)
    assert "own" not in small and large["own"] == {"work": "decode 64x128", "ratio": pytest.approx(1.3)}
    assert "own" not in compare([[Figure("tandem", "decode 256x64", 1.0)]])[0]


def sweep_rows() -> list[dict]:
    places = [("sequences", n, 128) for n in (1, 16, 256)] + [("context", 16, c) for c in (128, 1024, 8160)]
    return [
        {"axis": axis, "sequences": n, "context": c, "tok_s": 40.0 * n, "limit_tok_s": 80.0 * n, "share_of_limit": 0.5}
        for axis, n, c in places
    ]


def test_picture_of_a_sweep():
    """A curve over the wrong axis, or tandem's under the name of the limit."""
    figure = throughput_figure(sweep_rows())
    left, right = figure.axes
    for axes, at, rates in ((left, [1, 16, 256], [40, 640, 10240]), (right, [128, 1024, 8160], [640] * 3)):
        lines = {line.get_label().split(",")[0]: line for line in axes.lines}
        assert list(lines["tandem"].get_xdata()) == at and list(lines["tandem"].get_ydata()) == rates
        assert list(lines["limit of the machine"].get_ydata()) == [2 * rate for rate in rates]
        assert axes.get_xscale() == axes.get_yscale() == "log"
    assert throughput_png(sweep_rows())[:4] == b"\x89PNG"


def test_sweep_is_printed_and_drawn(monkeypatch, capsys, tmp_path):
    """A picture of another sweep than the table's; a flag that is taken and ignored."""
    result = {"bench": "sweep", "limits": {"matrix FLOP/s": 9e11, "memory bytes/s": 4.5e10}, "rows": sweep_rows()}
    monkeypatch.setattr("tandem.bench.sweep.sweep", lambda: result)
    picture = tmp_path / "sweep.png"
    assert main(["bench", "sweep", "--json", "--out", str(picture)]) == 0
    assert json.loads(capsys.readouterr().out) == result and picture.read_bytes() == throughput_png(sweep_rows())


def test_a_flag_without_use_is_refused(monkeypatch, capsys):
    """A flag that is taken and ignored."""
    monkeypatch.setattr("tandem.cli.bench._run", lambda *_: pytest.fail("it was measured"))
    assert main(["bench", "engine", "--out", "x.png"]) == 2 and "--out" in capsys.readouterr().err
    for work in ("sweep", "profile", "gpu", "structured"):
        assert main(["bench", work, "--peer", "ls"]) == 2
        peered = "engine, learner, tree, step, agents, sft, dpo, parity, serve, quantise, numerics, speculate"
        assert f"`bench {work}`, which has no peers. Use one of {peered}." in capsys.readouterr().err


def test_forms_are_printed_by_row(monkeypatch, capsys):
    """A ratio of other rows, seconds under another unit, or a work that the command does not know."""
    row = {"form": "a string", "sequences": 16, "plain_s": 0.010, "held_s": 0.0125, "ratio": 1.25, "mask_s": 7e-6}
    result = {"bench": "structured", "rows": [row]}
    monkeypatch.setattr("tandem.bench.structured.structured", lambda: result)
    assert main(["bench", "structured", "--json"]) == 0 and json.loads(capsys.readouterr().out) == result
    assert main(["bench", "structured"]) == 0
    printed = capsys.readouterr().out
    assert all(figure in printed for figure in ("a string", "16", "10.0 ms", "12.5 ms", "1.25 x", "7 us"))


def test_a_picture_that_cannot_be_written_is_refused_first(monkeypatch, capsys, tmp_path):
    """Minutes of measurement lost to a misspelt path."""
    monkeypatch.setattr("tandem.cli.bench._run", lambda *_: pytest.fail("it was measured"))
    (tmp_path / "folder.png").mkdir()
    wrong = {
        tmp_path: "is a folder",
        tmp_path / "folder.png": "is a folder",
        tmp_path / "nowhere" / "x.png": f"there is no folder {tmp_path / 'nowhere'}",
        tmp_path / "x.pdf": "Name it x.png",
        tmp_path / "x": "Name it x.png",
    }
    for path, message in wrong.items():
        assert main(["bench", "sweep", "--out", str(path)]) == 2
        assert message in capsys.readouterr().err, path
    monkeypatch.setattr("os.access", lambda *_: False)
    assert main(["bench", "sweep", "--out", str(tmp_path / "x.png")]) == 2
    assert "may not be written" in capsys.readouterr().err


def test_a_sweep_is_printed_before_it_is_drawn(monkeypatch, capsys, tmp_path):
    """A disk that fills up meanwhile takes the figures with it."""
    folder = tmp_path / "folder"
    folder.mkdir()
    result = {"bench": "sweep", "limits": {"matrix FLOP/s": 9e11, "memory bytes/s": 4.5e10}, "rows": sweep_rows()}
    monkeypatch.setattr("tandem.bench.sweep.sweep", lambda: folder.rmdir() or result)
    assert main(["bench", "sweep", "--json", "--out", str(folder / "x.png")]) == 1
    out, err = capsys.readouterr()
    assert json.loads(out) == result and "could not be written: No such file" in err


def test_a_peer_is_any_command_that_prints_json_lines():
    """Progress bars on standard output break the table."""
    rows = {"peer": "vllm", "work": "decode 1x128", "tok_s": 36.0}, {"peer": "vllm", "work": "start", "s": 55}, {"s": 1}
    figures = [Figure("vllm", "decode 1x128", 36.0), Figure("vllm", "start", 55, "s")]
    assert run_side(peer(*rows), {"decode 1x128": "tok/s"}) == figures
    assert run_side(saying("[" * 9999 + "\n" + json.dumps(rows[1])), {}) == figures[1:]


BINARY = Side((sys.executable, "-c", "import sys; sys.stdout.buffer.write(bytes(range(256)))"))


@pytest.mark.parametrize(
    "side", [peer({"peer": "x", "work": "w", "s": 1.0}, code=3), peer(), Side(("no-such-program",)), BINARY]
)
def test_a_peer_that_fails_stops_the_bench(side):
    """A crashed peer, or one that prints no text, is left out or ends in a traceback, and tandem has no rival."""
    with pytest.raises(WorldError, match="the peer"):
        run_side(side, {})


def test_tandem_that_fails_is_no_peer():
    """A crash of tandem's own measurement that is blamed on a peer."""
    with pytest.raises(WorldError, match=r"^tandem's own bench `.*` ended with 3"):
        run_side(Side(peer(code=3).command, own=True), {})


@pytest.mark.parametrize(
    ("line", "wrong"),
    [
        ('{"work": "w", "tok_s": 0}', '"tok_s" is not a finite number above 0'),
        ('{"work": "w", "tok_s": -3.5}', '"tok_s" is not a finite number above 0'),
        ('{"work": "w", "tok_s": "fast"}', '"tok_s" is not a finite number above 0'),
        ('{"work": "w", "tok_s": null}', '"tok_s" is not a finite number above 0'),
        ('{"work": "w", "tok_s": true}', '"tok_s" is not a finite number above 0'),
        ('{"work": "w", "tok_s": NaN}', '"tok_s" is not a finite number above 0'),
        ('{"work": "w", "s": Infinity}', '"s" is not a finite number above 0'),
        ('{"work": "w", "s": 1e-320}', '"s" is not a finite number above 0'),
        (f'{{"work": "w", "tok_s": 1{"0" * 400}}}', '"tok_s" is not a finite number above 0'),
        ('{"work": [1], "tok_s": 1}', '"work" is not a name'),
        ('{"peer": 7, "work": "w", "tok_s": 1}', '"peer" is not a name'),
        ('{"peer": "tandem", "work": "w", "tok_s": 1}', "'tandem' is a name of tandem's own"),
        ('{"peer": "limit", "work": "matrix FLOP/s", "tok_s": 1}', "'limit' is a name of tandem's own"),
        ('{"work": "w"}', "not one of tok_s, pairs_s, s, gb, share"),
        ('{"work": "w", "tok_s": 1, "s": 1}', "not one of tok_s, pairs_s, s, gb, share"),
        ('{"work": "w", "s": 2.0}', "tandem gives this work in tok/s, not in s"),
    ],
)
def test_a_wrong_figure_names_peer_line_and_what_is_expected(line, wrong):
    """A ratio of 200 from a time taken for a rate, of 0 or infinity; a traceback, after minutes of measurement."""
    with pytest.raises(WorldError) as caught:
        run_side(saying(line), {"w": "tok/s"})
    message = str(caught.value)
    assert message.startswith("the peer `") and f"line 2, {line[:200]}: " in message and wrong in message
    assert "Expected: {" in message


@pytest.mark.parametrize(
    ("text", "wrong"), [("sh -c 'echo", "No closing quotation"), ("", "is empty"), ("no-such-program x", "is found")]
)
def test_a_peer_that_is_no_command_is_refused_first(monkeypatch, capsys, text, wrong):
    """Minutes of measurement lost to a missing quote."""
    monkeypatch.setattr(benches, "run_side", lambda *_: pytest.fail("it was measured"))
    assert main(["bench", "engine", "--peer", text]) == 2 and wrong in capsys.readouterr().err
    with pytest.raises(ConfigError, match="--peer"):
        peer_side(text)


def by_round(monkeypatch, rounds):
    """run_side answers with the figures of a peer by round, (name, work, tok_s) each; tandem gives w and v."""
    left = iter(rounds)

    def run(side, units):
        if side.own:
            return [*LIMITS, Figure("tandem", "w", 100.0), Figure("tandem", "v", 2.0, "s")]
        assert units == {"w": "tok/s", "v": "s"}
        figures = next(left)
        if isinstance(figures, WorldError):
            raise figures
        return [Figure(*figure) for figure in figures]

    monkeypatch.setattr(benches, "run_side", run)


@pytest.mark.parametrize(
    ("rounds", "whole", "ratio", "wrong"),
    [
        ([WorldError("the peer broke")], 1, None, "the peer broke"),
        ([[("hf", "w", 50.0)], WorldError("the peer broke")], 1, 2.0, "the peer broke"),
        ([[("hf", "w", 50.0)]] * 2 + [[("hf", "u", 50.0)]], 2, 2.0, "no 'u' of 'hf' in round 1"),
        ([[("hf", "w", 50.0), ("hf", "u", 1.0)], [("hf", "w", 50.0)]], 1, 2.0, "no 'u' of 'hf' in round 2"),
        ([[("tandem", "w", 50.0)]], 1, None, "gives 'w' of 'tandem', as a side before it does"),
    ],
)
def test_what_was_measured_is_kept(monkeypatch, capsys, rounds, whole, ratio, wrong):
    """Tandem's own figures, and whole rounds, lost with a peer that breaks later."""
    by_round(monkeypatch, rounds)
    assert main(["bench", "engine", "--peer", "ls", "--json"]) == 1
    out, err = capsys.readouterr()
    result = json.loads(out)
    assert wrong in err and wrong in result["failure"] and result["rounds"] == whole
    assert {row["work"]: row["tandem"] for row in result["rows"]} == {"w": 100.0, "v": 2.0}
    assert result["rows"][0]["peers"].get("hf", {}).get("ratio") == ratio
    by_round(monkeypatch, rounds)
    assert main(["bench", "engine", "--peer", "ls"]) == 1 and "100.0 tok/s" in capsys.readouterr().out


def test_nothing_measured_is_an_error(monkeypatch, capsys):
    """An empty table where tandem's own measurement fails."""

    def fail(side, units):
        raise WorldError(f"{side} broke")

    monkeypatch.setattr(benches, "run_side", fail)
    assert main(["bench", "engine"]) == 1
    out, err = capsys.readouterr()
    assert out == "" and "tandem's own bench" in err


def test_sandboxes_are_measured(monkeypatch, capsys):
    """A row without its unit, or processes that are left behind and not counted."""
    from tandem.bench import sandbox as sandboxes
    from tandem.sandbox.config import SandboxConfig

    plain = SandboxConfig("unsandboxed_subprocess")
    for name, count in (("STARTS", 2), ("AT_ONCE", 2), ("BATCHES", 1), ("RUNS", 3)):
        monkeypatch.setattr(sandboxes, name, count)
    monkeypatch.setattr(sandboxes, "SandboxConfig", lambda: plain)
    assert main(["bench", "sandbox", "--json"]) == 0
    result = json.loads(capsys.readouterr().out)
    assert result["left"] == {"processes": 0, "mounts": 0, "files": 0, "descriptors": 0} and result["runs"] == 3
    assert all(row.get("median_ms", row.get("mb", 0.0)) > 0 for row in result["rows"])
    assert main(["bench", "sandbox"]) == 0
    shown = capsys.readouterr().out
    assert "start, prepared" in shown and "left behind by 3 in" in shown and "0 processes" in shown


def test_programs_are_run_to_their_ends_under_each_policy(capsys):
    """A turn asked twice or never, a rate that counts what was not done, policies compared over other rounds."""
    size = programs_bench.Size(5, 3, start=12, said=4, heard=6, tool_s=(0.001, 0.02, 0.005))
    made = []

    def make(size, memory, policy):
        config = programs_bench.config_of(size, memory, policy, 1, 4)
        engine, _ = paged_memory.make(config.kv_memory_bytes // 4, programs=config.programs)
        engine.clock = time.monotonic
        made.append((memory, policy, engine))
        return engine

    result = programs_bench.programs(size, make, rounds=2)
    arms = [("short", p) for p in programs_bench.POLICIES] + [("ample", p) for p in programs_bench.AMPLE]
    assert [one[:2] for one in made] == arms + arms[::-1]
    for memory, _, engine in made:
        assert engine.stats.finished == 15 and not engine.has_work
        assert engine.scheduler.pool.num_pages == (17 if memory == "short" else 100)
    rows = {(row["memory"], row["policy"]): row for row in result["rows"]}
    assert rows["short", "off"]["ratio"] == rows["ample", "off"]["ratio"] == 1.0 and result["tokens"] == 36
    assert rows["ample", "thunder"]["found"] > 0.9 and rows["ample", "off"]["turns_min"] > 0
    assert rows["short", "ttl"]["wanted"] == 1.5
