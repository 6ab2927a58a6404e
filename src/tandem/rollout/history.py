"""`rollout.history=render`: a conversation rendered anew after each observation, and checked to go on from its tokens.

Where it does, the new tokens are appended as ever. Where a template writes the past otherwise (reasoning of past turns
left out, arguments in another order, a text in other pieces), what was sampled stays a segment of its own, and the next
begins with the rendered tokens, as the model will see them where it is served. Nothing sampled is ever replaced.
"""

from __future__ import annotations

from collections.abc import Sequence

from tandem.program.render import Renderer
from tandem.types import Message


def split_cause(
    renderer: Renderer, context: Sequence[int], whole: Sequence[int], starts: Sequence[int], said: Sequence[Message]
) -> str:
    """Why `whole`, the conversation rendered anew, does not go on from `context`; "" where it does.

    `starts`: where in the context each of the assistant's messages `said` begins. "reasoning": a turn's is gone;
    "tokens": the same text in other tokens; "calls", "content": the turn that changed has calls or none; "prompt":
    what stood before the first turn.
    """
    if tuple(whole[: len(context)]) == tuple(context):
        return ""
    before, after = renderer.tokenizer.decode(context), renderer.tokenizer.decode(whole)
    thoughts = [str(message.more.get("reasoning_content", "")) for message in said]
    if any(after.count(thought) < before.count(thought) for thought in thoughts if thought):
        return "reasoning"
    if after.startswith(before):
        return "tokens"
    pairs = enumerate(zip(context, whole, strict=False))
    place = next((at for at, (old, new) in pairs if old != new), min(len(context), len(whole)))
    turn = sum(start <= place for start in starts) - 1
    if turn < 0:
        return "prompt"
    return "calls" if said[turn].calls else "content"
