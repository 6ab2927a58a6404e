"""Siblings of one prompt that end as soon as they have begun."""

from __future__ import annotations

import pytest

from tests.null.paged_memory import Device, PagedMemory, check, group, make


@pytest.mark.parametrize("length", [3, 8, 9, 15])
@pytest.mark.parametrize("memory", [PagedMemory, Device])
def test_many_with_one_prompt_and_one_token_start_together(length: int, memory: type[PagedMemory]) -> None:
    """One of them a step: the end of the prompt is promised by each, though the first one left it behind."""
    engine, runner = make(100, memory=memory, batch_tokens=32, max_sequences=16)
    requests = group("g", list(range(length)), 200, 1, stop=())
    for request in requests:
        engine.submit(request)
    done = []
    while engine.has_work:
        done += engine.step()
    by_id = {request.id: request for request in requests}
    for completion in done:
        check(completion, by_id[completion.request_id], runner)
    assert len(done) == 200
    steps = 2 if memory is Device else 1  # of each: the device's next is planned before the last is over
    assert engine.stats.batches <= steps * 200 / 16 + 4, engine.stats
    assert runner.prompt_tokens_run == length + 199, "the last token of each, and the rest of the prompt once"
