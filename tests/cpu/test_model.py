"""Regressions in what answers many prompts: files of prompts, samples, base models, models to evaluate."""

from __future__ import annotations

import io
import json
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import transformers

from tandem.algo.config import AlgoConfig
from tandem.cli.main import main
from tandem.engine.config import EngineConfig
from tandem.errors import CapacityError, ModelError, TandemWarning
from tandem.models.config import ModelConfig
from tandem.program.config import TaskConfig
from tandem.rollout.config import RolloutConfig
from tandem.run import local, model
from tandem.run.asked import conversations
from tandem.run.config import EvaluationConfig, RunConfig
from tandem.study.runs import Quiet
from tandem.types import Message, StopReason

LINES = [
    {"prompt": "What is 1+1?", "id": 7},
    {"messages": [{"role": "system", "content": "Be short."}, {"role": "user", "content": "Hello"}], "answer": None},
    {"prompt": "Say\nboo"},
]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory, write_model: Callable[..., None]) -> Path:
    path = tmp_path_factory.mktemp("chat")
    write_model(path, 10.0)
    return path


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory, write_model: Callable[..., None]) -> Path:
    """A model without a chat template whose tokeniser begins a text with a bos, as Llama's does."""
    path = tmp_path_factory.mktemp("base")
    write_model(path, 10.0)
    (path / "chat_template.jinja").unlink()
    text = json.loads((path / "tokenizer.json").read_text())
    text["post_processor"] = {
        "type": "TemplateProcessing",
        "single": [{"SpecialToken": {"id": "<|im_start|>", "type_id": 0}}, {"Sequence": {"id": "A", "type_id": 0}}],
        "pair": [{"Sequence": {"id": "A", "type_id": 0}}, {"Sequence": {"id": "B", "type_id": 1}}],
        "special_tokens": {"<|im_start|>": {"id": "<|im_start|>", "ids": [1], "tokens": ["<|im_start|>"]}},
    }
    (path / "tokenizer.json").write_text(json.dumps(text))
    return path


def answered(capsys: pytest.CaptureFixture[str], *arguments: object) -> list[dict[str, Any]]:
    assert main(["generate", *map(str, arguments), "--max-new-tokens", "6", "--json"]) == 0
    return [json.loads(line) for line in capsys.readouterr().out.splitlines()]


def test_a_file_is_answered_in_its_order(folder: Path, tmp_path: Path, capsys, monkeypatch) -> None:
    """Rows in the order in which they ended, fields of a line lost, or other tokens than the prompt gets alone."""
    file = tmp_path / "asked.jsonl"
    file.write_text("\ufeff" + "\n\n".join(json.dumps(line) for line in LINES) + "\n\n")
    monkeypatch.setattr(model, "AHEAD", 1 / 128)  # two requests at a time, so that the third waits for the first
    rows = answered(capsys, folder, "--file", file)
    assert [{name: row[name] for name in line} for row, line in zip(rows, LINES, strict=True)] == LINES
    assert rows[0]["tokens"] == answered(capsys, folder, LINES[0]["prompt"])[0]["tokens"]
    reference = transformers.AutoTokenizer.from_pretrained(folder)
    asked = reference.apply_chat_template(LINES[1]["messages"], add_generation_prompt=True, return_dict=False)
    assert rows[1]["prompt_tokens"] == len(asked)


@pytest.mark.parametrize(
    ("name", "content", "prompts"),
    [
        ("asked.txt", b'one\r\n{"prompt": 1}\n\n', ["one", '{"prompt": 1}']),
        ("-", b'\n {"prompt": "one"}\n{"prompt": "two"}', ["one", "two"]),
        ("-", "eins\nzwölf".encode(), ["eins", "zwölf"]),
    ],
)
def test_lines_are_text_or_json(tmp_path: Path, monkeypatch, capsys, folder: Path, name, content, prompts) -> None:
    """JSON sent to the model as text, or a text that begins with a brace refused as JSON."""
    (tmp_path / "asked.txt").write_bytes(content)
    monkeypatch.setattr("sys.stdin", SimpleNamespace(buffer=io.BytesIO(content)))
    rows = answered(capsys, folder, "--file", tmp_path / name if name != "-" else name)
    assert [row["prompt"] for row in rows] == prompts


@pytest.mark.parametrize(
    ("line", "said"),
    [
        (b'{"promt": "x"}', "neither prompt nor messages, only promt"),
        (b'{"prompt": "x", "messages": []}', "both prompt and messages"),
        (b'{"prompt": " "}', "prompt is ' ', which asks nothing"),
        (b'{"prompt": 3}', "prompt is 3"),
        (b'{"messages": [{"role": "user"}]}', "message {'role': 'user'}"),
        (b'{"messages": "hello"}', "messages is 'hello'"),
        (b"[1]", "[1] is no object"),
        (b'{"prompt": "x"', "not JSON"),
        (b'{"prompt": "x", "n": NaN}', "NaN is no JSON number"),
        (b'{"prompt": "\\ud800"}', "holds \\ud800, half of a character"),
        (b'{"prompt": "x", "id": "\\udc00"}', "holds \\udc00, half of a character"),
        (b'{"messages": [{"role": "user", "content": " "}]}', "asks nothing"),
        (b'{"messages": []}', "messages is []"),
        (b'{"prompt": "x", "max_new_tokens": 9, "temperature": 1}', "set for all lines, by --max-new-tokens"),
        (b'{"prompt": "x", "samples": 2}', "set for all lines, by -n"),
        (b'{"prompt": "x", "stop_strings": []}', "set for all lines, by --stop"),
        (b"\xff", "not JSON"),
        (b'{"a":' * 20_000, "not JSON"),
    ],
)
def test_a_broken_line_is_named(tmp_path: Path, capsys, line: bytes, said: str) -> None:
    """A traceback, or an answer to nothing, for a line that asks nothing; found only after the model has loaded."""
    file = tmp_path / "asked.jsonl"
    file.write_bytes(b'{"prompt": "fine"}\n\n' + line + b"\n")
    assert main(["generate", "no/model", "--file", str(file)]) == 2
    error = capsys.readouterr().err
    assert f"{file} line 3" in error and said in error and error.count("\n") == 1


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ([], "neither PROMPT and --file"),
        (["x", "--file", "-"], "both PROMPT and --file"),
        (["--file", "nowhere.txt"], "--file nowhere.txt cannot be read"),
        (["x", "--top-p", "0"], "--top-p is 0.0. Allowed: above 0"),
        (["x", "--min-p", "1"], "--min-p is 1.0."),
        (["x", "--stop", ""], "--stop holds an empty string"),
        (["x", "--stop", "\udcff"], "--stop holds \\udcff, half of a character"),
        (["x", "-n", "3", "--top-p", "0.5"], "--top-p, -n: at --temperature 0 the most likely token is taken"),
        (["x", "--top-k", "5"], "--top-k: at --temperature 0"),
        (["x", "--min-p", "0.1"], "--min-p: at --temperature 0"),
        (["x", "-n", "2"], "Give --temperature 1, or another above 0"),
        (["\udcff"], "PROMPT: prompt holds \\udcff, half of a character"),
    ],
)
def test_wrong_requests_are_refused_before_the_model_loads(capsys, arguments: list[str], said: str) -> None:
    """A traceback, or minutes of loading, before a flag's value is refused."""
    assert main(["generate", "no/model", *arguments]) == 2
    assert said in capsys.readouterr().err


def test_filters_reach_the_sampler(folder: Path, capsys) -> None:
    """--top-p, --top-k or --min-p ignored: at their narrowest each leaves only the most likely token."""
    greedy = answered(capsys, folder, "What?")[0]["tokens"]
    drawn = answered(capsys, folder, "What?", "--temperature", 1.5)[0]["tokens"]
    assert drawn != greedy
    for filtered in (("--top-p", 1e-9), ("--top-k", 1), ("--min-p", 0.999999)):
        assert answered(capsys, folder, "What?", "--temperature", 1.5, *filtered)[0]["tokens"] == greedy, filtered


def test_a_sample_is_of_its_seed_prompt_and_number_alone(folder: Path, capsys) -> None:
    """Sample 2 of --seed 0 is sample 1 of --seed 1, so that two seeds share answers; or -n changes an answer."""
    asked = (folder, "What?", "What?", "--temperature", 1)
    drawn = {
        (seed, place): tuple(row["tokens"])
        for seed in range(4)
        for place, row in enumerate(answered(capsys, *asked, "-n", 3, "--seed", seed))
    }
    assert len(set(drawn.values())) == 24
    alone = answered(capsys, *asked, "--seed", 2)
    assert [tuple(row["tokens"]) for row in alone] == [drawn[2, 0], drawn[2, 3]]
    seeds = {seed: answered(capsys, *asked, "-n", 2, "--seed", seed) for seed in (0, 2**63 - 1)}
    assert all(len(rows) == 4 for rows in seeds.values())


def test_a_stop_string_is_cut_off(folder: Path, capsys) -> None:
    """The stop string, or what was sampled with it, printed as part of the answer."""
    whole = answered(capsys, folder, "What?")[0]["text"]
    (row,) = answered(capsys, folder, "What?", "--stop", whole[2:4], "--stop", whole[1:4], "--stop", "§")
    assert row["text"] == whole[:1] and row["stop_reason"] == "stop_string"


def test_answers_wait_for_those_before(folder: Path, capsys) -> None:
    """Answers in the order in which they ended, under prompts of other ones."""
    first, second = (answered(capsys, folder, prompt)[0]["text"] for prompt in ("Hello", "What?"))
    short = next(character for character in second if character not in first)
    rows = answered(capsys, folder, "Hello", "What?", "--stop", short)
    assert [row["text"] for row in rows] == [first, second[: second.index(short)]]
    assert len(rows[1]["tokens"]) < len(rows[0]["tokens"]) == 6


def test_a_prompt_that_cannot_fit_stops_the_file_before_any_answer(
    folder: Path, tmp_path: Path, capsys, monkeypatch
) -> None:
    """Hours of answers, then an error at a prompt that was too long from the start."""
    monkeypatch.setattr(model, "AHEAD", 1 / 256)
    file = tmp_path / "asked.txt"
    file.write_text("short\n" + "long " * 100 + "\n")
    assert main(["generate", str(folder), "--file", str(file)]) == 2
    printed = capsys.readouterr()
    assert printed.out == "" and "'prompt 2, long long" in printed.err and "leaves no room" in printed.err


def test_progress_and_answers_go_apart(folder: Path, tmp_path: Path, capsys) -> None:
    """Progress between the rows that a script reads."""
    file = tmp_path / "asked.txt"
    file.write_text("one\ntwo\n")
    assert main(["generate", str(folder), "--file", str(file), "--max-new-tokens", "2"]) == 0
    printed = capsys.readouterr()
    assert "2 of 2 answers" in printed.err and "answers" not in printed.out and printed.out.count("> ") >= 2


def test_an_engine_is_left_clean(folder: Path) -> None:
    """Requests left in the engine by an answer that was not waited for, or by a prompt that was refused."""
    loaded = model.load(str(folder))
    asked = RolloutConfig(temperature=0.0, max_new_tokens=4)
    answers = loaded.answers(conversations(["one", "two", "three"]), asked, 2, 0)
    assert next(answers).prompt == 0
    answers.close()
    assert not loaded.parts.engine.has_work
    with pytest.raises(CapacityError, match="prompt 2"):
        loaded.generate(["one", "x" * 300])
    assert not loaded.parts.engine.has_work and loaded.generate([]) == []
    (answer,) = loaded.generate([[Message("user", "one")]], max_new_tokens=4)
    assert answer.completion.tokens == loaded.generate(["one"], max_new_tokens=4)[0].completion.tokens
    assert answer.completion.stop_reason is StopReason.LENGTH


def test_a_base_model_continues_plain_text(base: Path, folder: Path, capsys) -> None:
    """A model without a chat template refused, or its text begun without the bos that it was trained with."""
    with pytest.warns(TandemWarning, match="no chat template: prompts are plain text"):
        loaded = model.load(str(base))
    ids = transformers.AutoTokenizer.from_pretrained(base)("Once upon")["input_ids"]
    renderer = loaded.parts.renderer
    assert list(renderer.prompt_tokens((Message("user", "Once upon"),))) == ids and ids[0] == 1
    both = renderer.prompt_tokens((Message("system", "Be short."), Message("user", "Hi")))
    assert list(both) == transformers.AutoTokenizer.from_pretrained(base)("Be short.\n\nHi")["input_ids"]
    assert renderer.observation_tokens((5, 6), (Message("user", "more"),)) == tuple(
        renderer.tokenizer.encode("\n\nmore", False)
    )
    alone = model.load(str(folder), form="plain").parts.renderer.prompt_tokens((Message("user", "Once upon"),))
    assert alone == tuple(ids[1:])  # --raw: this tokeniser adds no bos
    with pytest.raises(ModelError, match="has no chat template, and chat was asked for"):
        model.load(str(base), form="chat")
    assert main(["chat", str(base)]) == 2 and "no chat template" in capsys.readouterr().err


@pytest.mark.filterwarnings("ignore:.*no chat template")
def test_a_base_model_is_trained_and_evaluated(base: Path, folder: Path, tmp_path: Path) -> None:
    """A run on a base model refused; one whose plan hides how prompts were written, or whose sides disagree."""
    sums = [{"question": f"{a}+{b}=", "answer": str(a + b)} for a in range(4) for b in range(4)]
    asked = str(tmp_path / "sums.jsonl")
    Path(asked).write_text("".join(json.dumps(row) + "\n" for row in sums))
    for path, form, written in (
        (base, "auto", "plain text"),
        (folder, "plain", "plain text"),
        (folder, "auto", "chat template"),
    ):
        config = RunConfig(
            name="tiny",
            steps=1,
            model=ModelConfig(str(path)),
            task=TaskConfig("jsonl", path=asked, reward="last_number", heldout_size=4, format=form),
            rollout=RolloutConfig(prompts_per_step=2, samples_per_prompt=4, max_new_tokens=4),
            engine=EngineConfig(kv_memory_bytes=4 << 20),
            algo=AlgoConfig(),
            evaluation=EvaluationConfig(prompts=4),
        )  # fmt: skip
        out = tmp_path / f"{path.name}-{form}"
        with Quiet(print) as display:
            assert local.train(config, out=out, resume=None, display=display)[0] == 0
        assert json.loads((out / "plan.json").read_text())["prompts"] == written
        rows = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
        assert rows[1].get("mismatch", 0.0) == 0.0 and rows[1]["evaluation"]["prompts"] == 4
        assert local.evaluate_model(config).prompts == 4
        assert model.load(str(out)).parts.renderer.plain == (written == "plain text")


def test_eval_of_a_model(folder: Path, tmp_path: Path, capsys) -> None:
    """A model taken for a recipe or a run folder; a model without a task evaluated on some task of ours."""
    assert main(["eval", str(folder)]) == 2
    assert "is a model: say what to ask it. Give --task NAME" in capsys.readouterr().err
    (tmp_path / "empty").mkdir()
    for typo, said in ((f"{tmp_path}/typo", "no model at"), (f"{tmp_path}/empty", "empty"), ("x.gguf", "no model at")):
        for verb in (["eval", typo], ["generate", typo, "Hi."]):  # both say the same
            assert main(verb) == 2
            told = capsys.readouterr().err
            assert said in told and "say what to ask" not in told, (verb, told)
    (tmp_path / "sums.jsonl").write_text('{"question": "1+1=", "answer": "2"}\n{"question": "1+2=", "answer": "3"}\n')
    asked = ["--task", "gsm8k", "--path", str(tmp_path / "sums.jsonl"), "--set", "rollout.max_new_tokens=4", "--json"]
    assert main(["eval", str(folder), *asked]) == 0
    row = json.loads(capsys.readouterr().out)
    assert row["model"] == str(folder) and row["prompts"] == 2 and row["length"] <= 4
    for wrong, said in (
        ("nowhere/x.gguf", "no model at nowhere/x.gguf"),
        ("no_recipe", "no recipe is named no_recipe"),
    ):
        assert main(["eval", wrong, "--task", "chain_sum"]) == 2
        assert said in capsys.readouterr().err
