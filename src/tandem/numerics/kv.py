"""Keys and values of few bits: which of a sequence are rounded, and how.

    token     a scale and a minimum for each group of a token's dimensions of a head
    channel   for each group of consecutive tokens of a dimension: keys have dimensions that are large in all tokens
              (KIVI, Liu et al., 2402.02750: keys by channel, values by token)
    head      e4m3, one scale for a head over all tokens that are rounded

The first `sinks` tokens and the last `window` stay as they are, and by channel those of a group that is not full yet.

A cache in pages cannot keep a window: who starts behind shared pages would want tokens as they were that are rounded
already. `SpanRule` has spans of consecutive tokens instead, which are rounded when the last of them is there: a query
sees its own span as it was made and all spans before it rounded, whoever computed them.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from math import gcd
from typing import Literal

import torch
from torch import Tensor

from tandem.errors import ConfigError
from tandem.numerics.elements import E4M3
from tandem.numerics.snap import snap

Axis = Literal["token", "channel", "head"]


@dataclass(frozen=True, slots=True)
class KvRule:
    """How keys, or values, are kept.

    >>> KvRule("channel", 2, 32, sinks=4, window=128).rounded(300), KvRule("token", 8, 64).bits_each
    ((4, 164), 8.5)
    """

    axis: Axis
    bits: int  # of a code; 8 by head
    group: int = 32  # dimensions, by token; tokens, by channel; nothing by head
    sinks: int = 0  # tokens
    window: int = 0  # tokens

    def __post_init__(self) -> None:
        if self.axis == "head" and self.bits != 8:
            raise ConfigError(f"keys and values by head are e4m3, of 8 bits and not {self.bits}.")
        if not (1 <= self.bits <= 8 and self.group > 0 and self.sinks >= 0 and self.window >= 0):
            raise ConfigError(f"{self}: give 1 to 8 bits, a group of one or more, and no negative number of tokens.")

    @property
    def bits_each(self) -> float:
        """A number's, its share of a group's scale and minimum in fp16 among them; of a head's scale nothing."""
        return self.bits + (0.0 if self.axis == "head" else 32 / self.group)

    def rounded(self, tokens: int) -> tuple[int, int]:
        """First and end of the tokens that are rounded, where so many are kept."""
        end = max(self.sinks, tokens - self.window)
        if self.axis == "channel":
            end = self.sinks + (end - self.sinks) // self.group * self.group
        return self.sinks, end


def affine(x: Tensor, bits: int) -> Tensor:
    """x (bf16, fp16 or fp32) as codes of each group along its last axis read back, in fp32: code * scale + minimum,
    scale = (maximum - minimum) / (2^bits - 1), rounded to x's dtype. A group of equal numbers stays as it is, and one
    with a NaN or an infinity is all NaN.

    >>> affine(torch.tensor([0.0, 1.2, 2.0, 6.0]), 2).tolist()
    [0.0, 2.0, 2.0, 6.0]
    """
    codes, scale, low = affine_codes(x, bits)
    return codes * scale.float() + low.float()


def affine_codes(x: Tensor, bits: int) -> tuple[Tensor, Tensor, Tensor]:
    """Codes of groups, in fp32 and NaN where a group is, and scale and minimum of each, [.., 1] in x's dtype."""
    wide, last = x.float(), (1 << bits) - 1
    low, high = (end[..., None] for end in wide.aminmax(dim=-1))
    kept = ((high - low) / low.new_full((), last)).to(x.dtype)
    scale = kept.float()
    return ((wide - low) / scale.where(scale != 0, torch.inf)).round_().clamp_(0, last), kept, low.to(x.dtype)


def rounded(x_NTKD: Tensor, rule: KvRule) -> Tensor:
    """Spans of T tokens of keys or values, each of itself alone, as they are read back: fp32. By channel T is a
    multiple of the group."""
    if rule.axis == "token":
        return affine(x_NTKD.unflatten(-1, (-1, rule.group)), rule.bits).flatten(-2)
    if rule.axis == "channel":
        grouped_NGKDT = x_NTKD.unflatten(1, (-1, rule.group)).movedim(2, -1)
        return affine(grouped_NGKDT, rule.bits).movedim(-1, 2).flatten(1, 2)
    wide_NTKD = x_NTKD.float()
    scale = wide_NTKD.abs().amax((1, 3), keepdim=True) / E4M3.largest
    return snap(wide_NTKD / scale.where(scale != 0, torch.inf), E4M3) * scale


def kept(x_TKD: Tensor, rule: KvRule) -> Tensor:
    """Keys or values [T, K, D] as a cache of T tokens reads them back, fp32."""
    tokens, heads, size = x_TKD.shape
    if rule.axis == "token" and size % rule.group:
        raise ConfigError(f"groups of {rule.group} do not divide a head of {size}. Choose a divisor.")
    made, (first, end) = x_TKD.float().clone(), rule.rounded(tokens)
    some = made[first:end]
    if end <= first:
        return made
    made[first:end] = rounded(some[None], rule)[0]
    return made


@dataclass(frozen=True, slots=True)
class SpanRule:
    """How keys and values are kept that are rounded `tokens` at once; None: they stay as they are.

    >>> span_rule("kivi2", 128, 4).keys.bits_each, span_rule("fp8_head", 16, 0).values.axis
    (3.0, 'head')
    """

    tokens: int
    keys: KvRule | None
    values: KvRule | None
    sinks: int = 0  # of the first span: they stay as they are, and no scale is theirs

    def rounded(self, key_NTKD: Tensor, value_NTKD: Tensor, first_N: Tensor) -> tuple[Tensor, Tensor]:
        """Full spans as they are attended to from the next one on, in their dtype; first_N: the position of the first
        token of each."""
        pairs = zip((key_NTKD, value_NTKD), (self.keys, self.values), strict=True)
        key, value = (x if rule is None else self._one(x, rule, first_N) for x, rule in pairs)
        return key, value

    def _one(self, x_NTKD: Tensor, rule: KvRule, first_N: Tensor) -> Tensor:
        if rule.axis == "token":
            rule = replace(rule, group=gcd(rule.group, x_NTKD.shape[-1]))
        if not self.sinks or not bool((first_N == 0).any()):
            return rounded(x_NTKD, rule).to(x_NTKD.dtype)
        stays = (torch.arange(self.tokens) < self.sinks) & (first_N == 0)[:, None]
        stays_NTKD = stays.to(x_NTKD.device)[..., None, None]
        end = min(self.tokens, -(-self.sinks // rule.group) * rule.group)  # of the group that the last sink lies in
        others_NTKD = x_NTKD.where(~stays_NTKD, x_NTKD[:, end - 1 : end])
        return x_NTKD.where(stays_NTKD, rounded(others_NTKD, rule).to(x_NTKD.dtype))


def span_rule(kept: str, tokens: int, sinks: int) -> SpanRule:
    """Of the parts of a setting (numerics/names.py: kv_parts)."""
    if kept == "fp8_head":
        return SpanRule(tokens, KvRule("head", 8), KvRule("head", 8), sinks)
    bits = int(kept.removeprefix("kivi"))
    return SpanRule(tokens, KvRule("channel", bits, min(32, tokens)), KvRule("token", bits), sinks)


def attended(query_THD: Tensor, key_TKD: Tensor, value_TKD: Tensor, keys: KvRule, values: KvRule) -> Tensor:
    """Causal attention [T, H, D], fp32, each query over keys and values as the cache has them when it comes: its own
    token is the last one. By head, scales are those of the whole sequence.

    A reference: memory goes with T squared.
    """
    tokens, heads, size = query_THD.shape
    repeats = heads // key_TKD.shape[1]
    query = query_THD.float().transpose(0, 1)  # [H, T, D]
    place = torch.arange(tokens)

    def both(x_TKD: Tensor, rule: KvRule) -> tuple[Tensor, Tensor, Tensor]:  # as they are, rounded, and which is seen
        whole = KvRule(rule.axis, rule.bits, rule.group, rule.sinks)
        wide = [x.repeat_interleave(repeats, 1).transpose(0, 1) for x in (x_TKD.float(), kept(x_TKD, whole))]
        ends = torch.tensor([rule.rounded(count)[1] for count in range(1, tokens + 1)])
        return wide[0], wide[1], (place >= rule.sinks) & (place < ends[:, None])

    key, rough_key, old = both(key_TKD, keys)
    scores = torch.where(old, query @ rough_key.transpose(1, 2), query @ key.transpose(1, 2)) / size**0.5
    share = scores.masked_fill(place > place[:, None], -torch.inf).softmax(-1)
    value, rough_value, old = both(value_TKD, values)
    return ((share * old) @ rough_value + (share * ~old) @ value).transpose(0, 1)
