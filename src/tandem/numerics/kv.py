"""Keys and values of few bits: which of a sequence are rounded, and how.

    token     a scale and a minimum for each group of a token's dimensions of a head
    channel   for each group of consecutive tokens of a dimension: keys have dimensions that are large in all tokens
              (KIVI, Liu et al., 2402.02750: keys by channel, values by token)
    head      e4m3, one scale for a head over all tokens that are rounded

The first `sinks` tokens and the last `window` stay as they are, and by channel those of a group that is not full yet.
"""

from __future__ import annotations

from dataclasses import dataclass
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
    """x (fp32) as codes of each group along its last axis read back: code * scale + minimum, scale = (maximum -
    minimum) / (2^bits - 1). A group of equal numbers stays as it is.

    >>> affine(torch.tensor([0.0, 1.2, 2.0, 6.0]), 2).tolist()
    [0.0, 2.0, 2.0, 6.0]
    """
    low, high = (end[..., None] for end in x.aminmax(dim=-1))
    last = (1 << bits) - 1
    scale = (high - low) / low.new_full((), last)
    codes = ((x - low) / scale.where(scale > 0, torch.inf)).round_().clamp_(0, last)
    return codes * scale + low


def kept(x_TKD: Tensor, rule: KvRule) -> Tensor:
    """Keys or values [T, K, D] as a cache of T tokens reads them back, fp32."""
    tokens, heads, size = x_TKD.shape
    if rule.axis == "token" and size % rule.group:
        raise ConfigError(f"groups of {rule.group} do not divide a head of {size}. Choose a divisor.")
    made, (first, end) = x_TKD.float().clone(), rule.rounded(tokens)
    some = made[first:end]
    if end <= first:
        return made
    if rule.axis == "token":
        made[first:end] = affine(some.unflatten(-1, (-1, rule.group)), rule.bits).flatten(-2)
    elif rule.axis == "channel":
        grouped = some.unflatten(0, (-1, rule.group)).movedim(1, -1)  # [groups, K, D, tokens of one]
        made[first:end] = affine(grouped, rule.bits).movedim(-1, 1).flatten(0, 1)
    else:
        scale = some.abs().amax((0, 2), keepdim=True) / E4M3.largest
        made[first:end] = snap(some / scale.where(scale > 0, torch.inf), E4M3) * scale
    return made


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
