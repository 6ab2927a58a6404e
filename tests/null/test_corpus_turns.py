"""A conversation as tokens: the mask, the template's ways, and lengths."""

from __future__ import annotations

import pytest

from tandem.columns import Columns
from tandem.corpus.config import CorpusConfig
from tandem.corpus.lengths import at_turns, fitted, windows
from tandem.corpus.turns import Trained, check_rendered, chosen, spoken
from tandem.errors import CorpusError
from tandem.models.tokenizer import Tokenizer
from tandem.program.render import Renderer
from tandem.types import Group, Message, Prompt, ToolCall, Trajectory
from tests.null.test_render import AMNESIC, BARE, CHATML, FORGETFUL, INSTRUCT, byte_tokenizer

THINKS = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n"
    "{% if m.role == 'assistant' and m.reasoning_content and loop.last %}"
    "<think>\n{{ m.reasoning_content }}\n</think>\n\n{% endif %}"
    "{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n<think>\n{% endif %}"
)
DEAF = (
    "{% for m in messages if m.role != 'tool' %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
TWO = (
    Message("system", "Be brief."),
    Message("user", "Say hi."),
    Message("assistant", "hi"),
    Message("user", "And?"),
    Message("assistant", "ho hi"),
)
BOTH = Trained(frozenset({2, 4}))


def renderer(template: str) -> tuple[Renderer, Tokenizer]:
    tokenizer = byte_tokenizer(template)
    return Renderer(tokenizer), tokenizer


def shown(tokenizer: Tokenizer, columns: Columns) -> str:
    """What is trained in brackets."""
    mask, said = columns["loss_mask"].tolist(), ""
    for place, token in enumerate(columns["tokens"].tolist()):
        said += "[" * (mask[place] and not mask[place - 1]) + tokenizer.decode([token])
        said += "]" * (mask[place] and not mask[place + 1 : place + 2] == [True])
    return said


SAID = (
    "<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\nSay hi.<|im_end|>\n<|im_start|>assistant\n"
    "[hi<|im_end|>]\n<|im_start|>user\nAnd?<|im_end|>\n<|im_start|>assistant\n[ho hi<|im_end|>]"
)


@pytest.mark.parametrize(
    ("template", "wanted"),
    [
        (CHATML, SAID),
        (INSTRUCT, "<s>[INST] Be brief. [/INST][INST] Say hi. [/INST][ hi</s>][INST] And? [/INST][ ho hi</s>]"),
    ],
)  # fmt: skip
def test_only_the_assistants_turns_and_their_ends_are_trained(template: str, wanted: str) -> None:
    """A user's or the template's token that is trained; an end of turn that is not; other tokens than the whole's."""
    by, tokenizer = renderer(template)
    (columns,) = spoken(by, TWO, (), BOTH, "here").segments
    assert shown(tokenizer, columns) == wanted
    whole = tokenizer.render_messages(TWO, False)
    assert columns["tokens"].tolist() == whole[: len(columns)]
    (last,) = spoken(by, TWO, (), Trained(frozenset({4})), "here").segments
    assert (
        last["tokens"].tolist() == columns["tokens"].tolist() and last["loss_mask"].sum() < columns["loss_mask"].sum()
    )


def test_a_template_that_rewrites_earlier_turns() -> None:
    """Turns learned behind a history that the model never sees when it is asked for them."""
    by, tokenizer = renderer(FORGETFUL)
    found = spoken(by, TWO, (), BOTH, "here")
    first, second = (shown(tokenizer, columns) for columns in found.segments)
    assert first.endswith("assistant\n[<think></think>HI<|im_end|>]")
    assert second.endswith("assistant\nHI<|im_end|>\n<|im_start|>user\nAND?<|im_end|>\n<|im_start|>assistant\n"
                           "[<think></think>HO HI<|im_end|>]")  # fmt: skip


def test_a_template_that_opens_a_think_block() -> None:
    """Clean losses and broken answers: turns without a think block, on a model that is always asked behind an opened
    one."""
    by, tokenizer = renderer(THINKS)
    found = spoken(by, TWO, (), BOTH, "here")
    first, second = (shown(tokenizer, columns) for columns in found.segments)
    assert first.endswith("assistant\n<think>\n[\n</think>\n\nhi<|im_end|>]") and found.think_blocks == 2
    assert "assistant\nhi<|im_end|>" in second and second.endswith("<think>\n[\n</think>\n\nho hi<|im_end|>]")
    thought = (*TWO[:2], Message("assistant", "hi", more={"reasoning_content": "Greet."}))
    found = spoken(by, thought, (), Trained(frozenset({2})), "here")
    assert shown(tokenizer, found.segments[0]).endswith("<think>\n[Greet.\n</think>\n\nhi<|im_end|>]")
    assert found.think_blocks == 0
    named = (*TWO[:2], Message("assistant", "hi", more={"thinking": "Greet."}))
    assert spoken(by, named, (), Trained(frozenset({2})), "here").segments == found.segments
    within = (*TWO[:2], Message("assistant", "<think>\nGreet.\n</think>\n\nhi"))
    again = spoken(by, within, (), Trained(frozenset({2})), "here")
    assert again.segments == found.segments and again.think_blocks == 0


def test_a_template_that_breaks_turns() -> None:
    """A turn learned behind other tokens than those that ask for it; an error that does not say which message."""
    by, _ = renderer(CHATML.replace("<|im_start|>assistant\n{% endif %}", "<|im_start|>bot\n{% endif %}"))
    with pytest.raises(CorpusError, match=r"here, message 3: the chat template asks for the turn behind '.*bot") as e:
        spoken(by, TWO, (), BOTH, "here")
    assert e.value.fault == "the template breaks it"
    begun = "{{ 'h' if m.role == 'assistant' }}{{ m.content }}"
    by, _ = renderer(CHATML.replace("assistant\n{% endif", "assistant\nh{% endif").replace("{{ m.content }}", begun))
    joined = (*TWO[:2], Message("assistant", "i there"))
    with pytest.raises(CorpusError, match=r"message 3: turn by turn it has other tokens than whole: .* 'i there"):
        spoken(by, joined, (), Trained(frozenset({2})), "here")
    by, _ = renderer("{% for m in messages %}{{ raise_exception('no system') if m.role == 'system' }}{% endfor %}")
    with pytest.raises(CorpusError, match="here: .* no system") as e:
        spoken(by, TWO, (), BOTH, "here")
    assert e.value.fault == "the template refuses it"


def test_no_end_of_turn_is_made_up() -> None:
    """An answer that never ends, where the template writes no stop token behind it."""
    by, tokenizer = renderer(BARE)
    (columns,) = spoken(by, TWO[:3], (), Trained(frozenset({2})), "here").segments
    assert shown(tokenizer, columns).endswith("assistant:[ hi\n</s>]")


def test_what_a_template_drops_is_named() -> None:
    """A tool's answer, or all that an assistant said, that the model never sees: learned from nothing."""
    call = Message("assistant", "", (ToolCall("add", {"a": 1}, "c"),))
    said = (*TWO[:2], call, Message("tool", "2", call_id="c"), Message("assistant", "2"))
    by, _ = renderer(DEAF)
    with pytest.raises(CorpusError, match=r"leaves out its calls, of message 3 \(role assistant\)") as e:
        check_rendered(by, said, (), set(), "here")
    assert e.value.fault == "the template drops assistant"
    plain = (*TWO[:3], Message("tool", "2"), Message("assistant", "2"))
    with pytest.raises(
        CorpusError, match=r"leaves out what it says, of message 4 \(role tool\)\. Give the row its tools"
    ):
        check_rendered(by, plain, (), set(), "here")
    by, _ = renderer(AMNESIC)
    with pytest.raises(CorpusError, match="leaves out what it says, of message 3"):
        check_rendered(by, TWO, (), set(), "here")
    by, _ = renderer(CHATML)
    seen: set[object] = set()
    check_rendered(by, TWO, (), seen, "here")
    assert len(seen) == 3
    thought = (*TWO[:2], Message("assistant", "hi", more={"thinking": "Greet."}), *TWO[3:])
    with pytest.raises(CorpusError, match="leaves out its reasoning, of message 3"):
        check_rendered(by, thought, (), seen, "here")
    check_rendered(renderer(THINKS)[0], thought, (), set(), "here")


def test_which_turns_are_trained() -> None:
    """An error or a repetition that is learned, or the turn before it left out; all turns in place of the last."""
    call = Message("assistant", "", (ToolCall("add", {"a": 1}),))
    other = Message("assistant", "Once more.", (ToolCall("add", {"a": 1}),))
    error, fine = Message("tool", "Error: no b"), Message("tool", "No error: 2")
    said = (TWO[1], call, error, other, fine, Message("assistant", "2"))
    assert chosen(said, CorpusConfig()) == Trained(frozenset({1, 3, 5}))
    marking = CorpusConfig(("a",), error_turns="mark")
    assert chosen(said, marking) == Trained(frozenset({1, 3, 5}), frozenset({1}))
    assert chosen(said, CorpusConfig(("a",), repeated_turns="mark")).marked == {3}
    asked = (*said[:3], TWO[1], *said[3:])  # for the same once more
    assert not chosen(asked, CorpusConfig(("a",), repeated_turns="mark")).marked
    yes = Message("assistant", "Yes.")
    right = (Message("user", "Is 4 even?"), yes, Message("user", "Is 6 even?"), yes)
    assert not chosen(right, CorpusConfig(("a",), repeated_turns="mark")).marked
    assert chosen(said, CorpusConfig(("a",), turns="last")) == Trained(frozenset({5}))
    assert chosen(said, CorpusConfig(), frozenset({3})).turns == {1, 5}
    unread = Message("assistant", "add(", faults=("its JSON is broken",))
    assert chosen((TWO[1], unread, fine, call), marking).marked == {1}
    traced = (TWO[1], call, fine, Message("tool", "Traceback (most recent call last): ..."), Message("assistant", "2"))
    assert chosen(traced, marking).marked == {1}


def conversation(*lengths: int) -> Columns:
    """Read, said, read, said, ...: tokens that count up."""
    mask = [bool(place % 2) for place, length in enumerate(lengths) for _ in range(length)]
    return Columns.of(tokens=range(len(mask)), loss_mask=mask)


def test_long_conversations_are_split_at_turns() -> None:
    """A turn cut in the middle, trained twice or never, or asked without what was said just before it."""
    columns = conversation(4, 3, 2, 3, 2, 3, 2, 5, 2, 3)  # 29 tokens; turns at 4, 9, 14, 19, 26
    pieces, left = at_turns(columns, 16)
    assert left == 0
    trained = [piece["tokens"][piece["loss_mask"]].tolist() for piece in pieces]
    assert sorted(sum(trained, [])) == columns["tokens"][columns["loss_mask"]].tolist()
    assert [piece["tokens"].tolist() for piece in pieces] == [
        [0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11],
        [0, 1, 2, 3, 9, 10, 11, 12, 13, 14, 15, 16],
        [0, 1, 2, 3, 14, 15, 16, 17, 18, 19, 20, 21, 22, 23],
        [0, 1, 2, 3, 19, 20, 21, 22, 23, 24, 25, 26, 27, 28],
    ]
    assert all(len(piece) <= 16 for piece in pieces)
    roomy, _ = at_turns(columns, 28)  # half of 24 for what went before
    assert [piece["tokens"].tolist()[:5] for piece in roomy] == [[0, 1, 2, 3, 4], [0, 1, 2, 3, 14]]
    _, left = at_turns(conversation(4, 3, 2, 30, 2, 3), 16)
    assert left == 2  # the long one, and the one behind it, which would not see what it follows


def test_documents_are_split_anywhere() -> None:
    """A token of a long document that is never trained, or twice."""
    columns = Columns.of(tokens=range(10), loss_mask=[False] + [True] * 9)
    pieces = windows(columns, 4)
    assert [piece["tokens"].tolist() for piece in pieces] == [[0, 1, 2, 3], [3, 4, 5, 6], [6, 7, 8, 9]]
    assert [piece["tokens"][piece["loss_mask"]].tolist() for piece in pieces] == [[1, 2, 3], [4, 5, 6], [7, 8, 9]]


def test_what_is_done_about_length_is_counted() -> None:
    """Sequences beyond the limit, or rows that went away without a count."""
    asked = Prompt("p", (Message("user", "?"),))
    long = Trajectory("p", "p", conversation(4, 3, 2, 3, 2, 3, 9))
    group = Group(asked, (long,))
    whole, counts = fitted(group, 17, "split", "here")
    assert len(whole.trajectories[0].columns) == 17 and not counts  # what follows the last turn is no length
    split, counts = fitted(group, 12, "split", "here")
    assert counts == {"split_rows": 1, "pieces": len(split.trajectories)} and len(split.trajectories) == 2
    assert [one.id for one in split.trajectories] == ["p/0", "p/1"] and split.trajectories[1].cause == "split"
    assert fitted(group, 12, "drop", "here") == (Group(asked, ()), {"long_rows": 1})
    assert fitted(group, 6, "split", "here") == (Group(asked, ()), {"long_turns": 3, "long_rows": 1})
    with pytest.raises(CorpusError, match=r"here: 17 tokens, and 12 are allowed \(corpus\.max_tokens"):
        fitted(group, 12, "stop", "here")
    pair = Group(asked, (long, Trajectory("q", "p", conversation(4, 3))))
    assert fitted(pair, 12, "split", "here") == (Group(asked, ()), {"long_rows": 1})  # to be compared whole
    text = Group(Prompt("d", ()), (Trajectory("d", "d", Columns.of(tokens=range(9), loss_mask=[False] + [True] * 8)),))
    assert fitted(text, 5, "split", "here")[1] == {"split_rows": 1, "pieces": 2}
