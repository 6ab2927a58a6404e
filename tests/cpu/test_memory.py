"""What a plan says, made before a weight is read, against what the process then held."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from tandem import env
from tandem.engine.config import EngineConfig
from tandem.engine.engine import Engine
from tandem.engine.runner import DecoderRunner
from tandem.errors import CapacityError, ConfigError
from tandem.models.checkpoint import Checkpoint, save_checkpoint
from tandem.models.config import ModelConfig
from tandem.models.decoder import Decoder
from tandem.models.parts import expected_shapes
from tandem.models.spec import LayerAttention, ModelSpec
from tandem.models.view import PackView
from tandem.numerics.compare import same_bits
from tandem.plan.footprint import Asked, activation_bytes, kept_numbers, page_bytes
from tandem.recipes.smollm2_arithmetic_cpu import smollm2_arithmetic_cpu
from tandem.run.local import plan as plan_run
from tandem.run.parts import build_parts
from tandem.train import optimiser as optimising
from tandem.train.config import LearnerConfig
from tandem.train.offload import FileTensors
from tandem.train.optimiser import Optimiser
from tandem.types import Reach, Request, Sampling

SOURCES = Path(__file__).parents[2] / "src"
SPEC = ModelSpec(
    "llama", 48_000, 512, 1408, layers=6, heads=8, kv_heads=4, head_size=64, tied_embeddings=True, max_position=1024
)

# One process, so that torch is imported once: each stage takes more than the one before, and the peak only rises.
PROGRAM = """
import json, sys
from dataclasses import replace
from tandem import env
env.limit_spinning()
from tandem.algo.config import AlgoConfig
from tandem.algo.objective import PolicyGradient
from tandem.algo.pack import count_prompts
from tandem.columns import Columns
from tandem.engine.config import EngineConfig
from tandem.models.checkpoint import open_checkpoint
from tandem.models.config import ModelConfig
from tandem.models.decoder import Decoder
from tandem.program.config import TaskConfig
from tandem.run.config import RunConfig
from tandem.plan.memory import peak_bytes, resident_bytes
from tandem.run.parts import build_parts, plan_parts
from tandem.train.config import CriticConfig, LearnerConfig
from tandem.train.critic import Critic
from tandem.train.step import Learner
from tandem.types import Request, Sample, Sampling

model, engine = ModelConfig(sys.argv[1]), EngineConfig(kv_memory_bytes=32 << 20, batch_tokens=1024)
learner = LearnerConfig(microbatch_tokens=1024)
run = RunConfig("memory", 1, model, engine=engine, task=TaskConfig("jsonl", path="x"), learner=learner)
checkpoint = open_checkpoint(sys.argv[1])
tokenizer = checkpoint.load_tokenizer()

def planned(critic=None, **learner):
    given = replace(run, learner=replace(run.learner, **learner)) if learner else None
    if critic is not None:
        given = replace(given, algo=AlgoConfig(advantage="gae"), critic=critic)
    return plan_parts(checkpoint, tokenizer, model, engine, 0, given).peak()[0]

alone, kept, again = planned(), planned(activation_checkpointing="off"), planned(activation_checkpointing="on")
away = planned(activation_checkpointing="on", optimiser_offload="disk")
judged = {own: planned(CriticConfig(sys.argv[1] if own else ""), activation_checkpointing="off") for own in (0, 1)}
del checkpoint
parts = build_parts(model, engine)
length, wanted = 512, parts.plan["kv_capacity_tokens"]
asked = [
    Request(str(i), str(i), tuple((i + 7 * t) % 97 for t in range(length - 8)), Sampling(max_new_tokens=8), seed=i)
    for i in range(-(-wanted // length))
]
parts.engine.generate(asked)
seen = {"generate": (alone, peak_bytes())}
before = resident_bytes()
parts.engine.release_memory()
given_back = {"pages": (32 << 20, before - resident_bytes())}
mask = tuple(t >= 224 for t in range(256))
signs = tuple(float(m) * (1 - 2 * (t % 2)) for t, m in enumerate(mask))
rows = [tuple((3 + i * 17 + 7 * t) % 48000 for t in range(256)) for i in range(4)]
behaviour = (-9.0,) * 256
samples = [
    Sample(str(i), str(i), Columns.of(tokens=row, loss_mask=mask, advantages=signs, logprobs=behaviour))
    for i, row in enumerate(rows)
]

def learn(stage, plan, critic=None, **settings):
    config, algo, given = replace(run.learner, **settings), run.algo, samples
    if critic is not None:
        algo = AlgoConfig(advantage="gae")
        critic = Critic(critic, CriticConfig(), config, own=critic is not parts.decoder)
        earned = [replace(s, columns=s.columns.having(step_rewards=s.columns["advantages"])) for s in samples]
        given = critic.credit(algo, earned, count_prompts(samples))
    learner = Learner(parts.decoder, config, PolicyGradient(algo, 1.0), 10, critic=critic)
    learner.step(given, count_prompts(samples))
    parts.publisher.publish(1)
    before, grads = resident_bytes(), [weight.grad for _, weight in parts.decoder.weights()]
    written = [grad.fill_(0.0).nbytes for grad in grads]
    given_back[stage] = sum(written), resident_bytes() - before
    for _, weight in parts.decoder.weights():
        weight.grad = None
    seen[stage] = plan, peak_bytes()

learn("on disk", away, activation_checkpointing="on", optimiser_offload="disk")
learn("computed again", again, activation_checkpointing="on")
learn("kept", kept, activation_checkpointing="off")
learn("head", judged[0], parts.decoder, activation_checkpointing="off")
checkpoint = open_checkpoint(sys.argv[1])
trunk = Decoder(checkpoint.spec, model.dtype, model.device).load(checkpoint.tensors())
del checkpoint
learn("critic", judged[1], trunk, activation_checkpointing="off")
print(json.dumps([seen, given_back]))
"""


# The same of an adapter, whose base keeps one form of its matrices.
ADAPTED = """
import json, sys
from tandem import env
env.limit_spinning()
from tandem.algo.config import AlgoConfig
from tandem.algo.objective import PolicyGradient
from tandem.algo.pack import count_prompts
from tandem.columns import Columns
from tandem.engine.config import EngineConfig
from tandem.models.config import AdapterConfig, ModelConfig
from tandem.plan.memory import peak_bytes
from tandem.program.config import TaskConfig
from tandem.run.config import RunConfig
from tandem.run.parts import build_parts
from tandem.train.config import LearnerConfig
from tandem.train.step import Learner
from tandem.types import Sample

engine = EngineConfig(kv_memory_bytes=32 << 20, batch_tokens=1024)
learner = LearnerConfig(microbatch_tokens=1024, activation_checkpointing="off")
model, task = ModelConfig(sys.argv[1]), TaskConfig("jsonl", path="x")
run = RunConfig("memory", 1, model, adapter=AdapterConfig(rank=16), engine=engine, task=task, learner=learner)
parts = build_parts(model, engine, run=run)
mask = tuple(t >= 224 for t in range(256))
rows = [tuple((3 + i * 17 + 7 * t) % 48000 for t in range(256)) for i in range(4)]
known = {"loss_mask": mask, "advantages": mask, "logprobs": (-9.0,) * 256}
samples = [Sample(str(i), str(i), Columns.of(tokens=row, **known)) for i, row in enumerate(rows)]
Learner(parts.decoder, learner, PolicyGradient(run.algo, 1.0), 10).step(samples, count_prompts(samples))
parts.publisher.publish(1)
print(json.dumps([parts.memory.peak()[0], peak_bytes()]))
"""


def engine_of(decoder: Decoder) -> Engine:
    config = EngineConfig(page_tokens=16, batch_tokens=64, max_sequences=4)
    return Engine(DecoderRunner(decoder, 40, 16, config), config, 40)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory, write_model: Callable[..., None]) -> Path:
    """A random model of 42 M weights; its words are those of the small one."""
    folder = tmp_path_factory.mktemp("memory") / "model"
    write_model(folder)
    generator = torch.Generator().manual_seed(0)
    tensors = {
        name: 0.05 * torch.randn(shape, generator=generator, dtype=torch.bfloat16)
        for name, shape in expected_shapes(SPEC).items()
    }
    save_checkpoint(folder, SPEC, tensors, None, "bfloat16")
    return folder


def test_a_plan_is_what_is_then_used(model: Path, tmp_path: Path) -> None:
    """A kind of memory that no line counts, or that one counts twice: a run that was let in is killed at its peak."""
    environment = env.child(PYTHONPATH=str(SOURCES), TANDEM_CACHE=str(env.cache_dir()), OMP_NUM_THREADS="2")
    command = [sys.executable, "-c", PROGRAM, str(model)]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=300, env=environment)
    assert done.returncode == 0, done.stderr[-2000:]
    seen, given_back = json.loads(done.stdout)
    for stage, (planned, used) in seen.items():
        # Too little is a run that is killed. A critic of its own used 2,050 to 2,128 MB in three runs, 2,264 planned.
        assert -0.1 < planned / used - 1 < 0.15, f"{stage}: planned {planned / 1e6:.0f} MB, used {used / 1e6:.0f} MB"
    assert list(given_back) == ["pages", "on disk", "computed again", "kept", "head", "critic"]
    # Pages, and the gradients after a learner's step. The kernel may join pages given back to a huge one of its own
    # accord: of 169 MB of gradients 149 were seen to be away, once in some hundred runs. Kept ones would be 0.
    for what, (held, freed) in given_back.items():
        assert freed > 0.75 * held, f"{what}: {freed / 1e6:.0f} MB of {held / 1e6:.0f} MB were given back"


def test_an_adapters_plan_is_what_is_then_used(model: Path) -> None:
    """Frozen weights that keep two forms, gradients or moments, planned or not."""
    environment = env.child(PYTHONPATH=str(SOURCES), TANDEM_CACHE=str(env.cache_dir()), OMP_NUM_THREADS="2")
    command = [sys.executable, "-c", ADAPTED, str(model)]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=300, env=environment)
    assert done.returncode == 0, done.stderr[-2000:]
    planned, used = json.loads(done.stdout)
    assert -0.1 < planned / used - 1 < 0.15, f"planned {planned / 1e6:.0f} MB, used {used / 1e6:.0f} MB"


@pytest.mark.parametrize("checkpointing", [False, True])
def test_activations_are_those_that_are_kept(make_decoder: Callable[..., Decoder], checkpointing: bool) -> None:
    """A layer keeps another tensor for its backward pass, which the plan does not know."""
    decoder = make_decoder("bfloat16", width=64, ff_width=128, layers=6, heads=4, kv_heads=2, head_size=16)
    kept: dict[int, int] = {}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    rows = 200
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        view = PackView([0, rows])
        hidden = decoder.forward(torch.arange(rows) % 97, view, checkpointing=checkpointing)
    running = rows * 2 * kept_numbers(decoder.spec) * (2 if checkpointing else 1)
    planned = activation_bytes(decoder.spec, rows, 2, checkpointing) - running
    assert hidden.requires_grad and abs(sum(kept.values()) - planned) < 0.1 * planned + rows * 8 * decoder.spec.width


@pytest.mark.parametrize("offload", ["host", "disk"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_an_offloaded_optimiser_has_the_same_bits(
    make_decoder: Callable[..., Decoder], monkeypatch: pytest.MonkeyPatch, tmp_path: Path, dtype, offload
) -> None:
    """A slice that is left out or updated twice, and state that is lost when its memory is let go or it is saved."""
    monkeypatch.setattr(optimising, "SLICE", 1000)
    monkeypatch.setattr(optimising, "FileTensors", lambda _, *counts: FileTensors(tmp_path, *counts))
    made = {}
    for place in ("none", offload):
        decoder = make_decoder(dtype)
        config = LearnerConfig(optimiser_offload=place, weight_decay=0.1)
        optimiser = Optimiser(decoder, config)
        generator = torch.Generator().manual_seed(0)
        for update in range(4):
            for _, weight in decoder.weights():
                weight.grad.normal_(generator=generator)
            optimiser.step(1e-2, optimiser.grad_norm())
            if update == 1:  # go on from what was saved
                saved = {name: tensor.clone() for name, tensor in optimiser.tensors()}
                optimiser = Optimiser(make_decoder(dtype, seed=1), config)
                decoder = optimiser.model
                optimiser.load(saved, 2)
        made[place] = dict(optimiser.tensors()), {name: weight.value for name, weight in decoder.weights()}
    for wanted, found in zip(*made.values(), strict=True):
        assert wanted.keys() == found.keys()
        assert all(same_bits(found[name], tensor) for name, tensor in wanted.items())
    assert not list(tmp_path.iterdir())  # the file has no name, so nothing is left behind


def test_a_disk_without_room_is_refused(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """A full disk is noticed by a signal in the middle of an update."""

    def full(*_: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "posix_fallocate", full)
    with pytest.raises(CapacityError, match=r"has no room for 4\.0 GB .*No space left.*TANDEM_CACHE"):
        FileTensors(tmp_path, 10**9, 1)


def test_a_disk_that_is_none_is_said(tmp_path: Path) -> None:
    """A path that cannot be made is taken for a full disk."""
    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigError, match=r"no file can be made in .*file/cache .*Set TANDEM_CACHE"):
        FileTensors(tmp_path / "file" / "cache", 10, 1)


@pytest.mark.parametrize(
    "attention", [(), (LayerAttention(Reach(window=20)), LayerAttention())], ids=["full", "window"]
)
def test_what_an_engine_gave_back_is_not_found_again(make_decoder: Callable[..., Decoder], attention) -> None:
    """A block is found by its name after its page's memory was given back: other tokens, or a delivery error."""
    engine = engine_of(make_decoder("bfloat16", **({"attention": attention} if attention else {})))
    prompt = tuple((5 * i + 3) % 97 for i in range(50))
    asked = [Request(f"r/{i}", "r", prompt, Sampling(max_new_tokens=12), seed=i) for i in range(6)]
    first = engine.generate(asked)
    assert engine.scheduler.pool.cached
    engine.release_memory()
    engine.check_integrity()
    assert engine.scheduler.pool.num_free == engine.scheduler.pool.num_pages and not len(engine.scheduler.index)
    found = engine.stats.cached_tokens
    again = engine.generate(asked)
    assert [done.tokens for done in again] == [done.tokens for done in first]
    assert [done.logprobs for done in again] == [done.logprobs for done in first]
    assert engine.stats.cached_tokens == 2 * found and again[0].cached_tokens == 0
    engine.submit(asked[0])
    with pytest.raises(AssertionError, match="1 requests are live"):
        engine.release_memory()


def test_a_plan_knows_the_least_request(model: Path) -> None:
    """`train --plan` says that 0 MB of pages are fine; the first prompt says otherwise, with the weights loaded."""
    config = replace(smollm2_arithmetic_cpu(), model=ModelConfig(str(model)))
    page = page_bytes(Asked(SPEC, config.model, config.engine))
    with pytest.raises(CapacityError, match=r"bytes is 1, but rollout\.max_new_tokens 24 after a prompt, of \d+ tok"):
        plan_run(replace(config, engine=EngineConfig(kv_memory_bytes=1)))
    with pytest.raises(CapacityError, match=r"no weight was read"):  # 24 tokens fit, and the system message does not
        plan_run(replace(config, engine=EngineConfig(kv_memory_bytes=2 * page)))
    assert plan_run(replace(config, engine=EngineConfig(kv_memory_bytes=20 * page))).short() is None


def test_nothing_is_loaded_that_does_not_fit(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Weights are read, and the process killed, before the plan is looked at."""
    monkeypatch.setattr(env, "memory_bytes", lambda: (1 << 30, 1 << 27))
    monkeypatch.setattr(Checkpoint, "tensors", lambda *_: pytest.fail("weights were read"))
    with pytest.raises(CapacityError, match=r"this machine has 134 MB free; no weight was read.*weights 85 MB"):
        build_parts(ModelConfig(str(model)), EngineConfig())


def test_what_only_serves_keeps_one_form(model: Path) -> None:
    """Matrices twice in memory where nobody learns, or a decoder without what its products or its embedding read."""
    config = EngineConfig(kv_memory_bytes=8 << 20)
    asked = [Request("r", "r", tuple(range(3, 40)), Sampling(max_new_tokens=6), seed=1)]
    both = build_parts(ModelConfig(str(model)), config)
    one = build_parts(ModelConfig(str(model)), config, learns=False)
    assert one.plan["weights"] == both.plan["weights"] and one.plan["parameters"] == both.plan["parameters"]
    if one.decoder.compiled:
        kept = {
            name for name, weight in one.decoder.weights() if weight.packed is not None and not weight.value.is_meta
        }
        assert kept == {"embed"}
    for first, second in zip(one.engine.generate(asked), both.engine.generate(asked), strict=True):
        assert (first.tokens, first.logprobs) == (second.tokens, second.logprobs)


@pytest.mark.parametrize("kv_dtype", ["same", "float8_e4m3", "int8", "int4", "kivi2"])
def test_the_pool_is_the_plans(model: Path, kv_dtype: str) -> None:
    """Where engine.kv_memory_bytes is left open, pages beyond what is free; pages planned without their scales, or but
    for those that are filled."""
    config = EngineConfig(kv_dtype=kv_dtype)
    parts = build_parts(ModelConfig(str(model)), config)
    free = parts.memory.available_bytes
    assert parts.plan["memory"]["kv_memory_bytes"] == parts.memory.kv_memory_bytes
    held = sum(pool.nbytes for pool in parts.engine.runner.pools)
    page = page_bytes(Asked(SPEC, ModelConfig(str(model)), config))
    assert held == parts.plan["kv_pages"] * page or kv_dtype == "kivi2"  # most fills fewer than it has
    assert parts.memory.kv_memory_bytes - page < held <= parts.memory.kv_memory_bytes < free / 2
