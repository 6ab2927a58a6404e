"""Keys and values of few bits: by hand, by loops, and by a cache that grows a token at a time."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from tandem.bench import kv as bench
from tandem.bench.kv import KvView
from tandem.errors import ConfigError
from tandem.models.checkpoint import save_checkpoint
from tandem.models.scratch import new_tokenizer
from tandem.models.view import PackView
from tandem.numerics.kv import KvRule, affine, attended, kept
from tandem.numerics.quantise import to_e4m3
from tests.cpu.test_prune import random_model

RULES = [
    KvRule("token", 4, 8),
    KvRule("token", 2, 4, sinks=2, window=5),
    KvRule("channel", 4, 8),
    KvRule("channel", 2, 4, sinks=3, window=6),
    KvRule("head", 8, sinks=1),
]


def drawn(*shape: int, seed: int = 0) -> torch.Tensor:
    x = torch.randn(shape, generator=torch.Generator().manual_seed(seed))
    x[..., 1] += 8.0  # a channel that is large in all tokens
    return x


def test_by_hand() -> None:
    """A minimum is taken for 0, a group runs over another axis, or a kept token is rounded."""
    assert affine(torch.tensor([[5.0, 6.0, 7.9, 8.0], [3.0] * 4]), 2).tolist() == [[5.0, 6.0, 8.0, 8.0], [3.0] * 4]
    x = torch.tensor([[0.0, 10.0], [1.4, 11.0], [3.0, 13.0], [2.0, 12.0], [9.0, 9.0]])[:, None]
    by_channel = kept(x, KvRule("channel", 2, 4))
    assert by_channel[:, 0].tolist() == [[0, 10], [1, 11], [3, 13], [2, 12], [9, 9]]
    assert kept(x, KvRule("token", 1, 2)).equal(x)  # two numbers are a group's ends
    by_head = kept(x, KvRule("head", 8, window=1))
    scale = 13.0 / 448
    assert by_head[4].equal(x[4]) and by_head[:4].equal(to_e4m3(x[:4] / scale).float() * scale)


@pytest.mark.parametrize("rule", RULES, ids=str)
def test_equals_loops(rule: KvRule) -> None:
    """A group's ends are those of its neighbour, or a token too many or too few is rounded."""
    x = drawn(31, 2, 16)
    made, wanted = kept(x, rule), x.clone()
    first, end = rule.rounded(31)
    assert first == rule.sinks and end <= 31 - rule.window
    for head in range(2):
        own = x[first:end, head]
        if rule.axis == "token":
            for token in range(first, end):
                for start in range(0, 16, rule.group):
                    cut = slice(start, start + rule.group)
                    wanted[token, head, cut] = affine(x[token, head, cut], rule.bits)
        elif rule.axis == "channel":
            assert (end - first) % rule.group == 0 and 31 - rule.window - end < rule.group
            for start in range(first, end, rule.group):
                for channel in range(16):
                    cut = slice(start, start + rule.group)
                    wanted[cut, head, channel] = affine(x[cut, head, channel], rule.bits)
        else:
            scale = own.abs().max() / 448
            wanted[first:end, head] = to_e4m3(own / scale).float() * scale
    torch.testing.assert_close(made, wanted, rtol=1e-6, atol=1e-6)
    assert not torch.equal(made, x)


@pytest.mark.parametrize("rule", RULES[:4], ids=str)
def test_each_query_sees_the_cache_of_its_time(rule: KvRule) -> None:
    """A query sees a token rounded that is still in the window when it comes, or one behind itself."""
    query, key, value = drawn(23, 4, 16), drawn(23, 2, 16, seed=1), drawn(23, 2, 16, seed=2)
    made = attended(query, key, value, rule, rule)
    for token in range(23):
        keys, values = (kept(x[: token + 1], rule).repeat_interleave(2, 1) for x in (key, value))
        scores = torch.einsum("hd,thd->ht", query[token], keys) / 4.0
        wanted = torch.einsum("ht,thd->hd", scores.softmax(-1), values)
        torch.testing.assert_close(made[token], wanted, rtol=1e-5, atol=1e-5)


def test_on_a_model(tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """The measuring view attends otherwise than the model does, or its table says that fewer bits are better."""
    decoder = random_model(layers=2, architecture="qwen3", qk_norm=True)
    tokens = torch.arange(40) * 7 % 97
    whole = KvRule("token", 8, 1)  # a group of one number stays as it is
    with torch.no_grad():
        mine, wanted = (decoder.forward(tokens, view) for view in (KvView(40, whole, whole), PackView([0, 40])))
    torch.testing.assert_close(mine, wanted, rtol=1e-4, atol=1e-4)
    made = random_model(layers=1, vocab_size=259, head_size=32)
    save_checkpoint(tmp_path / "model", made.spec, dict(made.export()), new_tokenizer(), "float32")
    (tmp_path / "text").write_text("Ducks lay eggs. " * 8)
    monkeypatch.setattr(bench, "MODEL", str(tmp_path / "model"))
    monkeypatch.setitem(bench.RULES, "int8", (KvRule("token", 8, 32),) * 2)
    rules = ["int8", "fp8 by head", "int2 keys by channel", "KIVI 2 bits"]
    bench.table(tmp_path / "text", 1, [*rules, "kivi2_r8", "kivi8_r8"])
    rows = {row["rule"]: row for row in map(json.loads, capsys.readouterr().out.splitlines())}
    assert rows["int8"]["kl"] < rows["fp8 by head"]["kl"] < rows["int2 keys by channel"]["kl"]
    assert rows["int8"]["key_db"] > rows["fp8 by head"]["key_db"] > rows["int2 keys by channel"]["key_db"]
    assert 0 < rows["kivi8_r8"]["kl"] < rows["kivi2_r8"]["kl"] < 2 * rows["int2 keys by channel"]["kl"]
    assert (rows["kivi2_r8"]["bits"], rows["kivi8_r8"]["bits"]) == ((6 + 3) / 2, (12 + 9) / 2)
    assert rows["KIVI 2 bits"]["bits"] == 3.0 and rows["KIVI 2 bits"]["kl"] < 1e-4  # 128 tokens are in the window


def test_what_cannot_be_kept_so() -> None:
    """A group that divides nothing, or bits that are no format's, is taken silently."""
    with pytest.raises(ConfigError, match="groups of 24 do not divide a head of 64"):
        kept(torch.zeros(3, 1, 64), KvRule("token", 4, 24))
    with pytest.raises(ConfigError, match="by head are e4m3, of 8 bits and not 4"):
        KvRule("head", 4)
    with pytest.raises(ConfigError, match="give 1 to 8 bits"):
        KvRule("token", 0)
    nothing = torch.zeros(5, 1, 8)
    assert all(kept(nothing, rule).equal(nothing) for rule in (KvRule("token", 2, 8), KvRule("head", 8)))
    assert kept(drawn(5, 1, 8), KvRule("channel", 2, 8)).equal(drawn(5, 1, 8))  # no group is full
