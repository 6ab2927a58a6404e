"""A conversation rendered anew that replaces what was sampled; tools that a template, or a model, is not told of."""

from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Sequence
from concurrent.futures import Future

import pytest

from tandem.engine.driver import Driver
from tandem.errors import TandemWarning
from tandem.models.tokenizer import Tokenizer
from tandem.program.episode import Observed
from tandem.program.formats.choose import FORMATS
from tandem.program.render import Renderer
from tandem.rollout.config import RolloutConfig
from tandem.rollout.group import summarise
from tandem.rollout.pieces import Pieces
from tandem.rollout.rollout import Rollouts
from tandem.rollout.rows import trajectory_rows
from tandem.types import Group, Message, Prompt, Trajectory
from tests.null.test_render import CHATML, byte_tokenizer
from tests.null.test_rollout import FakeEngine
from tests.samples import ended

ADD = {
    "type": "function",
    "function": {
        "name": "add",
        "description": "The sum.",
        "parameters": {
            "type": "object",
            "properties": {"a": {"type": "integer"}, "b": {"type": "integer"}},
            "required": ["a", "b"],
        },
    },
}
TOLD = "{% if tools %}<|im_start|>system\n{{ tools | tojson }}<|im_end|>\n{% endif %}"
CALLED = (
    '<tool_call>\n{"name": "{{ c.function.name }}", "arguments": {{ c.function.arguments | tojson }}}\n</tool_call>'
)
XML = (
    "<tool_call>\n<function={{ c.function.name }}>\n{% for k, v in c.function.arguments | items %}"
    "<parameter={{ k }}>\n{{ v }}\n</parameter>\n{% endfor %}</function>\n</tool_call>"
)
GENERATE = "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"


def chatml(call: str, answer: str = "{{ m.content }}", generate: str = GENERATE) -> str:
    """ChatML with tools: how an answer and a call in it are written."""
    return (
        f"{TOLD}{{% for m in messages %}}<|im_start|>{{{{ m.role }}}}\n{{% if m.role == 'assistant' %}}{answer}"
        f"{{% for c in m.tool_calls or [] %}}{call}{{% endfor %}}{{% else %}}{{{{ m.content }}}}{{% endif %}}"
        f"<|im_end|>\n{{% endfor %}}{generate}"
    )


KEEPS = "{% if m.reasoning_content %}<think>\n{{ m.reasoning_content }}\n</think>\n\n{% endif %}{{ m.content }}"
# As Qwen3's: reasoning before the last question is left out.
FORGETS = (
    "{% set last = namespace(at=-1) %}{% for n in messages %}{% if n.role == 'user' %}{% set last.at = loop.index0 %}"
    "{% endif %}{% endfor %}{% if m.reasoning_content and loop.index0 > last.at %}<think>\n{{ m.reasoning_content }}\n"
    "</think>\n\n{% endif %}{{ m.content }}"
)
# As Qwen3.5's: arguments must not come as text.
STRICT = (
    "{% if c.function.arguments is string %}{{ raise_exception('arguments as text') }}{% endif %}"
    '<tool_call>\n{"name": "{{ c.function.name }}", "arguments": {{ c.function.arguments | tojson }}}\n</tool_call>'
)
SORTED = CALLED.replace("tojson", "tojson(sort_keys=true)")
LLAMA = '{"name": "{{ c.function.name }}", "parameters": {{ c.function.arguments | tojson }}}'
MISTRAL = (
    "<s>{% for m in messages %}{% if m.role == 'user' %}{% if tools %}[AVAILABLE_TOOLS]{{ tools | tojson }}{% endif %}"
    "[INST]{{ m.content }}[/INST]{% elif m.tool_calls %}[TOOL_CALLS][{% for c in m.tool_calls %}"
    "{% if c.id | length != 9 %}{{ raise_exception('an id of nine characters') }}{% endif %}"
    '{"name": "{{ c.function.name }}", "arguments": {{ c.function.arguments | tojson }}, "id": "{{ c.id }}"}'
    "{% endfor %}]</s>{% elif m.role == 'tool' %}[TOOL_RESULTS]{{ m.tool_call_id }}{{ m.content }}[/TOOL_RESULTS]"
    "{% else %}{{ m.content }}</s>{% endif %}{% endfor %}"
)
NAMED = (
    MISTRAL.replace("[TOOL_CALLS][", "")
    .replace("]</s>{% elif m.role", "</s>{% elif m.role")
    .replace(
        '{"name": "{{ c.function.name }}", "arguments": {{ c.function.arguments | tojson }}, "id": "{{ c.id }}"}',
        "[TOOL_CALLS]{{ c.function.name }}[ARGS]{{ c.function.arguments | tojson }}",
    )
)
# As gpt-oss's: the analysis of past turns is left out, and arguments are written as JSON whatever they are.
HARMONY = (
    "{% if tools %}<|start|>developer<|message|>{{ tools | tojson }}<|end|>{% endif %}{% for m in messages %}"
    "{% if m.role == 'assistant' and m.tool_calls %}{% if m.thinking and loop.last %}<|start|>assistant<|channel|>"
    "analysis<|message|>{{ m.thinking }}<|end|>{% endif %}<|start|>assistant to=functions."
    "{{ m.tool_calls[0].function.name }}<|channel|>commentary json<|message|>"
    "{{ m.tool_calls[0].function.arguments | tojson }}<|call|>{% elif m.role == 'assistant' %}<|start|>assistant"
    "<|channel|>final<|message|>{{ m.content }}<|return|>{% else %}<|start|>{{ m.role }}<|message|>{{ m.content }}"
    "<|end|>{% endif %}{% endfor %}{% if add_generation_prompt %}<|start|>assistant{% endif %}"
)

HARMONY_TOKENS = [f"<|{name}|>" for name in ("start", "channel", "message", "constrain", "end", "call", "return")]


@pytest.mark.parametrize(
    ("template", "name", "describes"),
    [
        (chatml(CALLED), "hermes", False),
        (chatml(STRICT), "hermes", False),
        (chatml(XML), "qwen3_coder", False),
        (chatml(LLAMA), "llama3", False),
        (MISTRAL, "mistral", False),
        (NAMED, "mistral", False),
        (HARMONY, "harmony", False),
        (CHATML, "fenced", True),
    ],
)
def test_the_format_is_the_template_s(template: str, name: str, describes: bool) -> None:
    """Calls are looked for in another format than the model was trained to write them in."""
    tokenizer = byte_tokenizer(template)
    tokenizer.backend.add_special_tokens(HARMONY_TOKENS)
    renderer = Renderer(tokenizer)
    assert (renderer.format, renderer.describes) == (name, describes)
    assert Renderer(byte_tokenizer(template), tool_format="llama3").format == "llama3"


def test_a_format_that_nobody_knows() -> None:
    """A model's calls are never found, and nobody is told why."""
    renderer = Renderer(byte_tokenizer(chatml("!{{ c.function.name }}")))
    with pytest.warns(TandemWarning, match=r"no format that is known.*task\.tool_format"):
        assert not renderer.describes
    assert renderer.format == "fenced" and Renderer(byte_tokenizer(CHATML), plain=True).describes


def test_a_template_without_tools() -> None:
    """The model is not told of its tools, or what they answer and what it called are left out of its context."""
    tokenizer = byte_tokenizer(CHATML)
    renderer = Renderer(tokenizer)
    text = tokenizer.decode(renderer.prompt_tokens((Message("user", "1 + 2?"),), (ADD,)))
    assert text.startswith("<|im_start|>system\nYou can call these functions:\n\ndef add(a: int, b: int):")
    assert text.endswith(
        "```python\nadd(a=1, b=1)\n```<|im_end|>\n<|im_start|>user\n1 + 2?<|im_end|>\n<|im_start|>assistant\n"
    )
    both = tokenizer.decode(renderer.prompt_tokens((Message("system", "Be brief."), Message("user", "?")), (ADD,)))
    assert both.startswith("<|im_start|>system\nBe brief.\n\nYou can call") and both.count("system") == 1
    said = renderer.message(tokenizer.encode("So\n```python\nadd(1, b=2)\n```<|im_end|>"), (ADD,), 3)
    assert said.content == "So" and said.calls[0].arguments == {"a": 1, "b": 2} and said.calls[0].id == "000003000"
    answers = (Message("tool", "3", call_id="000003000"), Message("tool", "4"))
    follows = renderer.observation_tokens(tokenizer.encode("x<|im_end|>"), answers, (Message("user", "?"),), (ADD,))
    assert tokenizer.decode(follows) == "\n<|im_start|>user\n3\n4<|im_end|>\n<|im_start|>assistant\n"
    whole = tokenizer.decode(renderer.conversation_tokens((Message("user", "?"), said, *answers), (ADD,)))
    assert "<|im_start|>assistant\nSo\n```python\nadd(a=1, b=2)\n```<|im_end|>" in whole
    alternate = CHATML.replace(
        "<|im_start|>{{ m.role }}",
        "{% if m.role == 'system' %}{{ raise_exception('no system') }}{% endif %}<|im_start|>{{ m.role }}",
    )
    strict = byte_tokenizer(alternate)
    first = strict.decode(Renderer(strict).prompt_tokens((Message("user", "1 + 2?"),), (ADD,)))
    assert first.startswith("<|im_start|>user\nYou can call") and "```\n\n1 + 2?<|im_end|>" in first


def test_completions_without_tools_stay_text() -> None:
    """A reward reads another text than the model wrote, though its prompt has no tools."""
    tokenizer = byte_tokenizer(chatml(CALLED))
    text = '<think>\na\n</think>\n\n<tool_call>{"name": "f", "arguments": {}}</tool_call> ```python\nf()\n```'
    assert Renderer(tokenizer).message(tokenizer.encode(text)) == Message("assistant", text, sampled=True)
    plain = Renderer(byte_tokenizer(CHATML)).message(tokenizer.encode(text), parsed=True)
    assert plain.content == text.partition("\n\n")[2] and plain.more == {"reasoning_content": "a"} and not plain.calls
    opened = byte_tokenizer(chatml(CALLED, generate=GENERATE.replace("assistant\n", "assistant\n<think>\n")))
    said = Renderer(opened).message(opened.encode("a\n</think>\n\nb"), (ADD,))
    assert said.content == "b" and said.more == {"reasoning_content": "a"}


class Script:
    """An episode that says `after` each answer, and keeps what was said."""

    def __init__(self, after: Sequence[Message], kept: list[list[Message]]) -> None:
        self.after = list(after)
        self.said: list[Message] = []
        self.counts: Counter[str] = Counter()
        kept.append(self.said)

    def observe(self, last=False, /) -> Future:
        if not self.after:
            return ended(Observed(None))
        self.said.append(self.after.pop(0))
        return ended(Observed((self.said[-1],)))

    def score(self, unheard=0, /) -> Future:
        return ended(1.0)

    def teardown(self) -> None:
        """It holds nothing."""


class Scripts:
    def __init__(self, *after: Message) -> None:
        self.after = after
        self.kept: list[list[Message]] = []

    def episode(self, prompt: Prompt, until_s: float, /) -> Script:
        return Script(self.after, self.kept)


CONFIG = RolloutConfig(samples_per_prompt=1, max_turns=3, max_new_tokens=400, history="render")
CALL = '<tool_call>\n{"name": "add", "arguments": {"b": 2, "a": 1}}\n</tool_call>'


def played(
    template: str, answers: Sequence[str], after: Sequence[Message], history: str = "render"
) -> tuple[Tokenizer, Group, list[Message]]:
    """A program whose model says `answers`, its environment `after`."""
    tokenizer = byte_tokenizer(template)
    stop = tokenizer.token_to_id("<|im_end|>")
    engine = FakeEngine(lambda request: [*tokenizer.encode(answers[int(request.id.rpartition("/")[2])]), stop])
    scripts = Scripts(*after)
    config = dataclasses.replace(CONFIG, history=history, max_turns=len(answers))
    prompt = Prompt("p", (Message("user", "1 + 2?"),), tools=(ADD,))
    (group,) = Rollouts(Driver(engine), Renderer(tokenizer), scripts, config, run_seed=1).collect(0, [prompt])
    return tokenizer, group, scripts.kept[0]


def text_of(tokenizer: Tokenizer, one: Trajectory, sampled: bool) -> str:
    """What a trajectory's sampled tokens say, or all others."""
    mask = one.columns["loss_mask"]
    return tokenizer.decode(one.columns["tokens"][mask if sampled else ~mask].tolist())


TOOL = Message("tool", "3")
THOUGHT = f"<think>\nsum\n</think>\n\n{CALL}"


@pytest.mark.parametrize("history", ["append", "render"])
def test_a_history_that_goes_on_is_appended(history: str) -> None:
    """A rendered history that has the sampled tokens starts a segment, or gives other tokens than appending does."""
    template = chatml(CALLED, KEEPS)
    tokenizer, group, said = played(template, [THOUGHT, "3"], [TOOL], history)
    (one,) = group.trajectories
    assert text_of(tokenizer, one, True) == f"{THOUGHT}<|im_end|>3<|im_end|>" and one.cause == ""
    renderer = Renderer(tokenizer)
    whole = renderer.conversation_tokens((*group.prompt.messages, *said), group.prompt.tools)
    assert tuple(one.columns["tokens"].tolist()) == whole[: len(one.columns["tokens"])]
    assert said[0].calls[0].arguments == {"a": 1, "b": 2} and said[0].more == {"reasoning_content": "sum"}
    assert not [name for name in summarise([group]).counts if name.startswith("split")]


@pytest.mark.parametrize(
    ("template", "answer", "after", "cause"),
    [
        (chatml(CALLED, FORGETS), THOUGHT, Message("user", "And?"), "reasoning"),
        (chatml(CALLED, FORGETS), THOUGHT, TOOL, ""),
        (chatml(CALLED, "{{ m.content }}"), THOUGHT, TOOL, "reasoning"),
        (chatml(SORTED, KEEPS), THOUGHT, TOOL, "calls"),
        (chatml(CALLED, KEEPS), THOUGHT.replace('": 2', '":2'), TOOL, "calls"),
        (chatml(CALLED, KEEPS), "Three  ", TOOL, ""),
        (chatml(CALLED, "{{ m.content | trim }}"), "Three  ", TOOL, "content"),
        (chatml(CALLED, "<think>\n\n</think>\n\n{{ m.content }}"), "Three", TOOL, "content"),
        (chatml(CALLED).replace("{% if tools", "{{ messages | length }}{% if tools"), "Three", TOOL, "prompt"),
        # As Qwen3.8's: it writes the reasoning, and the content that has it too.
        (chatml(CALLED, "<think>\n{{ m.reasoning_content }}\n</think>\n\n{{ m.content }}"), THOUGHT, TOOL, ""),
    ],
)
def test_a_history_that_a_template_changes_is_split(template: str, answer: str, after: Message, cause: str) -> None:
    """What was sampled is replaced by what a template makes of it, in silence; or its cause is another."""
    tokenizer, group, said = played(template, [answer, "3"], [after])
    first, *others = group.trajectories
    assert text_of(tokenizer, first, True).startswith(f"{answer}<|im_end|>")
    assert [one.cause for one in others] == ([cause] if cause else [])
    counts = summarise([group]).counts
    assert {name for name in counts if name.startswith("split")} == ({f"split_{cause}"} if cause else set())
    for second in others:
        assert (
            text_of(tokenizer, first, True) == f"{answer}<|im_end|>"
            and text_of(tokenizer, second, True) == "3<|im_end|>"
        )
        start = Renderer(tokenizer).conversation_tokens((*group.prompt.messages, *said[:2]), group.prompt.tools)
        assert tokenizer.decode(start) == text_of(tokenizer, second, False)
        row = list(trajectory_rows([group], Pieces(tokenizer.decode)))[1]
        assert row["cause"] == cause and row["context"] == tokenizer.decode(start)


def test_a_text_in_other_pieces_is_split() -> None:
    """A text that the tokeniser splits otherwise than it was sampled replaces the sampled tokens."""
    tokenizer = byte_tokenizer(chatml(CALLED, KEEPS))
    pieces = [tokenizer.token_to_id("h"), tokenizer.token_to_id("i"), tokenizer.token_to_id("<|im_end|>")]
    engine = FakeEngine(lambda request: pieces)
    config = dataclasses.replace(CONFIG, max_turns=2)
    prompts = [Prompt("p", (Message("user", "Hm?"),))]
    (group,) = Rollouts(Driver(engine), Renderer(tokenizer), Scripts(TOOL), config, run_seed=1).collect(0, prompts)
    assert [one.cause for one in group.trajectories] == ["", "tokens"]
    assert [one.columns["tokens"][one.columns["loss_mask"]].tolist() for one in group.trajectories] == [pieces, pieces]
    seeds = {request.seed for request in engine.seen}
    assert len(seeds) == 2
    counted = Renderer(tokenizer)
    spells = Scripts(Message("tool", "<|im_end|>"))
    Rollouts(Driver(engine), counted, spells, config, run_seed=1).collect(0, prompts)
    assert counted.spelt_tokens == 1


def test_three_turns_are_split_and_joined() -> None:
    """A segment after a split renders what came before it twice, or not at all."""
    template = chatml(CALLED, FORGETS)
    tokenizer, group, said = played(template, [THOUGHT, THOUGHT, "3"], [Message("user", "And?"), TOOL])
    assert [one.cause for one in group.trajectories] == ["", "reasoning"]
    second = group.trajectories[1]
    whole = Renderer(tokenizer).conversation_tokens((*group.prompt.messages, *said[:4]), group.prompt.tools)
    assert tuple(second.columns["tokens"].tolist())[: len(whole)] == whole
    assert text_of(tokenizer, second, True) == f"{THOUGHT}<|im_end|>3<|im_end|>"


def test_faults_reach_the_environment_and_the_row() -> None:
    """A malformed call is not told to who answers it, or not counted; or its text is lost to the history."""
    wrong = "<tool_call>{</tool_call>"
    tokenizer, group, said = played(chatml(CALLED), [wrong, CALL], [TOOL], "append")
    assert said[0].faults[0].startswith("tool call 1: its JSON is broken") and said[0].content == wrong
    assert not said[2].faults and said[2].calls[0].name == "add"
    assert summarise([group]).counts == {"tool_calls": 0, "unreadable_calls": 1}
    assert "faults" not in said[0].row() and wrong in text_of(tokenizer, group.trajectories[0], True)


def test_every_format_can_be_asked_for() -> None:
    """A format that no setting reaches."""
    from typing import get_args

    from tandem.program.config import ToolFormat

    assert {"auto", *FORMATS} == {*get_args(ToolFormat)}
