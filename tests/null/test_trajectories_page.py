"""A page of trajectories in which a person sees other programs, tokens or colours than the run had."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tandem.cli import main
from tandem.columns import Columns
from tandem.errors import ConfigError, RunFolderError
from tandem.report.trajectories import write_trajectories_page
from tandem.rollout.pieces import Pieces
from tandem.rollout.rows import credits, trajectory_rows
from tandem.rollout.trajectory import flatten
from tandem.types import Completion, Failure, Group, Message, Prompt, Sample, StopReason, ToolCall, Trajectory, Turn
from tests.browser import PROGRAM, Browser

HOSTILE = "<script>document.title = 'taken'</script><img src=http://example.invalid/x onerror=y>" + "a" * 300
NAN_FAILURE = Failure("reward", "returned <nan>")


def spell(ids: list[int]) -> str:
    return bytes(ids).decode(errors="replace")


def turn(said: str, logprob: float, observed: str = "", version: int = 2) -> Turn:
    tokens = list(said.encode())
    columns = Columns.of(tokens=tokens, logprobs=[logprob] * len(tokens), versions=[version] * len(tokens))
    return Turn(Completion("r", columns, StopReason.STOP_TOKEN), tuple(observed.encode()))


def played(
    prompt: Prompt, step: int, sibling: int, turns: list[Turn], outcome: float | Failure, **more: Any
) -> Trajectory:
    text = "".join(f"{message.role}: {message.content}\n" for message in prompt.messages)
    made = flatten(f"{prompt.id}/{step}/{sibling}", prompt.id, tuple(text.encode()), turns, outcome)
    return replace(made, **more)


def groups(step: int) -> list[Group]:
    """Of step 4: a group whose second program calls a tool, in two segments, and one in which a program failed."""
    first = Prompt(f"train/{step}a", (Message("user", f"What is {step} + 2?"),), {"answer": str(step + 2)})
    second = Prompt(f"train/{step}b", (Message("user", "Say é, and <b>wait</b>."),))
    call = ToolCall("add", {"a": step, "b": 2})
    said = (
        Message("assistant", "add", (call,), sampled=True),
        Message("tool", "6", more={"name": "add"}),
        Message("assistant", "It is 6", sampled=True),
    )
    return [
        Group(first, (
            played(first, step, 0, [turn("5", -0.5)], 0.0),
            played(first, step, 1, [turn("add", -0.125, "=6\n"), turn("It is 6", -2.0, version=3)], 1.0, said=said),
            played(first, step, 1, [turn("Folded", -0.25)], 1.0, segment=1),
        )),
        Group(second, (
            played(second, step, 0, [turn("é é", -1.0)], 0.25),
            played(second, step, 1, [turn(HOSTILE, -7.0)], NAN_FAILURE),
        )),
    ]  # fmt: skip


def credited(trajectory: Trajectory, advantage: float) -> Sample:
    columns = trajectory.columns
    advantages = np.where(columns["loss_mask"], advantage, 0.0)
    return Sample(trajectory.id, trajectory.prompt_id, columns.having(advantages=advantages))


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of steps 3 and 4; what came before, step 2, was kept by an older version, as texts."""
    folder = tmp_path_factory.mktemp("run") / "agents"
    (folder / "trajectories").mkdir(parents=True)
    (folder / "config.json").write_text('{"name": "agents <x>", "steps": 9}')
    (folder / "metrics.jsonl").write_text('{"step": 4, "reward": 0.5}\n')
    pieces = Pieces(spell)
    for step in (2, 3, 4):
        made = groups(step)
        rows = list(trajectory_rows(made, pieces, keep_tokens=step > 2))
        if step == 4:
            plain, tool, folded = made[0].trajectories
            ids = [f"{row['program_id']}/{row['segment']}" for row in rows]
            found = credits(ids, [credited(plain, -1.5), credited(tool, 0.75), credited(folded, 0.75)])
            rows = [row | more for row, more in zip(rows, found, strict=True)]
        if step == 2:
            for row in rows:
                row.pop("segment"), row.pop("said", None), row.pop("context", None)
        lines = "".join(json.dumps(row) + "\n" for row in rows)
        (folder / f"trajectories/step-{step}.jsonl").write_text(lines)
    return folder


@pytest.fixture(scope="module")
def page(folder: Path) -> Path:
    return write_trajectories_page(folder).path


@pytest.fixture(scope="module")
def only(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Browser]:
    if PROGRAM is None:
        pytest.skip("chromium is not installed: apt-get install chromium")
    browser = Browser(tmp_path_factory.mktemp("chromium"))
    yield browser
    browser.close()


@pytest.fixture
def browser(only: Browser) -> Iterator[Browser]:
    """What a test leaves behind must be no error and no request but for the page itself."""
    only.errors.clear()
    only.requests.clear()
    only.look(1280, 800)
    yield only
    assert only.errors == []
    assert [url for url in only.requests if not url.startswith("file:") and url != "about:blank"] == []


def shown(browser: Browser) -> list[str]:
    """Programs of the list, in its order."""
    return browser.run("[...document.querySelectorAll('.chip')].map((one) => one.dataset.program)")


def texts(browser: Browser, selector: str) -> list[str]:
    return browser.run(f"[...document.querySelectorAll({selector!r})].map((one) => one.textContent)")


def settle(browser: Browser) -> None:
    browser.run(
        "new Promise((done) => { const wait = () => document.body.dataset.ready === String(searches) ? done() : "
        "setTimeout(wait, 5); wait(); })"
    )


ALL = ["train/4a/4/0", "train/4a/4/1", "train/4b/4/0", "train/4b/4/1"]


@pytest.mark.parametrize(
    ("address", "programs"),
    [
        ("", ALL),  # the last step
        ("step=3", [one.replace("4", "3") for one in ALL]),
        ("step=3..4&reward=1", ["train/3a/3/1", "train/4a/4/1"]),
        ("step=4&reward=0.2..1", ["train/4a/4/1", "train/4b/4/0"]),
        ("step=4&reward=..0.3", ["train/4a/4/0", "train/4b/4/0"]),  # a failed program has no reward
        ("step=4&outcome=failed", ["train/4b/4/1"]),
        ("step=4&outcome=graded", ALL[:3]),
        ("step=4&outcome=reward%3A+returned+%3Cnan%3E", ["train/4b/4/1"]),
        ("step=4&outcome=environment%3A+lost", []),
        ("step=4&tokens=1..5", ["train/4a/4/0", "train/4b/4/0"]),  # é has two bytes, so 5 tokens
        ("step=4&tokens=16", ["train/4a/4/1"]),  # both segments
        ("step=4&prompt=say", ["train/4b/4/0", "train/4b/4/1"]),
        ("step=4&prompt=train/4A", ["train/4a/4/0", "train/4a/4/1"]),
        ("search=folded", ["train/2a/2/1", "train/3a/3/1", "train/4a/4/1"]),
        ("step=4&search=ONERROR", ["train/4b/4/1"]),
        ("step=4&search=nowhere", []),
        ("step=x&reward=1..2..3", [f"train/{n}{p}/{n}/{s}" for n in (2, 3, 4) for p in "ab" for s in (0, 1)]),
    ],
)  # fmt: skip
def test_filters(browser: Browser, page: Path, address: str, programs: list[str]) -> None:
    """A filter that lets others through, or hides what it asks for; one that reads a failure as a reward of 0."""
    browser.open(page, address)
    assert shown(browser) == programs
    count = browser.run("document.getElementById('count').textContent")
    assert re.match(rf"{len(programs)} of \d+ programs", count), count
    assert ("No program" in browser.run("document.getElementById('reader').textContent")) == (not programs)
    wrong = browser.run("[...document.querySelectorAll('.wrong')].map((one) => one.id)")
    assert wrong == (["step", "reward"] if "step=x" in address else [])


def test_a_program_turn_by_turn(browser: Browser, page: Path) -> None:
    """Turns out of order, an observation shown as the model's, a call that is not seen, a segment left out."""
    browser.open(page, "step=4&program=train/4a/4/1")
    assert texts(browser, ".turn .text") == [
        "user: What is 4 + 2?\n",
        "add",
        "=6\n",
        "It is 6",
        "user: What is 4 + 2?\n",
        "Folded",
    ]
    assert texts(browser, ".turn.other:not(details) .text") == ["=6\n"]
    assert texts(browser, ".call") == ["add(a=4, b=2)"]
    assert texts(browser, ".who b") == ["assistant", "tool add", "assistant", "assistant"]
    assert texts(browser, ".segments h3") == ["segment 1 of 2", "segment 2 of 2"]
    left = browser.run(
        "[...document.querySelectorAll('.segments > section')].map((one) => one.getBoundingClientRect().left)"
    )
    assert left[0] < left[1]  # side by side
    words = texts(browser, ".words span")
    assert words[:4] == ["step 4", "sibling 2 of 2", "16 sampled tokens", "3 turns"] and {
        "expected 6",
        "1 observation",
    } <= {*words}
    assert texts(browser, ".head b") == ["1"]
    assert "advantage 0.75" in texts(browser, ".who span") and "mean log-prob −2" in texts(browser, ".who span")


def test_what_the_environment_quotes_is_no_turn(browser: Browser, tmp_path: Path) -> None:
    """An example that the environment gives stands as who spoke the model's turn, and its turn as the environment's."""
    prompt = Prompt("train/0", (Message("user", "?"),))
    example, call = Message("assistant", "4"), ToolCall("add", {"a": 1})
    said = (
        Message("assistant", "five", sampled=True), Message("user", "So:"), example,
        Message("assistant", "six", (call,), sampled=True), replace(example, calls=(call,)),
        Message("assistant", "7", sampled=True),
    )  # fmt: skip
    turns = [turn("five", -1.0, "So:4"), turn("six", -1.0, "4"), turn("7", -1.0)]
    rows = trajectory_rows([Group(prompt, (played(prompt, 1, 0, turns, 1.0, said=said),))], Pieces(spell))
    (tmp_path / "trajectories").mkdir()
    (tmp_path / "config.json").write_text('{"name": "quotes"}')
    (tmp_path / "metrics.jsonl").write_text("")
    (tmp_path / "trajectories/step-1.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    browser.open(write_trajectories_page(tmp_path).path)
    assert texts(browser, ".who b") == ["assistant", "user, assistant", "assistant", "assistant", "assistant"]
    calls = "[...document.querySelectorAll('.turn')].map((one) => one.querySelectorAll('.call').length)"
    assert browser.run(calls) == [0, 0, 0, 1, 1, 0]


def colour(browser: Browser, selector: str) -> str:
    return browser.run(f"getComputedStyle(document.querySelector({selector!r})).backgroundColor")


def alpha(text: str) -> float:
    """Of a computed colour."""
    numbers = [float(number) for number in re.findall(r"[\d.]+", text.partition("/")[2] or text)]
    return numbers[-1] if "/" in text or text.startswith("rgba") else 1.0


def test_colours(browser: Browser, page: Path) -> None:
    """A token that was read shown as trained; a rare token paler than a sure one; credit of the wrong sign."""
    sure, rare, seen = ".turn:not(.other) .t", "section:first-child > .turn:last-child .t", "details .t"
    nothing = "rgba(0, 0, 0, 0)"
    browser.open(page, "step=4&program=train/4a/4/1")
    assert colour(browser, seen) == nothing != colour(browser, sure)
    assert alpha(colour(browser, sure)) == pytest.approx(0.17, abs=0.01)
    browser.press("c")  # log-prob
    assert browser.run("location.hash").endswith("color=logprob&program=train%2F4a%2F4%2F1")
    assert alpha(colour(browser, sure)) == pytest.approx(0.62 * 0.125 / 6, abs=0.003)
    assert alpha(colour(browser, rare)) == pytest.approx(0.62 * 2 / 6, abs=0.003)
    assert colour(browser, seen) == nothing
    browser.press("c")  # advantage
    up = colour(browser, sure)
    assert alpha(up) == pytest.approx(0.26, abs=0.01) and colour(browser, seen) == nothing  # half of the step's largest
    assert texts(browser, ".legend") == ["less likely (−1.5)more likely (1.5)"]
    browser.press("k")  # the program before, whose credit is below 0
    assert texts(browser, ".head code") == ["train/4a/4/0"]
    down = colour(browser, sure)
    assert alpha(down) == pytest.approx(0.52, abs=0.01)
    assert up.split("/")[0] != down.split("/")[0]
    browser.press("c")
    assert colour(browser, sure) == nothing
    browser.press("c")
    assert alpha(colour(browser, sure)) == pytest.approx(0.17, abs=0.01)
    browser.open(page, "step=3&color=advantage")
    assert colour(browser, sure) == nothing and "not trained" in texts(browser, ".legend")[0]


def test_what_is_known_of_a_token(browser: Browser, page: Path) -> None:
    """Text, id, log-prob or version of another token; a character of two tokens shown twice or as rubbish."""
    browser.open(page, "step=4&program=train/4b/4/0")
    spans = ".turn:not(.other) .t"
    assert texts(browser, spans) == ["", "é", " ", "", "é"]
    over = f"document.querySelectorAll({spans!r})[1].onmouseenter(); document.getElementById('token').textContent"
    first = len("user: Say é, and <b>wait</b>.\n".encode())
    logprob = "log-prob −1 (p 0.368)   not trained   weights of step 2"
    assert browser.run(over) == f'token {first + 1} "é"   id 169   {logprob}'
    seen = "document.querySelector('details .t').onmouseenter(); document.getElementById('token').textContent"
    assert browser.run(seen) == 'token 0 "u"   id 117   not in the loss'


def test_keys(browser: Browser, page: Path) -> None:
    """A key that does nothing, or acts while a person types into a filter."""
    browser.open(page)
    at = "document.querySelector('.head code').textContent"
    seen = []
    for key in ("j", "j", "k", "n", "p", "["):
        browser.press(key)
        settle(browser)
        seen.append(browser.run(at))
    assert seen == ["train/4a/4/1", "train/4b/4/0", "train/4a/4/1", "train/4b/4/0", "train/4a/4/1", "train/3a/3/0"]
    browser.press("]")
    settle(browser)
    assert browser.run(at) == "train/4a/4/0"
    assert browser.run("document.querySelector('details.turn').open") is True
    browser.press("x")
    assert browser.run("document.querySelector('details.turn').open") is False
    browser.press("/")
    for key in "jc":
        browser.press(key)
    settle(browser)
    assert browser.run("document.getElementById('search').value") == "jc"
    assert "search=jc" in browser.run("location.hash") and "color=mask" in browser.run("location.hash")
    browser.press("Escape")
    browser.press("c")
    assert "color=logprob" in browser.run("location.hash")


def test_what_a_model_writes_stays_text(browser: Browser, page: Path) -> None:
    """A page that runs what a model wrote, or asks the network for it."""
    browser.open(page, "step=4&program=train/4b/4/1")
    assert texts(browser, ".turn:not(.other) .text") == [HOSTILE]
    assert texts(browser, ".failure") == ["reward: returned <nan>"]
    assert browser.run("document.title") == "agents <x> – tandem"
    assert browser.run("document.querySelectorAll('#reader img, #reader script, #list b').length") == 0


def test_rows_of_an_older_version(browser: Browser, page: Path) -> None:
    """A folder of before tokens were kept, whose page is empty."""
    browser.open(page, "step=2")
    assert shown(browser) == [one.replace("4", "2") for one in ALL]
    assert texts(browser, ".turn .text") == ["user: What is 2 + 2?", "5"]
    assert "no colours" in texts(browser, ".legend")[0]


@pytest.mark.parametrize(("width", "dark"), [(1280, False), (820, True), (380, False), (380, True)])
def test_nothing_is_wider_than_the_window(browser: Browser, page: Path, width: int, dark: bool) -> None:
    """A line that a narrow window cuts off; ink and paper of the same darkness."""
    browser.look(width, 700, dark)
    browser.open(page, "step=4&program=train/4b/4/1")
    assert browser.run("document.documentElement.scrollWidth") <= width
    every = "[...document.querySelectorAll('.top *, .list *, .reader *')]"
    assert browser.run(f"{every}.filter((one) => one.getBoundingClientRect().right > innerWidth + 1).length") == 0
    spelt = [browser.run(f"getComputedStyle(document.body).{name}") for name in ("color", "backgroundColor")]
    ink, paper = (sum(map(int, re.findall(r"\d+", text)[:3])) for text in spelt)
    assert (ink - paper > 450) if dark else (paper - ink > 450)


def test_a_full_page_says_what_it_leaves_out(folder: Path, tmp_path: Path, browser: Browser) -> None:
    """Steps that are not in the page and of which nothing is said; the oldest kept in place of the newest."""
    copy = tmp_path / "run"
    (copy / "trajectories").mkdir(parents=True)
    for path in (folder / "trajectories").iterdir():
        (copy / "trajectories" / path.name).write_text(path.read_text())
    written = write_trajectories_page(copy, limit_bytes=1000)
    assert (written.steps, written.left_out) == ((4,), (2, 3))
    assert "step 2-3 left out" in written.note and "--steps 2-3" in written.note
    browser.open(written.path)
    assert texts(browser, "#note") == [written.note] and shown(browser) == ALL
    written = write_trajectories_page(copy, "2-3")
    assert (written.steps, written.left_out, written.note) == ((2, 3), (), "")


def test_the_verb(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """`tandem report RUN --trajectories` writes no page, or takes steps that are none."""
    assert main.main(["report", str(folder), "--trajectories", "--steps", "3", "--json"]) == 0
    said = json.loads(capsys.readouterr().out)
    assert said["trajectories"] == str(folder / "trajectories.html")
    text = Path(said["trajectories"]).read_text()
    assert 'id="block-3"' in text and 'id="block-4"' not in text
    assert "trajectories.html" in (folder / "report.html").read_text()
    write_trajectories_page(folder)
    for steps in ("4-3", "x", "-3", "3-x", "1.5"):
        with pytest.raises(ConfigError, match="Give a step, or the first and the last"):
            write_trajectories_page(folder, steps)
    with pytest.raises(RunFolderError, match="of step 7; it has those of 2-4"):
        write_trajectories_page(folder, "7")
    with pytest.raises(RunFolderError, match="keeps no trajectories"):
        write_trajectories_page(tmp_path)
    for words in (["--steps", "3"], ["--trajectories", str(folder)]):
        assert main.main(["report", str(folder), *words]) == 2
    (tmp_path / "trajectories").mkdir()
    (tmp_path / "trajectories/step-1.jsonl").write_text('{"program_id": "p"}\n')
    with pytest.raises(RunFolderError, match="line 1 is no trajectory"):
        write_trajectories_page(tmp_path)
