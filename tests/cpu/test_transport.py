"""What arrives of a version: whole tensors and changes, a rank's shares, damage."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from tandem.errors import DeliveryError, ModelError
from tandem.kernels.changes import Changes
from tandem.numerics.digest import root_hash, tensor_hashes
from tandem.sync.publish import Publisher, weight_version
from tandem.sync.receive import POLICY, Copied, Shared
from tandem.sync.reshard import shards
from tandem.sync.transport import Base, Held, Notice, Remote, sent, split_changes
from tests.apart import drawn, like, moved, version


def steps(count: int, first: dict[str, torch.Tensor] | None = None, share: float = 0.02):
    """Versions 0 to count - 1, each the last one with some elements changed."""
    tensors = drawn() if first is None else first
    for step in range(count):
        yield version(step, tensors)
        tensors = moved(tensors, step, share)


def test_changes_bring_a_receiver_from_version_to_version():
    """A change that is lost between versions, or an earlier version's that is written again."""
    base, held = Base(), Held(like(drawn()))
    for number, (newest, weights) in enumerate(steps(4)):
        notice, changes = base.advance(newest, weights)
        assert Notice.read(notice.text(), "here") == notice
        assert (notice.changes is None) == (number == 0)
        if notice.changes is None:
            held.take("here", notice, weights.tensors)
        else:
            assert "norm" not in notice.changes  # it stays
            held.change("here", notice, changes)
        assert held.version == newest
        assert root_hash(tensor_hashes(held.tensors)) == newest.digest == weight_digest(held)


def weight_digest(held: Held) -> str:
    return root_hash(held.weights.hashes)


def arrived(share: float = 0.02):
    """A receiver of version 0, and what takes it to version 1."""
    base, held = Base(), Held(like(drawn()))
    (first, weights), (second, later) = steps(2, share=share)
    held.take("here", base.advance(first, weights)[0], weights.tensors)
    return held, *base.advance(second, later)


@pytest.mark.parametrize("name", ["embed", "layers.0.down", "bias"])
@pytest.mark.parametrize("part", ["counts", "streams"])
def test_a_flipped_bit_of_the_changes_is_found_before_they_are_written(name, part):
    """Damaged changes that are written first and found out afterwards, when the receiver has no version left."""
    held, notice, changes = arrived(share=0.6)
    before = root_hash(tensor_hashes(held.tensors))
    getattr(changes[name], part)[-1] ^= 4
    with pytest.raises(DeliveryError, match=rf"here: version 1 .*changes arrived damaged, in 1 of 4 tensors: {name}\."):
        held.change("here", notice, changes)
    assert held.version is not None and held.version.digest == before == root_hash(tensor_hashes(held.tensors))


def test_a_flipped_bit_of_what_is_held_is_found():
    """Changes on top of memory that was damaged since the last version: the wrong weights under the right name."""
    held, notice, changes = arrived()
    held.tensors["embed"][7, 7] += 1
    with pytest.raises(DeliveryError, match="not what was published, in 1 of 5 tensors: embed"):
        held.change("here", notice, changes)
    assert held.version is None


def test_a_flipped_bit_of_a_whole_version_is_found():
    """A damaged tensor that is served."""
    (first, weights), *_ = steps(1)
    damaged = {name: tensor.clone() for name, tensor in weights.tensors.items()}
    damaged["layers.0.qkv"].view(torch.int16)[5, 5] ^= 1
    held = Held(like(drawn()))
    with pytest.raises(DeliveryError, match=r"not what was published, in 1 of 5 tensors: layers\.0\.qkv"):
        held.take("here", Notice(first, weights.hashes), damaged)
    assert held.version is None


@pytest.mark.parametrize("odd", ["another shape", "another dtype", "one more", "one less"])
def test_a_receiver_of_another_model_is_told(odd):
    """Weights broadcast or cast into tensors of another kind, or left out without a word."""
    (first, weights), *_ = steps(1)
    layout = like(drawn())
    if odd == "another shape":
        layout["norm"] = torch.zeros(65).bfloat16()
    if odd == "another dtype":
        layout["norm"] = torch.zeros(64)
    if odd == "one more":
        layout["head"] = torch.zeros(3)
    if odd == "one less":
        del layout["norm"]
    with pytest.raises(DeliveryError, match="version 0: (norm|head) is .*, and this receiver has"):
        Held(layout).take("here", Notice(first, weights.hashes), weights.tensors)


def test_a_notice_whose_hashes_are_not_its_digests_is_refused():
    """A hash that was damaged on its way and under which a damaged tensor passes."""
    (first, weights), *_ = steps(1)
    notice = Notice(first, {**weights.hashes, "norm": "0" * 32})
    with pytest.raises(DeliveryError, match="cannot be read"):
        Notice.read(notice.text(), "here")
    with pytest.raises(DeliveryError, match="cannot be read"):
        Notice.read(notice.text()[:-9], "here")


@pytest.mark.parametrize("ranks", [1, 2])
def test_ranks_hold_their_shares_of_every_version(make_decoder, ranks):
    """A rank that gets another's rows or columns, of a whole version or of what changed; against whole tensors cut by
    hand."""
    decoder = make_decoder("bfloat16")
    heads, kv, size = decoder.spec.heads, decoder.spec.kv_heads, decoder.spec.head_size
    tensors = {name: weight.value for name, weight in decoder.weights()}
    rank_of = {rank: shards(decoder, rank, ranks) for rank in range(ranks)}
    held = {
        rank: Held({name: shard.cut(torch.zeros_like(tensors[name])) for name, shard in of.items()}, of)
        for rank, of in rank_of.items()
    }
    base = Base()
    for newest, weights in steps(3, tensors, share=0.2):
        notice, changes = base.advance(newest, weights)
        for rank, each in held.items():
            if notice.changes is None:
                each.take("here", notice, weights.tensors)
            else:
                each.change("here", notice, changes)
            for name, tensor in weights.tensors.items():
                kind, wanted = name.rsplit(".", 1)[-1], tensor
                if kind == "qkv":
                    parts = tensor.split([heads * size, kv * size, kv * size])
                    wanted = torch.cat([part[len(part) // ranks * rank :][: len(part) // ranks] for part in parts])
                if kind == "gate_up":
                    half = len(tensor) // 2
                    own = range(half // ranks * rank, half // ranks * (rank + 1))
                    wanted = tensor[[*own, *(half + row for row in own)]]
                if kind in ("out", "down"):
                    wide = tensor.shape[1] // ranks
                    wanted = tensor[:, wide * rank : wide * (rank + 1)]
                assert torch.equal(each.tensors[name], wanted), (name, rank)


def test_a_share_that_was_damaged_is_found_before_it_is_changed(make_decoder):
    """Shares have no published hash: damage between two versions that stays for good."""
    decoder = make_decoder("bfloat16")
    of = shards(decoder, 1, 2)
    tensors = {name: weight.value for name, weight in decoder.weights()}
    held, base = Held({name: of[name].cut(tensor) for name, tensor in tensors.items()}, of), Base()
    (first, weights), (second, later) = steps(2, tensors)
    held.take("here", base.advance(first, weights)[0], weights.tensors)
    held.tensors["layers.0.down"][0, 0] += 1
    with pytest.raises(DeliveryError, match=r"layers\.0\.down"):
        held.change("here", *base.advance(second, later))
    assert held.version is None


def test_ranks_that_do_not_divide_a_weight(make_decoder):
    """Ranks that each hold another number of rows."""
    with pytest.raises(ModelError, match="to divide over 7 ranks"):
        shards(make_decoder("bfloat16"), 0, 7)


def test_packed_changes_come_apart_as_they_were():
    """Changes of two tensors that overlap where their counts are odd."""
    _, notice, changes = arrived()
    assert notice.changes is not None
    packed = torch.zeros(sum(16 + each.nbytes for each in changes.values()), dtype=torch.uint8)
    for name, place in split_changes(notice, packed).items():
        place.counts.copy_(changes[name].counts)
        place.streams.copy_(changes[name].streams)
    assert {name: sent(each) for name, each in split_changes(notice, packed).items()} == notice.changes
    lost = replace(
        notice, changes={**notice.changes, "embed": sent(Changes(torch.zeros(2).int(), torch.zeros(0).short()))}
    )
    assert lost != notice


class Here:
    """Both ends at once."""

    def __init__(self, held: Held) -> None:
        self.held, self.base = held, Base()

    def publish(self, newest, weights) -> None:
        notice, changes = self.base.advance(newest, weights)
        if notice.changes is None:
            self.held.take("here", notice, weights.tensors)
        else:
            self.held.change("here", notice, changes)

    def close(self) -> None: ...


def test_an_engine_apart_serves_what_the_learner_publishes(make_decoder):
    """An engine whose copy, taken from what arrived, is not the learner's: the publisher knows it as one of its own."""
    learner, serving = make_decoder("bfloat16"), make_decoder("bfloat16")
    names = {name: weight.value for name, weight in learner.weights()}
    here = Here(Held(like(names)))
    publisher = Publisher(learner, [Remote("away", here)])

    class Engine:
        version, has_work, dead = None, False, False

        def receive(self, newest) -> None:
            self.version = newest

    engine = Engine()
    copied, shared = Copied("copied", serving, engine), Shared("shared", serving, engine)
    for step in range(3):
        for _, weight in learner.weights():
            weight.value[weight.value > 0.01] *= 1.01
            weight.repack()
        newest = publisher.publish(step)
        assert here.held.version == newest
        copied.receive(newest, {POLICY: here.held.weights})
        assert engine.version == newest and weight_version(serving, step) == newest
        shared.receive(newest, {POLICY: here.held.weights})
    assert publisher.sources() == {}
    with pytest.raises(DeliveryError, match="away was sent the weights of nothing"):
        Remote("away", here).receive(newest, {})
