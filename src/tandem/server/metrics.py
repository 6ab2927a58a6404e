"""Counts and times in Prometheus' form, under vLLM's names, so that boards and routers made for it read them."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import zip_longest

from prometheus_client import CollectorRegistry, Counter, Histogram, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily
from prometheus_client.registry import Collector

from tandem.engine.batch import Stats
from tandem.engine.tally import HIT_NAMES, UNDRAFTED
from tandem.server.answers import FINISHED
from tandem.server.desk import Desk, Open
from tandem.server.refusal import Refusal
from tandem.types import Completion, StopReason

FIRST_S = (0.001, 0.005, 0.01, 0.02, 0.04, 0.06, 0.08, 0.1, 0.25, 0.5, 0.75, 1, 2.5, 5, 7.5, 10, 20, 40, 80, 160, 640)
TOKEN_S = (0.01, 0.025, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5, 0.75, 1, 2.5, 5, 7.5, 10, 20, 40, 80)
REQUEST_S = (0.3, 0.5, 0.8, 1, 1.5, 2, 2.5, 5, 10, 15, 20, 30, 40, 50, 60, 120, 240, 480, 960, 1920, 7680)
TOKENS = (1, 2, 5, 10, 20, 50, 100, 200, 500, 1000, 2000, 5000, 10_000, 20_000, 50_000, 100_000)
LABELS = ("model_name", "engine")
FAILED = "error"  # how a request ended, beside FINISHED


class Metrics:
    """Of one server. What the engine knows is read as it is asked for; the rest is counted as requests end."""

    def __init__(self, desk: Desk, model: str) -> None:
        self.registry = CollectorRegistry()
        self._values = (model, "0")
        self.first_s = self._histogram("time_to_first_token_seconds", "From arrival to the first token.", FIRST_S)
        self.gap_s = self._histogram("inter_token_latency_seconds", "Between tokens of a stream, as sent.", TOKEN_S)
        self.token_s = self._histogram("request_time_per_output_token_seconds", "Mean of a request.", TOKEN_S)
        self.whole_s = self._histogram("e2e_request_latency_seconds", "From arrival to the end.", REQUEST_S)
        self.queue_s = self._histogram("request_queue_time_seconds", "From arrival to the first step.", REQUEST_S)
        self.run_s = self._histogram("request_inference_time_seconds", "From the first step to the end.", REQUEST_S)
        self.prefill_s = self._histogram("request_prefill_time_seconds", "From there to the first token.", REQUEST_S)
        self.decode_s = self._histogram("request_decode_time_seconds", "From the first token to the end.", REQUEST_S)
        self.prompt = self._histogram("request_prompt_tokens", "Of a request.", TOKENS)
        self.drawn = self._histogram("request_generation_tokens", "Of a request.", TOKENS)
        self.asked = self._histogram("request_params_max_tokens", "Of a request.", TOKENS)
        counts = (*LABELS, "finished_reason")
        self.success = Counter("vllm:request_success", "Requests that ended.", counts, registry=self.registry)
        for reason in (*FINISHED.values(), FAILED):
            self.success.labels(*self._values, reason)
        self.refusals = Counter("tandem:refused", "Calls refused.", (*LABELS, "code"), registry=self.registry)
        self.registry.register(_Engine(desk, self._values))
        desk.watchers.append(self)
        desk.gap = self.gap_s.observe

    def _histogram(self, name: str, said: str, buckets: tuple[float, ...]) -> Histogram:
        made = Histogram(f"vllm:{name}", said, LABELS, buckets=buckets, registry=self.registry)
        return made.labels(*self._values)

    def began(self, opened: Open) -> None: ...

    def ended(self, opened: Open, completion: Completion | None) -> None:
        reason = FAILED if completion is None else FINISHED.get(completion.stop_reason, FAILED)
        self.success.labels(*self._values, reason).inc()
        if completion is None or completion.stop_reason in (StopReason.ABORTED, StopReason.FAILED):
            return
        drawn, first_s, end_s = len(completion.columns), completion.first_s, completion.finished_s
        self.first_s.observe(first_s - completion.submitted_s)
        self.whole_s.observe(end_s - completion.submitted_s)
        self.queue_s.observe(completion.started_s - completion.submitted_s)
        self.run_s.observe(end_s - completion.started_s)
        self.prefill_s.observe(first_s - completion.started_s)
        self.decode_s.observe(end_s - first_s)
        if drawn > 1:
            self.token_s.observe((end_s - first_s) / (drawn - 1))
        self.prompt.observe(len(opened.request.tokens))
        self.drawn.observe(drawn)
        self.asked.observe(opened.request.sampling.max_new_tokens)

    def refused(self, refusal: Refusal) -> None:
        self.refusals.labels(*self._values, refusal.code or "").inc()

    def text(self) -> bytes:
        return generate_latest(self.registry)


class _Engine(Collector):
    """What the engine and the desk know."""

    def __init__(self, desk: Desk, values: tuple[str, ...]) -> None:
        self._desk, self._values = desk, values

    def collect(self) -> Iterator[GaugeMetricFamily | CounterMetricFamily]:
        desk, pool, stats = self._desk, self._desk.engine.scheduler.pool, self._desk.total()
        held = 1 - pool.num_available / pool.num_pages
        for name, said, now in (
            ("vllm:num_requests_running", "Requests in the engine's steps.", desk.num_running),
            ("vllm:num_requests_waiting", "Requests that have not started.", desk.num_waiting),
            ("vllm:kv_cache_usage_perc", "Share of the pages that are held. 1 is all.", held),
            ("tandem:paused", "1 while the engine is paused.", int(desk.paused)),
            ("tandem:weight_version", "Updates of the weights.", desk.engine.version.step),
        ):
            yield self._gauge(name, said, now)
        queries = stats.cached_tokens + stats.prefilled_tokens + stats.repeated_tokens
        for name, said, count in (
            ("vllm:prefix_cache_queries", "Prompt tokens that were looked for in the prefix cache.", queries),
            ("vllm:prefix_cache_hits", "Prompt tokens that were found there.", stats.cached_tokens),
            ("vllm:prompt_tokens", "Prompt tokens, found or run.", queries),
            ("vllm:generation_tokens", "Tokens drawn.", stats.sampled_tokens),
            ("vllm:num_preemptions", "Requests that gave up their pages.", stats.preemptions),
            ("tandem:recomputed_tokens", "Tokens run again after that.", stats.recomputed_tokens),
            ("tandem:evicted_pages", "Pages forgotten by the prefix cache.", stats.evicted_pages),
            ("tandem:steps", "Forward passes.", stats.batches),
            ("tandem:engine_failures", "Times that the engine began anew.", desk.renewals),
        ):
            family = CounterMetricFamily(name, said, labels=LABELS)
            family.add_metric(self._values, count)
            yield family
        if desk.engine.scheduler.config.draft.most:
            yield from self._drafts(stats)
        tenants = GaugeMetricFamily("tandem:tenant_requests", "Answers on their way.", labels=(*LABELS, "tenant"))
        for tenant, count in list(desk.tenants.items()):
            tenants.add_metric((*self._values, tenant), count)
        yield tenants

    def _drafts(self, stats: Stats) -> Iterator[CounterMetricFamily]:
        """Shares that stood have their intervals by whoever reads: both of their counts are here."""
        at = range(len(stats.drafted_at))  # vLLM's positions begin at 0
        for name, said, label, places, counts in (
            ("vllm:spec_decode_num_drafts", "Drafts that were run.", "", "-", (stats.drafts,)),
            ("vllm:spec_decode_num_draft_tokens", "Tokens of them.", "", "-", (stats.drafted_tokens,)),
            ("vllm:spec_decode_num_accepted_tokens", "Of these, drawn.", "", "-", (stats.accepted_tokens,)),
            ("vllm:spec_decode_num_accepted_tokens_per_pos", "Drawn, by place.", "position", at, stats.accepted_at),
            ("tandem:drafted_tokens_per_pos", "Drafted, by place.", "position", at, stats.drafted_at),
            ("tandem:drafted_tokens_per_hit", "Drafted, by tokens found.", "found", HIT_NAMES, stats.drafted_found),
            ("tandem:accepted_tokens_per_hit", "Of these, drawn.", "found", HIT_NAMES, stats.accepted_found),
            ("tandem:undrafted_steps", "Steps without drafts, by why.", "reason", UNDRAFTED, stats.undrafted),
            ("tandem:offered_draft_tokens", "That the drafter had.", "", "-", (stats.offered_tokens,)),
            ("tandem:invalid_draft_tokens", "Of no id of the vocabulary.", "", "-", (stats.invalid_drafts,)),
            ("tandem:draft_seconds", "In drafting.", "", "-", (stats.draft_s,)),
            ("tandem:draft_found_tokens", "That a drafter found in pages.", "", "-", (stats.draft_found_tokens,)),
            ("tandem:draft_ingested_tokens", "That it ran.", "", "-", (stats.draft_ingested_tokens,)),
        ):
            family = CounterMetricFamily(name, said, labels=(*LABELS, label) if label else LABELS)
            for place, count in zip_longest(places, counts, fillvalue=0):
                family.add_metric((*self._values, str(place)) if label else self._values, count)
            yield family

    def _gauge(self, name: str, said: str, now: float) -> GaugeMetricFamily:
        family = GaugeMetricFamily(name, said, labels=LABELS)
        family.add_metric(self._values, now)
        return family
