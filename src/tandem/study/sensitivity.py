"""What a model loses where one tensor, or all matrices, are kept in a format: decibels, KL, perplexity on given texts.

The distribution of each next token is compared with that of the original. Both are run in fp32, so that nothing but the
format differs. `pareto` rounds the matrices of layers, and what they multiply where the format says so: w8a8, w4a8, and
what is behind a +; embedding, head and norms stay.

Of one tensor at a time (ablation.py) the hidden states of the original before each layer are kept for a batch of
texts, and a forward pass begins at the layer of the tensor. A mean is over tokens; its 95 % interval takes texts for
independent (numerics/interval.py: clustered_error), and is none of one text.
"""

from __future__ import annotations

import math
import time
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from tandem import env
from tandem.errors import ConfigError
from tandem.kernels.norm import rms_norm
from tandem.kernels.rounding import NOT_ROUNDED, Rounding, rounding_of
from tandem.models.checkpoint import Checkpoint, open_checkpoint
from tandem.models.decoder import Decoder
from tandem.models.spec import ModelSpec
from tandem.models.tokenizer import Tokenizer
from tandem.models.view import PackView
from tandem.numerics.interval import Z_95, clustered_error, clustered_interval
from tandem.numerics.names import Ablated
from tandem.report.units import duration
from tandem.run.source import resolve_source
from tandem.run.texts import read_texts
from tandem.study.ablation import PLAIN, Tally, cached_trial, head_trials, matrices, rounds_of, trials

DTYPE = "float32"
BATCH_ROWS = 1024  # of texts that are run at once
TEXT_TOKENS = 512  # of a text that are read
COMPARED_ROWS = 128  # whose logits are held at once
KEPT_BYTES = 1 << 29  # of the original's log-probs of a batch
COLUMNS = ("q", "k", "v", "o", "gate", "up", "down")
Note = Callable[[str], None]


@dataclass(frozen=True, slots=True, eq=False)
class Batch:
    """Texts end to end."""

    tokens_T: Tensor  # int64
    bounds: tuple[int, ...]  # of the texts: one more than there are

    @property
    def view(self) -> PackView:
        return PackView(self.bounds)


def batches(texts: Sequence[str], tokenizer: Tokenizer, longest: int) -> list[Batch]:
    """Texts as tokens, of each the first `longest`, in batches; those of fewer than two are left out."""
    found: list[Batch] = []
    held: list[list[int]] = []

    def close() -> None:
        if held:
            lengths = [0, *(len(tokens) for tokens in held)]
            bounds = tuple(sum(lengths[: place + 1]) for place in range(len(lengths)))
            found.append(Batch(torch.tensor(sum(held, []), dtype=torch.int64), bounds))
            held.clear()

    for text in texts:
        tokens = tokenizer.encode(text)[:longest]
        if len(tokens) < 2:
            continue
        if sum(map(len, held)) + len(tokens) > BATCH_ROWS:
            close()
        held.append(tokens)
    close()
    if not found:
        raise ConfigError("no text has two tokens or more: nothing is predicted. Give longer texts.")
    return found


@dataclass(slots=True)
class Sums:
    """Of each text in turn: tokens compared and predicted, KL(original || rounded) and -log p in nats, and how many
    tokens the two find likeliest alike."""

    tokens: list[int]
    predicted: list[int]
    kl: list[float]
    loss: list[float]
    loss_before: list[float]
    same_top: list[float]

    @classmethod
    def empty(cls) -> Sums:
        return cls([], [], [], [], [], [])

    def figures(self) -> dict[str, Any]:
        """Means, with intervals over texts."""
        texts, tokens, predicted = len(self.tokens), sum(self.tokens), sum(self.predicted)
        kl, half = _mean(self.kl, self.tokens)
        loss, loss_half = _mean(self.loss, self.predicted)
        before = math.fsum(self.loss_before) / predicted
        more = [one - other for one, other in zip(self.loss, self.loss_before, strict=True)]
        grown, grown_half = _mean(more, self.predicted)
        top = math.fsum(self.same_top) / tokens
        return {
            "texts": texts, "tokens": tokens,
            "kl": kl, "kl_low": None if half is None else max(0.0, kl - half),
            "kl_high": None if half is None else kl + half,
            "perplexity": math.exp(loss), "perplexity_before": math.exp(before),
            "perplexity_low": None if loss_half is None else math.exp(loss - loss_half),
            "perplexity_high": None if loss_half is None else math.exp(loss + loss_half),
            "loss_more": grown, "loss_more_low": None if grown_half is None else grown - grown_half,
            "loss_more_high": None if grown_half is None else grown + grown_half,
            "same_top": top, "same_top_interval": list(clustered_interval(self.same_top, self.tokens)),
        }  # fmt: skip


def _mean(sums: Sequence[float], counts: Sequence[int]) -> tuple[float, float | None]:
    """Mean, and half of its 95 % interval."""
    error = clustered_error(sums, counts)
    return math.fsum(sums) / sum(counts), None if error is None else Z_95 * error


def logprobs_of(decoder: Decoder, hidden_TM: Tensor, rows: slice) -> Tensor:
    """Of some rows of final hidden states: [N, V], fp32."""
    return decoder.logits(hidden_TM[rows]).log_softmax(-1)


def before_of(decoder: Decoder, final_TM: Tensor) -> Callable[[slice], Tensor]:
    """`logprobs_of` the original, whose head the rounded model has too; held where KEPT_BYTES hold them."""
    asked = partial(logprobs_of, decoder, final_TM)
    if 4 * len(final_TM) * decoder.spec.vocab_size > KEPT_BYTES:
        return asked
    return torch.cat([asked(rows) for rows in _pieces(len(final_TM))]).__getitem__


def _pieces(count: int) -> list[slice]:
    return [slice(start, start + COMPARED_ROWS) for start in range(0, count, COMPARED_ROWS)]


def compare(batch: Batch, before: Callable[[slice], Tensor], after: Callable[[slice], Tensor], sums: Sums) -> None:
    """Add a batch's texts, by log-probs of rows of the original and of the rounded model."""
    parts = []
    following_T = torch.cat([batch.tokens_T[1:], batch.tokens_T[:1]])
    for rows in _pieces(len(batch.tokens_T)):
        before_NV, after_NV = before(rows), after(rows)
        kl_N = (before_NV.exp() * (before_NV - after_NV)).sum(-1, dtype=torch.float64)
        losses = [-x.gather(1, following_T[rows, None])[:, 0].double() for x in (after_NV, before_NV)]
        parts.append(torch.stack([kl_N, *losses, (before_NV.argmax(-1) == after_NV.argmax(-1)).double()]))
    figures_4T = torch.cat(parts, 1)
    for start, end in zip(batch.bounds[:-1], batch.bounds[1:], strict=True):
        sums.tokens.append(end - start)
        sums.predicted.append(end - start - 1)  # nothing follows the last
        sums.kl.append(float(figures_4T[0, start:end].sum()))
        sums.loss.append(float(figures_4T[1, start : end - 1].sum()))
        sums.loss_before.append(float(figures_4T[2, start : end - 1].sum()))
        sums.same_top.append(float(figures_4T[3, start:end].sum()))


def rounding_named(name: str) -> Rounding:
    """Of fp32, bf16, or a name of model.weights (kernels/rounding.py). ConfigError for an unknown one."""
    return NOT_ROUNDED if name in PLAIN else rounding_of(name)


def opened(model: str, texts: Path) -> tuple[Checkpoint, Decoder, list[Batch]]:
    """A model in fp32, and the texts as it reads them. ConfigError for a file without texts."""
    torch.set_num_threads(env.num_threads())
    written = read_texts(texts, paragraphs=True)
    checkpoint = open_checkpoint(resolve_source(model))
    decoder = _decoder(checkpoint)
    longest = min(TEXT_TOKENS, checkpoint.spec.max_position)
    return checkpoint, decoder, batches(written, checkpoint.load_tokenizer(), longest)


def _decoder(checkpoint: Checkpoint, rounding: Rounding = NOT_ROUNDED) -> Decoder:
    """In fp32, its matrices and what they multiply rounded as in training and sampling."""
    decoder = Decoder(checkpoint.spec, DTYPE, rounding=rounding)
    return decoder.load((name, tensor.float()) for name, tensor in checkpoint.tensors())


class _Pace:
    """How far the tensors of a batch are, and how long the others take: a pass from a layer on, and what each costs
    beside it, as far as is known."""

    def __init__(self, pass_s: float, shares: Sequence[float], batches: float) -> None:
        """shares: of a whole pass, of each tensor in turn; batches: that follow, in sizes of this one."""
        self.pass_s, self.shares, self.batches, self.done = pass_s, shares, batches, 0
        self.begun_s = time.monotonic()

    def told(self) -> str:
        """Behind one more."""
        self.done += 1
        spent_s = time.monotonic() - self.begun_s
        beside_s = max(0.0, spent_s - self.pass_s * math.fsum(self.shares[: self.done])) / self.done
        shares = math.fsum(self.shares[self.done :]) + self.batches * math.fsum(self.shares)
        count = len(self.shares) - self.done + self.batches * len(self.shares)
        left_s = self.pass_s * shares + beside_s * count
        return f"{self.done} of {len(self.shares)} tensors, about {duration(left_s)} left"


@torch.no_grad()
def sensitivity(
    model: str, form: str, texts: Path, note: Note, kinds: Sequence[Ablated] = ("weights",)
) -> dict[str, Any]:
    """Each tensor alone in a format: a cell each with its decibels, and KL on the texts with an interval.

    kinds: which (ablation.py); what is of the output head, and of no layer, has layer None. "kv": all keys and values
    at once, where they are among them. ConfigError for an unknown
    format and for a file without texts.
    """
    rounds = rounds_of(form, kinds)
    checkpoint, decoder, found = opened(model, texts)
    tallies: dict[tuple[int | None, str], Tally] = defaultdict(Tally)
    sums: dict[tuple[int | None, str], Sums] = defaultdict(Sums.empty)
    all_kept, of_kept = Tally(), Sums.empty()
    for number, batch in enumerate(found, 1):
        note(f"batch {number} of {len(found)}: {len(batch.bounds) - 1} texts, {len(batch.tokens_T):,} tokens")
        begun_s = time.monotonic()
        states, final_TM = hidden_states(decoder, batch)
        pass_s = time.monotonic() - begun_s
        before = before_of(decoder, final_TM)
        tried = [(layer, *one) for layer in decoder.layers for one in trials(layer, kinds, rounds, batch.bounds)]
        shares = [1 - layer.index / checkpoint.spec.layers for layer, _, _ in tried]
        pace = _Pace(pass_s, shares, sum(len(one.tokens_T) for one in found[number:]) / len(batch.tokens_T))
        for layer, column, trial in tried:
            at = layer.index, column
            with trial(tallies[at]) as view:
                hidden_TM = forward_from(decoder, view, layer.index, states)
            compare(batch, before, partial(logprobs_of, decoder, hidden_TM), sums[at])
            kl = sums[at].kl[-len(batch.bounds) + 1 :]
            done = f"layer {layer.index} {column}: KL {math.fsum(kl) / len(batch.tokens_T):.3g}"
            note(f"{done} on this batch; {pace.told()}")
        if "kv" in kinds:
            with cached_trial(rounds, batch.bounds)(all_kept) as view:
                hidden_TM = forward_from(decoder, view, 0, states)
            compare(batch, before, partial(logprobs_of, decoder, hidden_TM), of_kept)
        for column, of_head in head_trials(decoder, final_TM, rounds) if "logits" in kinds else ():
            compare(batch, before, of_head(tallies[None, column]), sums[None, column])
    rows = [
        {"layer": at[0], "tensor": at[1], "sqnr_db": tallies[at].decibels} | sums[at].figures()
        for at in sorted(sums, key=lambda one: math.inf if one[0] is None else one[0])
    ]
    first = rows[0]
    return {
        "model": model, "format": form, "texts": first["texts"], "tokens": first["tokens"],
        "perplexity_before": first["perplexity_before"], "layers": checkpoint.spec.layers, "cells": rows,
        "kv": {"sqnr_db": all_kept.decibels} | of_kept.figures() if "kv" in kinds else None,
    }  # fmt: skip


def hidden_states(decoder: Decoder, batch: Batch) -> tuple[list[Tensor], Tensor]:
    """Before each layer, and behind the last norm."""
    states = [decoder.embed.value[batch.tokens_T]]
    final_TM = decoder.forward(batch.tokens_T, batch.view, watch=lambda _, hidden_TM: states.append(hidden_TM))
    return states[:-1], final_TM


def forward_from(decoder: Decoder, view: PackView, first: int, states: Sequence[Tensor]) -> Tensor:
    """Final hidden states, of a pass that begins at layer `first` with what the original had there."""
    hidden_TM = states[first]
    for layer in decoder.layers[first:]:
        hidden_TM = layer.forward(hidden_TM, view, decoder.tables)
    return rms_norm(hidden_TM, decoder.norm, decoder.spec.norm_eps)


def _dominates(one: tuple[float, float], other: tuple[float, float]) -> bool:
    return one != other and one[0] <= other[0] and one[1] <= other[1]


@torch.no_grad()
def pareto(
    model: str, forms: Sequence[str], texts: Path, foretold: Callable[[ModelSpec, str], Mapping[str, Any]], note: Note
) -> dict[str, Any]:
    """All matrices in each of several formats: KL and perplexity with intervals, beside what is `foretold` of each.

    foretold: "bits_a_parameter" and "seconds" at least, by shape and format (bench/foretold.py). A format is dominated
    by "bits", or by "seconds", where another takes no more of them and has no more KL. ConfigError for an unknown one.
    """
    roundings = {form: rounding_named(form) for form in forms}
    checkpoint, decoder, found = opened(model, texts)
    known = {form: foretold(checkpoint.spec, form) for form in forms}  # what is wrong is told before anything is run
    originals = [hidden_states(decoder, batch)[1] for batch in found]
    rows: list[dict[str, Any]] = []
    for form, rounding in roundings.items():
        note(form)
        rounds = _decoder(checkpoint, rounding)
        if form in PLAIN:
            for layer in rounds.layers:
                for _, weight, view in matrices(layer):
                    view.copy_(view.to(PLAIN[form]))
                    weight.repack()
        sums = Sums.empty()
        for batch, original_TM in zip(found, originals, strict=True):
            before = partial(logprobs_of, decoder, original_TM)
            after = partial(logprobs_of, rounds, rounds.forward(batch.tokens_T, batch.view))
            compare(batch, before, after, sums)
        rows.append({"format": form} | dict(known[form]) | sums.figures())
    for row in rows:
        row["dominated"] = {
            name: any(_dominates((other[key], other["kl"]), (row[key], row["kl"])) for other in rows)
            for name, key in (("bits", "bits_a_parameter"), ("seconds", "seconds"))
        }
    first = rows[0]
    return {
        "model": model, "texts": first["texts"], "tokens": first["tokens"],
        "perplexity_before": first["perplexity_before"], "rows": rows,
    }  # fmt: skip
