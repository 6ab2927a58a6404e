"""An engine that serves other weights than the learner published."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from tandem.engine.config import EngineConfig
from tandem.engine.engine import Engine
from tandem.engine.runner import DecoderRunner
from tandem.errors import CheckpointError, DeliveryError
from tandem.kernels.build.toolchain import compiler
from tandem.kernels.quantise import dequantise, quantise
from tandem.kernels.rounding import Rounding
from tandem.models.decoder import Decoder
from tandem.numerics.compare import same_bits
from tandem.numerics.digest import tensor_hashes
from tandem.sync.publish import Publisher, weight_version
from tandem.sync.receive import POLICY, Copied, Shared, Weights, integers_of
from tandem.types import Request, Sampling, WeightVersion

NEEDS_COMPILER = pytest.mark.skipif(compiler() is None, reason="without a compiler nothing is packed")


def engine_on(decoder: Decoder, config: EngineConfig) -> Engine:
    return Engine(DecoderRunner(decoder, 32, config.page_tokens), config, 32)


@pytest.fixture
def publisher(make_decoder):
    return lambda lag=0, **departures: make_publisher(make_decoder(dtype="bfloat16"), lag, **departures)


class Ours(Publisher):
    """A publisher, and what lies beyond its receivers."""

    def __init__(self, learner, receivers, serving, source, engine, exact) -> None:
        super().__init__(learner, receivers)
        self.serving, self.source, self.engine, self.exact_engine = serving, source, engine, exact


def make_publisher(learner: Decoder, lag: int, **departures) -> Ours:
    config = EngineConfig(page_tokens=4, max_sequences=4, batch_tokens=64, **departures)
    spec = learner.spec
    rounded = config.weights != "same" or config.dtype != "same"
    dtype = "bfloat16" if config.dtype == "same" else config.dtype
    serving = Decoder(spec, dtype) if rounded or lag else learner
    source = (Decoder(spec, "bfloat16") if rounded else serving) if lag else None
    engine = engine_on(serving, config)
    exact = engine
    if serving is not learner:
        exact = engine_on(learner, EngineConfig(page_tokens=4, max_sequences=4, batch_tokens=64))
    receivers = [Shared("exact", learner, exact)]
    if serving is not learner:
        receivers.append(Copied("copied", serving, engine, rounding=integers_of(config), lag=lag, source=source))
    return Ours(learner, receivers, serving, source, engine, exact)


def update(ours: Publisher, step: int) -> None:
    """Other weights in the learner, as an optimiser step leaves them."""
    generator = torch.Generator().manual_seed(step)
    for _, weight in ours.learner.weights():
        weight.value += 0.01 * torch.randn(weight.value.shape, generator=generator).to(weight.value.dtype)
        weight.repack()


def test_shared_weights_are_published_without_a_copy(publisher):
    """A copy a step where learner and engine share memory, or an engine that does not hear of the update."""
    ours = publisher()
    first = ours.publish(0)
    update(ours, 1)
    second = ours.publish(1)
    assert ours.serving is ours.learner and first.digest != second.digest
    assert ours.engine.version == second == weight_version(ours.learner, 1)


@NEEDS_COMPILER
@pytest.mark.parametrize("name", ["layers.1.gate_up", "layers.0.qkv", "head"])
def test_weights_not_packed_again_are_found(publisher, name):
    """An update that the matrix products do not see: the engine samples from the old weights under the new name."""
    ours = publisher()
    ours.publish(0)
    weight = dict(ours.learner.weights())[name]
    weight.value[0, 0] += 1.0
    with pytest.raises(DeliveryError, match=f"after update 1 .* in 1 of .* {name}"):
        ours.publish(1)
    assert ours.engine.version.step == 0
    weight.repack()
    assert ours.publish(1).step == 1


@NEEDS_COMPILER
@pytest.mark.parametrize("weights", ["int8", "int4"])
def test_a_damaged_code_is_found(publisher, monkeypatch, weights):
    """One wrong bit on the way to an engine that computes with codes."""
    ours = publisher(weights=weights)
    ours.publish(0)
    update(ours, 1)
    target = dict(ours.serving.weights())["layers.1.down"]
    hold = type(target).hold

    def damaged(self, quantised, **options):
        held = hold(self, quantised, **options)
        if self is target:
            self.codes.packed[300] ^= 1
        return held

    monkeypatch.setattr(type(target), "hold", damaged)
    with pytest.raises(DeliveryError, match=r"in 1 of .* layers\.1\.down"):
        ours.publish(1)
    assert ours.engine.version.step == 0


def test_a_damaged_copy_is_found(publisher, monkeypatch):
    """One wrong element on the way to an engine with weights of its own."""
    ours = publisher(dtype="float32")
    ours.publish(0)
    update(ours, 1)
    target = dict(ours.serving.weights())["layers.1.down"]
    repack = type(target).repack

    def damaged(self):
        if self is target:
            self.value[3, 5] += 1.0
        repack(self)

    monkeypatch.setattr(type(target), "repack", damaged)
    with pytest.raises(DeliveryError, match=r"layers\.1\.down"):
        ours.publish(1)
    assert ours.engine.version.step == 0


@pytest.mark.parametrize(("name", "bits"), [("int8", 8), ("int4", 4)])
def test_rounded_weights_are_those_of_the_quantiser(publisher, name, bits):
    """Another tensor rounded than was asked for, head and norms rounded too, or the learner's own weights touched."""
    ours = publisher(weights=name, weight_group=32)
    before = {key: weight.value.clone() for key, weight in ours.learner.weights()}
    ours.publish(0)
    served = dict(ours.serving.weights())
    for key, weight in ours.learner.weights():
        assert same_bits(weight.value, before[key])
        matrix = weight.value.ndim == 2 and key not in ("embed", "head")
        expected = dequantise(quantise(weight.value, bits, 32), torch.bfloat16) if matrix else weight.value
        assert same_bits(served[key].served(), expected)
        held = served[key].codes
        assert held.bits == bits if matrix and compiler() is not None else held is None
    assert any(not same_bits(served[key].served(), before[key]) for key in before)


def test_another_dtype_holds_the_same_numbers(publisher):
    """A float32 engine that is given rounded weights, or serves none at all."""
    ours = publisher(dtype="float32")
    ours.publish(0)
    for (key, weight), (other, served) in zip(ours.learner.weights(), ours.serving.weights(), strict=True):
        assert key == other and served.value.dtype == torch.float32
        assert torch.equal(weight.value.float(), served.value)


@pytest.mark.parametrize("lag", [1, 3])
@pytest.mark.parametrize("departures", [{}, {"weights": "int4"}])
def test_lag_serves_the_weights_of_so_many_updates_ago(publisher, lag, departures):
    """An engine one update off, a snapshot that shares the learner's memory, a source that is not what sampled."""
    ours = publisher(lag, **departures)
    versions, values = [], []
    for step in range(7):
        if step:
            update(ours, step)
        versions.append(ours.publish(step))
        values.append(ours.learner.layers[0].mix.qkv.value.clone())
        due = max(0, step - lag)
        assert ours.engine.version == versions[due] and ours.exact_engine.version == versions[step]
        assert ours.source is not None and same_bits(ours.source.layers[0].mix.qkv.served(), values[due])
        assert same_bits(ours.serving.layers[0].mix.qkv.served(), values[due]) is (not departures)
    assert len({version.digest for version in versions}) == 7


def test_a_resumed_lag_goes_on_with_the_same_weights(publisher, tmp_path):
    """A resumed run whose engine starts with the newest weights: the run would not repeat."""
    ours = publisher(2)
    for step in range(4):
        update(ours, step)
        ours.publish(step)
    ours.save(tmp_path)
    resumed = publisher(2)
    for (_, weight), (_, trained) in zip(resumed.learner.weights(), ours.learner.weights(), strict=True):
        weight.value.copy_(trained.value)
        weight.repack()
    resumed.publish(0)
    resumed.load(tmp_path)
    resumed.publish(3)
    assert resumed.engine.version == ours.engine.version and resumed.engine.version.step == 1
    for both in (ours, resumed):
        update(both, 4)
        both.publish(4)
    assert resumed.engine.version == ours.engine.version and resumed.engine.version.step == 2
    path = sorted(tmp_path.glob("stale-*"))[0]
    path.write_bytes(path.read_bytes()[:-100] + bytes(100))
    with pytest.raises(CheckpointError, match="does not hold the weights"):
        resumed.load(tmp_path)


@NEEDS_COMPILER
def test_a_changed_page_is_not_shared(publisher):
    """Keys and values overwritten under their name: every later request with that prefix reads them."""
    ours = publisher()
    ours.publish(0)
    engine, prompt = ours.engine, tuple(range(3, 20))
    request = Request("a", "a", prompt, Sampling(max_new_tokens=2), seed=1)
    first = engine.generate([request])[0]
    again = engine.generate([dataclasses.replace(request, id="b")])[0]
    assert again.cached_tokens == 16 and again.logprobs == first.logprobs
    keys, _ = engine.runner.pools[1].tensors()
    keys[engine.scheduler.index.match(_keys(engine, prompt), 4)[0][2], 1] += 1
    with pytest.raises(DeliveryError, match="page"):
        engine.generate([dataclasses.replace(request, id="c")])


def _keys(engine: Engine, tokens) -> list[bytes]:
    from tandem.engine.prefix import extend_keys, root_key

    keys: list[bytes] = []
    extend_keys(keys, root_key(engine.version), tokens, 4)
    return keys


@NEEDS_COMPILER
def test_two_engines_take_each_version(make_decoder, monkeypatch):
    """A publisher that knows one engine: the other goes on with old weights, or nobody checks what it got."""
    learner = make_decoder(dtype="bfloat16")
    config = EngineConfig(page_tokens=4, max_sequences=4, batch_tokens=64)
    decoders = [Decoder(learner.spec, "bfloat16") for _ in range(2)]
    engines = [engine_on(decoder, config) for decoder in decoders]
    publisher = Publisher(
        learner,
        [Copied("first", decoders[0], engines[0]), Copied("second", decoders[1], engines[1], rounding=Rounding(8, 32))],
    )
    for step in range(2):
        version = publisher.publish(step)
        assert [engine.version for engine in engines] == [version] * 2
        for name, weight in learner.weights():
            assert same_bits(dict(decoders[0].weights())[name].served(), weight.value)
        update(publisher, step + 1)
    target = dict(decoders[1].weights())["layers.1.down"]
    hold, repack = type(target).hold, type(target).repack
    monkeypatch.setattr(type(target), "hold", lambda self, sent: self is target or hold(self, sent))
    monkeypatch.setattr(type(target), "repack", lambda self: None if self is target else repack(self))
    with pytest.raises(DeliveryError, match=r"after update 2 second serves other .* in 1 of .* layers\.1\.down\."):
        publisher.publish(2)
    assert [engine.version.step for engine in engines] == [2, 1]


@pytest.mark.parametrize("departures", [{}, {"weights": "int8"}, {"weights": "w8a8"}, {"weights": "w4a8"}])
def test_a_tensor_changed_on_the_way_is_found(make_decoder, departures):
    """A receiver that checks only its own work: a damaged message is served, its hash being that of the damage."""
    learner = make_decoder(dtype="bfloat16")
    decoder = Decoder(learner.spec, "bfloat16")
    engine = engine_on(decoder, EngineConfig(page_tokens=4, max_sequences=4, batch_tokens=64))
    receiver = Copied("far", decoder, engine, rounding=integers_of(EngineConfig(**departures)))
    tensors = {name: weight.value.clone() for name, weight in learner.weights()}
    sent = Weights(tensors, tensor_hashes(tensors))
    tensors["layers.0.qkv"][1, 2] += 1.0
    with pytest.raises(DeliveryError, match=r"after update 3 far .* in 1 of .* layers\.0\.qkv\."):
        receiver.receive(WeightVersion(3, "3"), {POLICY: sent})
    with pytest.raises(DeliveryError, match="far was sent the weights adapter, policy; it serves policy alone"):
        receiver.receive(WeightVersion(3, "3"), {POLICY: sent, "adapter": sent})
    assert engine.version.step == 0


def test_shared_weights_do_not_change_under_what_runs(publisher):
    """An update of the learner in the middle of a sequence that runs on the same memory."""
    ours = publisher()
    ours.publish(0)
    ours.engine.submit(Request("a", "a", (3, 4, 5), Sampling(max_new_tokens=2), seed=1))
    with pytest.raises(AssertionError, match="weights changed under running requests"):
        ours.publish(1)


def test_a_version_is_scored_by_a_decoder_that_has_it(publisher):
    """Samples of one version scored by another's weights: the split into staleness and mismatch is wrong."""
    ours = publisher(2, weights="int8")
    for step in range(4):
        update(ours, step)
        ours.publish(step)
    sources = ours.sources()
    assert set(sources) == {3, 1} and sources[3] is ours.learner and sources[1] is ours.source
