"""Turns to a trajectory: flattened exactly as sampled."""

from __future__ import annotations

from collections.abc import Sequence

from tandem.types import Failure, Trajectory, Turn


def flatten(
    program_id: str,
    prompt_id: str,
    prompt_tokens: Sequence[int],
    turns: Sequence[Turn],
    outcome: float | Failure,
) -> Trajectory:
    """One trajectory of T = prompt + completions + observations tokens, in the order they entered the context.

    Only completion tokens are in the loss mask; each keeps its behaviour log-prob (nats) and the weight step of the
    version span that covers it. `outcome` is the total reward, or why there is none. Where some turn was sampled with
    filters, each of its tokens keeps its kept set and unfiltered log-prob; other turns have b"" and their log-probs.

    >>> from tandem.types import Completion, StopReason, VersionSpan
    >>> said = Completion("r", (7, 2), (-0.3, -0.1), (VersionSpan(4, 0, 2),), StopReason.STOP_TOKEN)
    >>> flatten("p/0/0", "p", (1,), (Turn(said, (9,)),), 1.0).versions
    (-1, 4, 4, -1)
    """
    tokens: list[int] = list(prompt_tokens)
    loss_mask = [False] * len(tokens)
    logprobs = [0.0] * len(tokens)
    versions = [-1] * len(tokens)
    kept = [b""] * len(tokens)
    unfiltered = [0.0] * len(tokens)
    for turn in turns:
        completion, observed = turn.completion, turn.observation_tokens
        kept += completion.kept or [b""] * len(completion.tokens)
        unfiltered += completion.unfiltered_logprobs or completion.logprobs
        tokens += completion.tokens
        loss_mask += [True] * len(completion.tokens)
        logprobs += completion.logprobs
        for span in completion.versions:
            assert len(versions) + span.end - span.start <= len(tokens), (completion.request_id, completion.versions)
            versions += [span.step] * (span.end - span.start)
        tokens += observed
        loss_mask += [False] * len(observed)
        logprobs += [0.0] * len(observed)
        versions += [-1] * len(observed)
        kept += [b""] * len(observed)
        unfiltered += [0.0] * len(observed)
        assert len(tokens) == len(logprobs) == len(versions), (completion.request_id, completion.versions)
        assert len(tokens) == len(kept) == len(unfiltered), (completion.request_id, len(completion.kept))
    filtered = any(turn.completion.kept for turn in turns)
    return Trajectory(
        program_id,
        prompt_id,
        tuple(tokens),
        tuple(loss_mask),
        tuple(logprobs),
        tuple(versions),
        reward=0.0 if isinstance(outcome, Failure) else outcome,
        stop_reason=turns[-1].completion.stop_reason if turns else None,
        failure=outcome if isinstance(outcome, Failure) else None,
        kept=tuple(kept) if filtered else (),
        unfiltered_logprobs=tuple(unfiltered) if filtered else (),
        seconds=sum(turn.completion.finished_s - turn.completion.submitted_s for turn in turns),
        tool_calls=sum(bool(turn.observation_tokens) for turn in turns),
    )
