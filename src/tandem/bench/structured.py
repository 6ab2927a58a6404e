"""`bench structured`: what a step costs whose answers are held to a form, beside the same requests without one."""

from __future__ import annotations

import json
import statistics
import time
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from tandem.bench.work import build_engine
from tandem.types import Constraint, Request, Sampling

if TYPE_CHECKING:
    from tandem.engine.engine import Engine

SEQUENCES, NEW, REPEATS = (1, 16, 64), 64, 3
TEXT = {"type": "object", "properties": {"a": {"type": "string", "minLength": 2000}}, "required": ["a"]}
LIST = {"type": "array", "minItems": 2000, "items": {"type": "object", "properties": {"n": {"type": "number"}}}}
FORMS = {  # none ends before NEW tokens; top-p has no form, and is drawn from whole rows of logits as these are
    "top-p": None,
    "a string": Constraint("json_schema", json.dumps(TEXT)),
    "numbers by key": Constraint("json_schema", json.dumps(LIST)),
    "[a-z ]{2000}": Constraint("regex", "[a-z ]{2000}"),
}


def structured() -> dict[str, Any]:
    """Rows: seconds a token of each sequence (a step) with and without, their ratio, what of it the masks took."""
    parts = build_engine()
    engine, stops = parts.engine, parts.tokenizer.stop_token_ids
    rows = []
    for count in SEQUENCES:
        for name, constraint in FORMS.items():
            plain = Sampling(max_new_tokens=NEW)
            held = replace(plain, top_p=0.9) if constraint is None else replace(plain, stop_token_ids=stops)
            asked = [
                [_request(i, sampling, form) for i in range(count)]
                for sampling, form in ((plain, None), (held, constraint))
            ]
            took = [[_timed(engine, requests) for requests in asked] for _ in range(REPEATS + 1)][
                1:
            ]  # the first warms up
            (plain_s, _), (held_s, masks_s) = (
                map(statistics.median, zip(*side, strict=True)) for side in zip(*took, strict=True)
            )
            found = {"form": name, "sequences": count, "plain_s": plain_s, "held_s": held_s}
            rows.append(found | {"ratio": held_s / plain_s, "mask_s": masks_s / count})
    return {"bench": "structured", "rows": rows}


def _request(number: int, sampling: Sampling, constraint: Constraint | None) -> Request:
    tokens = tuple((number * 7919 + 31 * place) % 40_000 + 200 for place in range(32))
    return Request(f"r{number}", f"r{number}", tokens, sampling, seed=number, constraint=constraint)


def _timed(engine: Engine, requests: list[Request]) -> tuple[float, float]:
    """Seconds a step, and of them those in which masks were made."""
    grammars, masks_s = engine.grammars, 0.0
    assert grammars is not None
    fill = grammars.fill

    def timed(*given: Any) -> None:
        nonlocal masks_s
        began_s = time.perf_counter()
        fill(*given)
        masks_s += time.perf_counter() - began_s

    grammars.fill = timed  # type: ignore[method-assign, assignment]
    try:
        began_s = time.perf_counter()
        done = engine.generate(requests)
        spent_s = time.perf_counter() - began_s
    finally:
        grammars.fill = fill  # type: ignore[method-assign]
    assert all(len(one.tokens) == NEW for one in done), [(one.stop_reason, one.failure) for one in done]
    return spent_s / NEW, masks_s / NEW
