"""Regression caught: a board made for vLLM shows nothing, or other figures than what was asked of the engine."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import httpx
import pytest
from prometheus_client.parser import text_string_to_metric_families

from tests.serving import Server, script, serving, wait_for

# Of vLLM 0.33's docs/design/metrics.md: what its Grafana boards and the routers before it read.
NAMES = """num_requests_running num_requests_waiting kv_cache_usage_perc prefix_cache_queries_total
prefix_cache_hits_total prompt_tokens_total generation_tokens_total num_preemptions_total
request_success_total time_to_first_token_seconds_bucket inter_token_latency_seconds_bucket
request_time_per_output_token_seconds_bucket e2e_request_latency_seconds_bucket
request_queue_time_seconds_bucket request_inference_time_seconds_bucket request_prefill_time_seconds_bucket
request_decode_time_seconds_bucket request_prompt_tokens_bucket request_generation_tokens_bucket
request_params_max_tokens_bucket
""".split()


@pytest.fixture
def folder(tmp_path: Path, write_model: Callable[..., None]) -> Path:
    write_model(tmp_path)
    return tmp_path


def read(server: Server) -> dict[tuple[str, str], float]:
    """(name, value of the label beside model and engine) -> value."""
    sent = httpx.get(f"{server.url}/metrics")
    assert sent.status_code == 200 and sent.headers["content-type"].startswith("text/plain")
    found: dict[tuple[str, str], float] = {}
    for family in text_string_to_metric_families(sent.text):
        for one in family.samples:
            labels = dict(one.labels)
            assert (labels.pop("model_name"), labels.pop("engine")) == ("tiny", "0"), one
            found[one.name, "".join(labels.values())] = one.value
    return found


def test_figures_are_those_of_the_requests(folder: Path) -> None:
    """Tokens are counted twice, or a prompt's cached tokens are none."""
    with serving(folder) as server:
        zero = read(server)
        assert {f"vllm:{name}" for name in NAMES} <= {name for name, _ in zero}
        assert zero["vllm:request_success_total", "length"] == 0 and zero["vllm:prompt_tokens_total", ""] == 0
        usage = []
        ask: list[Any] = [{"role": "user", "content": "a question of some length"}]
        for streams in (False, True):
            body = {"messages": ask, "max_tokens": 9, "ignore_eos": True, "n": 2, "seed": 1, "stream": streams}
            sent = httpx.post(f"{server.url}/v1/chat/completions", json=body)
            usage += [] if streams else [sent.json()["usage"]]
        now = read(server)
        prompt = usage[0]["prompt_tokens"]
        assert now["vllm:request_success_total", "length"] == 4 and now["vllm:generation_tokens_total", ""] == 36
        assert now["vllm:prompt_tokens_total", ""] == now["vllm:prefix_cache_queries_total", ""] == 4 * prompt
        assert (
            now["vllm:prefix_cache_hits_total", ""]
            == server.room.desk.engine.stats.cached_tokens
            >= 3 * (prompt // 16 * 16)
        )
        assert (
            now["vllm:request_prompt_tokens_sum", ""] == 4 * prompt
            and now["vllm:request_generation_tokens_count", ""] == 4
        )
        for name in ("time_to_first_token", "e2e_request_latency", "request_queue_time", "request_decode_time"):
            assert now[f"vllm:{name}_seconds_count", ""] == 4
        parts = [now[f"vllm:request_{name}_time_seconds_sum", ""] for name in ("queue", "prefill", "decode")]
        assert now["vllm:e2e_request_latency_seconds_sum", ""] == pytest.approx(sum(parts))
        assert 2 <= now["vllm:inter_token_latency_seconds_count", ""] <= 16, "two streams of nine tokens"
        httpx.post(f"{server.url}/v1/chat/completions", json={})
        assert read(server)["tandem:refused_total", "missing_required_parameter"] == 1


def test_drafts_are_counted_under_vllms_names(folder: Path) -> None:
    """A board of speculation shows nothing, drafts of one position at another, or some where nothing drafts."""
    drafting = {"engine.draft.by": "synthetic", "engine.draft.acceptance": 1.0, "engine.draft.lengths": "fixed"}
    with serving(folder, **drafting, **{"engine.draft.tokens": 3}) as server:
        for _ in range(2):
            body = {"prompt": [5] * 40, "max_tokens": 9, "ignore_eos": True, "seed": 1}
            assert httpx.post(f"{server.url}/v1/completions", json=body).status_code == 200
        now = read(server)
    # The second answer: a token with the prompt, then steps of 4, of 4 (with room for 3 drafts each).
    assert now["vllm:spec_decode_num_drafts_total", ""] == 2
    names = ("vllm:spec_decode_num_accepted_tokens_per_pos_total", "tandem:drafted_tokens_per_pos_total")
    assert [[now[name, str(at)] for at in range(3)] for name in names] == [[2, 2, 2]] * 2
    assert (
        now["vllm:spec_decode_num_accepted_tokens_total", ""]
        == 6
        == now["tandem:accepted_tokens_per_hit_total", "1-63"]
    )
    reasons = "unpaid", "unoffered", "room", "raised"
    steps = [now["tandem:undrafted_steps_total", reason] for reason in reasons]
    assert steps == [0, 7, 1, 0]  # of the first answer, whose last token would end it
    with serving(folder) as server:
        assert not any("spec_decode" in name for name, _ in read(server))


def test_load_is_that_of_now(folder: Path) -> None:
    """Requests that wait are said to run, or pages that nobody holds to be in use."""
    server = Server(folder, **{"engine.max_sequences": 2})
    runner = script(server, "a" * 200)
    server.start()
    try:
        with httpx.Client(timeout=60) as client:
            body = {"prompt": [5] * 40, "n": 3, "max_tokens": 200, "stream": True, "tenant": "acme/ann"}
            runner.step_s = 0.02
            with client.stream("POST", f"{server.url}/v1/completions", json=body) as sent:
                lines = sent.iter_lines()
                next(lines)
                wait_for("two to run", lambda: server.room.desk.num_running == 2)
                now = read(server)
                assert now["vllm:num_requests_running", ""] == 2 and now["vllm:num_requests_waiting", ""] == 1
                assert now["vllm:kv_cache_usage_perc", ""] > 0 and now["tandem:tenant_requests", "acme/ann"] == 3
            wait_for("them to be withdrawn", lambda: not server.room.desk.open)
        now = read(server)
        assert now["vllm:request_success_total", "abort"] == 3 and now["vllm:kv_cache_usage_perc", ""] == 0
        assert now["vllm:num_requests_running", ""] == now["vllm:num_requests_waiting", ""] == 0
        assert now["vllm:e2e_request_latency_seconds_count", ""] == 0
    finally:
        server.stop()
