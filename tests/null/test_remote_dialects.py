"""Dialects of other engines: a value left to a server, an answer taken in part, or read by another request's rules."""

from __future__ import annotations

import base64
import copy
from array import array
from typing import Any

import pytest

from tandem.run.remote_dialects import SPEECHES, Answer, OddAnswer, columns_of, seed_there, stop_reason
from tandem.types import Constraint, Hints, Request, Sampling, StopReason

PROMPT = (1, 2, 3)
DRAWN = Sampling(temperature=0.7, max_new_tokens=4, stop_token_ids=(9, 7), stop_strings=("END",))
REQUEST = Request("p/0", "program", PROMPT, DRAWN, seed=2**64 - 1, tenant="team", hints=Hints(turns_left=2))

ANSWERS: dict[str, Any] = {  # as each server gives them: tandem's server/generate.py, vLLM 0.32, SGLang 0.5
    "tandem": {
        "output_ids": [5, 9],
        "meta_info": {
            "id": "gen-1",
            "prompt_tokens": 3,
            "weight_versions": [{"version": "3-abc", "start": 0, "end": 1}, {"version": "4-def", "start": 1, "end": 2}],
            "output_logprobs": [-0.25, -1.5],
            "finish_reason": {"type": "stop", "matched": 9},
            "cached_tokens": 2,
        },
    },
    "vllm": {
        "id": "cmpl-1",
        "choices": [
            {
                "index": 0,
                "text": "x",
                "token_ids": [5, 9],
                "prompt_token_ids": [1, 2, 3],
                "logprobs": {"tokens": ["x", "y"], "token_logprobs": [-0.25, -1.5], "top_logprobs": [{}, {}]},
                "finish_reason": "stop",
                "stop_reason": 9,
            }
        ],
        "usage": {"prompt_tokens": 3, "prompt_tokens_details": {"cached_tokens": 2}},
    },
    "sglang": {
        "text": "x",
        "output_ids": [5, 9],
        "meta_info": {
            "output_token_logprobs": [[-0.25, 5, None], [-1.5, 9, None]],
            "finish_reason": {"type": "stop", "matched": 9},
            "weight_version": "3-abc",
            "cached_tokens": 2,
        },
    },
}


@pytest.mark.parametrize("name", SPEECHES)
def test_what_is_drawn_from_is_said_in_full(name: str) -> None:
    """A temperature, a filter, a penalty or a stop token is the server's own default, of its model's files."""
    path, body = SPEECHES[name].ask(REQUEST, 4)
    drawn = body if name == "vllm" else body["sampling_params"]
    assert path == {"tandem": "/generate", "vllm": "/v1/completions", "sglang": "/generate"}[name]
    assert (drawn["temperature"], drawn["top_p"], drawn["min_p"]) == (0.7, 1.0, 0.0)
    assert drawn["top_k"] == (0 if name == "vllm" else -1)
    assert (drawn["stop"], drawn["stop_token_ids"]) == (["END"], [9, 7])
    assert drawn.get("max_tokens", drawn.get("max_new_tokens")) == 4
    if name != "tandem":
        penalties = ("repetition_penalty", "presence_penalty", "frequency_penalty")
        assert [drawn[one] for one in penalties] == [1.0, 0.0, 0.0]
    # SGLang looks at no stop token where it is to ignore the end of a sequence.
    assert drawn.get("ignore_eos", False) == (name != "sglang")
    assert body.get("prompt", body.get("input_ids")) == PROMPT


def test_seeds() -> None:
    """A seed beyond what a server takes; or the turns of a program, whose seed is one, begin with the same draws on an
    engine whose noise is not keyed by position. Tandem's own takes the sampler's as it is."""
    later = Request("p/1", "program", (*PROMPT, 4, 5), DRAWN, seed=2**64 - 1)
    assert SPEECHES["tandem"].ask(REQUEST, 4)[1]["sampling_params"]["noise_seed"] == 2**64 - 1
    for bits in (31, 63):
        assert 0 <= seed_there(REQUEST, bits) < 2**bits
        assert seed_there(REQUEST, bits) == seed_there(REQUEST, bits) != seed_there(later, bits)
    assert SPEECHES["vllm"].ask(REQUEST, 4)[1]["seed"] == seed_there(REQUEST, 63)
    assert SPEECHES["sglang"].ask(REQUEST, 4)[1]["sampling_params"]["sampling_seed"] == seed_there(REQUEST, 31)


def test_tandem_is_told_who_asks_and_what_for() -> None:
    """A constraint, a program, a tenant or a hint stays here."""
    bound = Request("p", "program", PROMPT, DRAWN, 1, "team", constraint=Constraint("regex", "[0-9]+"))
    body = SPEECHES["tandem"].ask(bound, 4)[1]
    assert body["sampling_params"]["regex"] == "[0-9]+"
    assert (body["program_id"], body["tenant"], body["return_kept"]) == ("program", "team", True)
    assert SPEECHES["tandem"].ask(REQUEST, 4)[1]["hints"] == {"tools": [], "turns_left": 2}


@pytest.mark.parametrize("name", SPEECHES)
def test_an_answer_is_read(name: str) -> None:
    """Tokens or log-probs of another place of an answer, or an end that is not its own."""
    read = SPEECHES[name].read(REQUEST, ANSWERS[name])
    assert (read.tokens, read.logprobs, read.ended, read.cached_tokens) == ((5, 9), (-0.25, -1.5), "stop", 2)
    labels = {"tandem": (("3-abc", 1), ("4-def", 1)), "vllm": (), "sglang": (("3-abc", 2),)}
    assert read.labels == labels[name]
    assert stop_reason(REQUEST, read, 4) is StopReason.STOP_TOKEN


def test_kept_sets_are_read() -> None:
    """The set that a token was drawn from lost or spelt otherwise, by which the learner's log-prob is another."""
    answer = copy.deepcopy(ANSWERS["tandem"])
    kept = [array("I", [5, 6]).tobytes(), array("I", [9]).tobytes()]
    answer["meta_info"]["output_kept"] = [base64.b64encode(one).decode() for one in kept]
    answer["meta_info"]["output_unfiltered_logprobs"] = [-0.5, -2.0]
    columns = columns_of(SPEECHES["tandem"].read(REQUEST, answer), [1, 1], 10)
    assert columns["kept"].tolist() == kept and columns["unfiltered_logprobs"].tolist() == [-0.5, -2.0]


MISSING: dict[str, tuple[tuple[Any, ...], str]] = {
    "tandem": (("output_ids",), "output_ids"),
    "tandem ": (("meta_info", "output_logprobs"), "output_logprobs"),
    "tandem  ": (("meta_info", "finish_reason"), "finish_reason"),
    "vllm": (("choices", 0, "token_ids"), "token_ids"),
    "vllm ": (("choices", 0, "logprobs"), "logprobs"),
    "vllm  ": (("choices",), "choices"),
    "sglang": (("meta_info", "output_token_logprobs"), "output_token_logprobs"),
    "sglang ": (("meta_info",), "meta_info"),
}


@pytest.mark.parametrize("case", MISSING)
def test_what_is_missing_is_named(case: str) -> None:
    """An answer without ids or log-probs, such as an older server's, is learned from, or fails without saying why."""
    way, words = MISSING[case]
    for value in (None, "gone"):
        answer = copy.deepcopy(ANSWERS[case.strip()])
        place = answer
        for key in way[:-1]:
            place = place[key]
        if value is None:
            place[way[-1]] = None
        else:
            del place[way[-1]]
        with pytest.raises(OddAnswer, match=words):
            SPEECHES[case.strip()].read(REQUEST, answer)


@pytest.mark.parametrize("wrong", [None, "nan", float("nan"), float("-inf")])
def test_a_logprob_that_is_none(wrong: Any) -> None:
    """A log-prob that is null or not finite reaches a loss."""
    answer = copy.deepcopy(ANSWERS["vllm"])
    answer["choices"][0]["logprobs"]["token_logprobs"][1] = wrong
    with pytest.raises(OddAnswer, match="log-probs are missing"):
        SPEECHES["vllm"].read(REQUEST, answer)


def test_ids_and_logprobs_of_different_lengths() -> None:
    """Log-probs that belong to other tokens: of a server that leaves the stop token out of one of the two."""
    answer = copy.deepcopy(ANSWERS["vllm"])
    answer["choices"][0]["token_ids"] = [5]
    with pytest.raises(OddAnswer, match="2 token_logprobs, where 1 belong"):
        SPEECHES["vllm"].read(REQUEST, answer)


ENDS: list[tuple[tuple[int, ...], str, tuple[str, ...], StopReason | str]] = [
    ((5, 6, 8, 8), "length", ("END",), StopReason.LENGTH),
    ((5, 6, 8, 7), "length", (), StopReason.STOP_TOKEN),
    ((5, 7), "stop", (), StopReason.STOP_TOKEN),
    ((5, 6), "stop", ("END",), StopReason.STOP_STRING),
    ((5, 6), "stop", (), "token 6, which is none of the model's stop tokens"),
    ((), "stop", (), "no token at all"),
    ((5, 6), "length", (), "cut after 2 of 4 tokens"),
    ((5,), "abort", (), "ended by 'abort'"),
    ((5,), "None", (), "ended by 'None'"),
]


@pytest.mark.parametrize(("tokens", "ended", "strings", "wanted"), ENDS)
def test_ends(tokens: tuple[int, ...], ended: str, strings: tuple[str, ...], wanted: StopReason | str) -> None:
    """Half an answer, or one that another model's stop token ended, is graded as if the policy had ended there."""
    request = Request("p", "", PROMPT, Sampling(max_new_tokens=4, stop_token_ids=(9, 7), stop_strings=strings), 1)
    answer = Answer(tokens, (-1.0,) * len(tokens), ended)
    if isinstance(wanted, StopReason):
        assert stop_reason(request, answer, 4) is wanted
    else:
        with pytest.raises(OddAnswer, match=wanted):
            stop_reason(request, answer, 4)


def test_another_vocabulary() -> None:
    """A token that the model here does not have is read beyond its embedding."""
    with pytest.raises(OddAnswer, match="another model"):
        columns_of(Answer((5, 12), (-1.0, -1.0), "length"), [0, 0], 12)
