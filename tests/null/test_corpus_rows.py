"""Rows of files: what is read of them, and which file, line and message an error names."""

from __future__ import annotations

import gzip
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

from tandem.corpus.config import CorpusConfig
from tandem.corpus.lines import held_bytes
from tandem.corpus.sources import readers_of
from tandem.errors import ConfigError, CorpusError
from tandem.models.scratch import new_tokenizer
from tandem.program.render import Renderer
from tandem.types import Group, ToolCall

ASK = {"role": "user", "content": "1 + 1?"}
SAY = {"role": "assistant", "content": "2"}
CALL = {"id": "c1", "type": "function", "function": {"name": "add", "arguments": '{"a": 1, "b": null}'}}
CALLS = {"role": "assistant", "content": None, "tool_calls": [CALL]}
TOOLS = [{"type": "function", "function": {"name": "add", "description": "Adds.", "parameters": {"type": "object"}}}]


def read(path: Path, number: int = 0, **config: Any) -> Group:
    (reader,) = readers_of(CorpusConfig((str(path),), **config), Renderer(new_tokenizer()))
    return reader.group(number)


def lines(path: Path, *rows: Mapping[str, Any] | str) -> Path:
    path.write_text("".join((row if isinstance(row, str) else json.dumps(row)) + "\n" for row in rows))
    return path


def texts(group: Group) -> list[tuple[str, str]]:
    """Of each trajectory all of it, and what is trained."""
    decode = new_tokenizer().decode
    return [
        (decode(one.columns["tokens"].tolist()), decode(one.columns["tokens"][one.columns["loss_mask"]].tolist()))
        for one in group.trajectories
    ]


def test_the_formats_say_the_same(tmp_path: Path) -> None:
    """ShareGPT's or a text's rows learned as other messages than OpenAI's with the same words."""
    openai = read(lines(tmp_path / "a.jsonl", {"messages": [{"role": "system", "content": "Add."}, ASK, SAY]}))
    turns = [{"from": "human", "value": "1 + 1?"}, {"from": "gpt", "value": "2"}]
    sharegpt = read(lines(tmp_path / "b.jsonl", {"conversations": turns, "system": "Add."}))
    quoted = read(lines(tmp_path / "c.jsonl", {"dialogue": json.dumps([ASK, SAY])}), fields=(("messages", "dialogue"),))
    assert texts(openai) == texts(sharegpt)
    assert texts(openai)[0][0].startswith("<|im_start|>system\nAdd.<|im_end|>\n<|im_start|>user\n1 + 1?<|im_end|>\n")
    assert texts(openai)[0][1] == texts(quoted)[0][1] == "2<|im_end|>"
    assert [message.role for message in openai.prompt.messages] == ["system", "user"]
    document = read(lines(tmp_path / "d.jsonl", {"text": "A<|im_end|>B."}))
    assert texts(document) == [("A<|im_end|>B.<|im_end|>", "<|im_end|>B.<|im_end|>")]
    tokens = document.trajectories[0].columns["tokens"].tolist()
    assert tokens[-1] == 2 and tokens[:-1].count(2) == 0  # what the text spells is text
    (tmp_path / "e.txt").write_text("\ufeffA<|im_end|>B.")
    assert texts(read(tmp_path / "e.txt")) == texts(document)


def test_what_a_row_need_not_have(tmp_path: Path) -> None:
    """A row without tools refused because the file calls them otherwise; a name that no row has, passed over."""
    path = lines(tmp_path / "a.jsonl", {"messages": [ASK, SAY]}, {"messages": [ASK, SAY], "functions": TOOLS})
    assert not read(path, 0, fields=(("tools", "functions"),)).prompt.tools
    assert read(path, 1, fields=(("tools", "functions"),)).prompt.tools == tuple(TOOLS)
    with pytest.raises(CorpusError, match=r"no field of its first 1,000 rows is 'fnctions' .*Did you mean functions"):
        read(path, fields=(("tools", "fnctions"),))
    said = {"role": "system", "content": "Add."}
    beside = lines(tmp_path / "b.jsonl", {"messages": [ASK, SAY], "system": "Add."}, {"messages": [said, ASK, SAY]})
    assert texts(read(beside, 0)) == texts(read(beside, 1))


def test_a_call_and_what_a_tool_said(tmp_path: Path) -> None:
    """A call or its answer that the model never sees, or a tool's words that are trained."""
    row = {
        "messages": [ASK, CALLS, {"role": "tool", "content": "It is 2.", "tool_call_id": "c1"}, SAY],
        "tools": json.dumps(TOOLS),
    }  # fmt: skip
    group = read(lines(tmp_path / "a.jsonl", row))
    ((whole, trained),) = texts(group)
    assert "add(a=1, b=None)" in trained and "It is 2." in whole and "It is 2." not in trained
    assert trained.endswith("<|im_end|>2<|im_end|>")
    assert group.trajectories[0].said[0].calls == (ToolCall("add", {"a": 1, "b": None}, "c1"),)
    assert group.prompt.tools == tuple(TOOLS)
    call = '{"name": "add", "arguments": {"a": 1, "b": null}}'
    said = [("human", "1 + 1?"), ("function_call", call), ("observation", "It is 2."), ("gpt", "2")]
    turns = [{"from": name, "value": value} for name, value in said]
    assert texts(read(lines(tmp_path / "b.jsonl", {"conversations": turns, "tools": TOOLS})))[0][1] == trained


@pytest.mark.parametrize(
    ("row", "said"),
    [
        ("{", "line 2: Expecting property name"),
        ("[1]", r"line 2: \[1\] is no JSON object"),
        ({"mesages": []}, "no field messages, .* or completion; it has mesages"),
        ({"messages": "x"}, "'messages' is a text, and no JSON"),
        ({"messages": {}}, "'messages' is {}; a list of objects is needed"),
        ({"messages": [ASK]}, "no message is the assistant's"),
        ({"messages": [ASK, {"role": "assistant", "content": " "}]}, "message 2: an empty turn of the assistant's"),
        (
            {"messages": [ASK, {"role": "assistant", "content": "", "reasoning_content": "Hm."}]},
            "message 2: a turn that only thinks",
        ),
        ({"messages": [SAY]}, "message 1: an assistant's turn at the beginning"),
        ({"messages": [ASK, SAY, SAY]}, "message 3: an assistant's turn behind another"),
        ({"messages": [ASK, ASK, SAY]}, "message 2: a user's message behind another"),
        ({"messages": [ASK, SAY, {"role": "system", "content": "?"}]}, "message 3: a system message behind one of"),
        ({"messages": [ASK, {"role": "tool", "content": "2"}, SAY]}, "message 2: a tool answers, and no call"),
        ({"messages": [ASK, SAY, {"role": "tool", "content": "2"}]}, "message 3: a tool answers, and no call"),
        (
            {"messages": [ASK, CALLS, {"role": "tool", "content": "2", "tool_call_id": "c2"}]},
            "message 3: it answers the call 'c2'; open are 'c1'",
        ),
        ({"messages": [ASK, {"role": "asistant", "content": "2"}]}, "the role is 'asistant'. Did you mean assistant"),
        ({"messages": [ASK, {"role": "assistant", "content": 2}]}, "message 2: its content is 2; a text is needed"),
        ({"messages": [{"role": "user", "content": [{"type": "image_url"}]}, SAY]}, "content has parts .'image_url'"),
        (
            {"messages": [ASK, {"role": "assistant", "tool_calls": [{"function": {"name": "add", "arguments": "{"}}]}]},
            "'arguments' is a text, and no JSON",
        ),
        ({"messages": [ASK, {**SAY, "weight": 0.5}]}, "message 2: the weight is 0.5; it is 0 or 1"),
        ({"messages": [ASK, {**SAY, "weight": 0}]}, "none of the assistant's turns is trained"),
        ({"messages": [ASK, SAY], "reward": "good"}, "its reward is 'good'"),
        ({"messages": [ASK, SAY], "reward": 10**400}, "its reward is 1000"),
        ({"messages": [ASK, SAY], "tools": [{"function": 3}]}, "its tool {'function': 3} names no function"),
        ({"messages": [ASK, SAY], "system": {"a": 1}}, "its content is {'a': 1}; a text is needed"),
        ({"messages": [{"role": "system", "content": "?"}, ASK, SAY], "system": "!"}, "message 1: a system message"),
        ({"messages": [ASK, {"role": "assistant", "content": " "}], "system": "!"}, "message 2: an empty turn"),
        ('{"text": "\\ud800"}', r"line 2: it holds .ud800, half of a character"),
        ({"prompt": "1 + 1?", "chosen": "2", "rejected": "3"}, "for objective=preference"),
        ({"conversations": [{"from": "humn", "value": "?"}]}, "message 1: it is from 'humn'. Did you mean human"),
        ({"text": " "}, "its text is ' '"),
        ({"messages": [ASK, {**SAY, "content": "2<|im_end|>3"}]}, "spells '<|im_end|>', which ends a turn"),
    ],
)  # fmt: skip
def test_what_is_wrong_is_named(tmp_path: Path, row: Any, said: str) -> None:
    """A row that is learned though it cannot be right, or an error that does not say where."""
    path = lines(tmp_path / "a.jsonl", {"messages": [ASK, SAY]}, row)
    with pytest.raises(CorpusError, match=said.replace("|", r"\|").replace("+", r"\+")) as caught:
        read(path, 1)
    assert f"{path} line 2" in str(caught.value) and caught.value.fault


def test_blank_lines_and_a_mark_are_no_rows(tmp_path: Path) -> None:
    """A file as editors leave it, with a byte order mark, blank lines, no last line break; lines counted otherwise."""
    row = json.dumps({"messages": [ASK, SAY]})
    (tmp_path / "a.jsonl").write_bytes(f"\ufeff{row}\n\n{row}".encode())
    (reader,) = readers_of(CorpusConfig((str(tmp_path / "a.jsonl"),)), Renderer(new_tokenizer()))
    assert len(reader) == 2 and reader.place(1).endswith("line 3")
    assert texts(reader.group(0)) == texts(reader.group(1))


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("none.jsonl", "none.jsonl, which is not there"),
        ("a.csv", "of no kind that is known. Allowed: .jsonl, .parquet, .txt, a run folder"),
        ("folder", "a folder that holds no run"),
        ("empty.jsonl", "holds no line"),
        ("packed.jsonl", r"packed\.jsonl is gzip. Unpack"),
        ("folder.jsonl", r"folder\.jsonl is no regular file"),
    ],
)
def test_sources_that_are_none(tmp_path: Path, name: str, said: str) -> None:
    """A source that is not there, or nothing that can be read, without its name and what would do."""
    (tmp_path / "a.csv").touch()
    (tmp_path / "empty.jsonl").write_text("\n")
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder.jsonl").mkdir()
    (tmp_path / "packed.jsonl").write_bytes(gzip.compress(json.dumps({"messages": [ASK, SAY]}).encode()))
    with pytest.raises(CorpusError, match=said):
        read(tmp_path / name)


def test_several_files_are_one_source(tmp_path: Path) -> None:
    """A pattern's files read in another order, or rows counted into another file."""
    for name in "ba":
        lines(tmp_path / f"{name}.jsonl", *({"messages": [ASK, {**SAY, "content": f"{name}{n}"}]} for n in range(2)))
    (reader,) = readers_of(CorpusConfig((str(tmp_path / "*.jsonl"),)), Renderer(new_tokenizer()))
    assert [texts(reader.group(number))[0][1][:2] for number in range(4)] == ["a0", "a1", "b0", "b1"]
    assert reader.place(2) == f"{tmp_path / 'b.jsonl'} line 1"
    assert held_bytes(CorpusConfig((str(tmp_path / "*.jsonl"),))) == 0  # too small to count


def test_parquet(tmp_path: Path) -> None:
    """A column that is not there is noticed at its first row or never; Arrow's None read as a value; other rows."""
    arrow = pytest.importorskip("pyarrow")
    parquet = pytest.importorskip("pyarrow.parquet")
    calls = [{"id": "c1", "type": "function", "function": {"name": "add", "arguments": '{"a": 1}'}}]
    rows = [
        {"dialogue": [{**ASK, "tool_calls": None}, {**SAY, "tool_calls": None}], "repo": "a", "tools": None},
        {"dialogue": [ASK, {**CALLS, "tool_calls": calls}], "repo": "b", "tools": json.dumps(TOOLS)},
    ]
    parquet.write_table(arrow.Table.from_pylist(rows), tmp_path / "a.parquet")
    names = (("messages", "dialogue"), ("task", "repo"))
    group = read(tmp_path / "a.parquet", 0, fields=names)
    assert texts(group)[0][1] == "2<|im_end|>" and group.prompt.record["task"] == "a"
    assert "add" in texts(read(tmp_path / "a.parquet", 1, fields=names))[0][1]
    with pytest.raises(
        CorpusError, match=r"a\.parquet: no column 'dialog' \(corpus\.fields: messages\)\. Did you mean"
    ):
        read(tmp_path / "a.parquet", 0, fields=(("messages", "dialog"),))
    with pytest.raises(CorpusError, match=r"no column messages, .* or completion; it has dialogue, repo, tools"):
        read(tmp_path / "a.parquet")
    parquet.write_table(arrow.Table.from_pylist(rows).slice(0, 0), tmp_path / "none.parquet")
    with pytest.raises(CorpusError, match=r"none\.parquet holds no row"):
        read(tmp_path / "none.parquet", fields=names)
    (tmp_path / "b.parquet").write_text("no")
    with pytest.raises(CorpusError, match=r"b\.parquet cannot be read as Parquet"):
        read(tmp_path / "b.parquet")


def test_settings_that_do_not_fit() -> None:
    """A setting of a corpus that nobody names, or weights that are of other sources."""
    for given, said in (
        ({"heldout_tasks": 4}, "corpus.heldout_tasks is set, and corpus.sources is empty"),
        ({"sources": ("a", "b"), "weights": (1.0,)}, "corpus.weights has 1 numbers and corpus.sources 2 names"),
        ({"sources": ("a",), "max_tokens": 1}, "corpus.max_tokens is 1"),
        ({"sources": ("a", "a")}, "corpus.sources names one twice"),
        ({"sources": ("a",), "fields": (("mesages", "x"),)}, "corpus.fields names 'mesages'. Did you mean messages"),
    ):
        with pytest.raises(ConfigError, match=said.replace(".", r"\.")):
            CorpusConfig(**given)


def test_prompts_and_completions(tmp_path: Path) -> None:
    """TRL's prompt and completion, or GSM8K's question and answer, not learned from; an answer that was rated bad, or
    a turn of the prompt's, that is trained."""
    wanted = texts(read(lines(tmp_path / "a.jsonl", {"messages": [ASK, SAY], "system": "Add."})))
    told = {"prompt": "1 + 1?", "completion": "2", "system": "Add."}
    assert texts(read(lines(tmp_path / "b.jsonl", told))) == wanted
    assert texts(read(lines(tmp_path / "c.jsonl", told | {"prompt": [ASK], "completion": [SAY]}))) == wanted
    gsm8k = lines(tmp_path / "d.jsonl", {"question": "1 + 1?", "answer": "2", "system": "Add."})
    assert texts(read(gsm8k, fields=(("prompt", "question"), ("completion", "answer")))) == wanted
    with pytest.raises(CorpusError, match=r"fields=prompt=question,completion=answer; .*task\.environment=jsonl"):
        read(gsm8k)
    long = read(lines(tmp_path / "e.jsonl", told | {"prompt": [ASK, SAY, {"role": "user", "content": "3?"}]}))
    assert [trained for _, trained in texts(long)] == ["2<|im_end|>"] and texts(long)[0][0].count("2<|im_end|>") == 2
    for more, said in (({"label": False}, "answers that are compared"), ({"prompt": None}, "half of a chat")):
        with pytest.raises(CorpusError, match=said):
            read(lines(tmp_path / "f.jsonl", told | {"rejected": None} | more, told))


def test_rows_of_too_low_a_reward(tmp_path: Path) -> None:
    """corpus.reward_at_least is not heard for a file, its rows go away without a count, or the places move."""
    chats = [{"messages": [ASK, SAY], "score": score} for score in (0.2, 1, 0.5)]
    path = lines(tmp_path / "a.jsonl", *chats, {"messages": [ASK, SAY]}, "{")
    asked: dict[str, Any] = {"reward_at_least": 0.5, "fields": (("reward", "score"),)}
    (found,) = readers_of(CorpusConfig((str(path),), **asked), Renderer(new_tokenizer()))
    assert found.left_out == {"of a reward below 0.5": 1} and len(found) == 4
    assert [found.group(number).trajectories[0].reward for number in range(2)] == [1, 0.5]
    assert found.place(0) == f"{path} line 2"
    with pytest.raises(CorpusError, match=r"line 4: corpus\.reward_at_least is 0\.5, and the row has no score"):
        found.group(2)
    with pytest.raises(CorpusError, match="line 5: Expecting"):
        found.group(3)
    (whole,) = readers_of(CorpusConfig((str(path),), fields=asked["fields"]), Renderer(new_tokenizer()))
    assert len(whole) == 5 and whole.digest != found.digest
