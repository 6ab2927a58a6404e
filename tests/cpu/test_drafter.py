"""From a config to a model that drafts: what is refused, what it takes of memory, which of its tokens are kept."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from tandem import env
from tandem.config import override
from tandem.engine.config import DraftConfig, EngineConfig
from tandem.engine.drafters import drafter_of
from tandem.errors import ConfigError, ModelError
from tandem.kernels.build.toolchain import compiler
from tandem.models.checkpoint import Checkpoint, open_checkpoint
from tandem.models.config import ModelConfig
from tandem.models.decoder import Decoder
from tandem.run.drafter import kept_ids
from tandem.run.parts import Parts, build_parts, plan_parts
from tandem.speculate.model import ModelDrafter
from tandem.types import Request, Sampling

PAGES = {"kv_memory_bytes": 1 << 20, "max_sequences": 4, "batch_tokens": 128}
ASKED = [Request(f"r{i}", "r", tuple(range(5, 30 + i)), Sampling(max_new_tokens=30), seed=i) for i in range(6)]


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory, write_model: Callable[..., None]) -> Path:
    """A model, and its first layer alone as a smaller one."""
    folder = tmp_path_factory.mktemp("drafter")
    write_model(folder / "model", scale=10)
    shutil.copytree(folder / "model", folder / "small")
    changed(folder / "small", num_hidden_layers=1)
    tensors = load_file(folder / "small" / "model.safetensors")
    first = {name: tensor for name, tensor in tensors.items() if "layers.1." not in name}
    save_file(first, folder / "small" / "model.safetensors", metadata={"format": "pt"})
    return folder


def changed(folder: Path, **values: object) -> None:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | values))


def engine(home: Path, model: str = "small", **draft: object) -> EngineConfig:
    return EngineConfig(**PAGES, draft=DraftConfig("model", 5, "fixed", model=str(home / model), **draft))  # type: ignore[arg-type]


def parts(home: Path, config: EngineConfig, learns: bool = False) -> Parts:
    return build_parts(ModelConfig(str(home / "model")), config, learns=learns)


def planned(home: Path, config: EngineConfig, **model: str) -> dict[str, int]:
    """Lines of the plan in bytes; no weight is read."""
    checkpoint = open_checkpoint(str(home / "model"))
    asked = replace(ModelConfig(str(home / "model")), **model)
    plan = plan_parts(checkpoint, checkpoint.load_tokenizer(), asked, config, 0, None, use="serve")
    return {line.name: line.size_bytes for line in plan.lines}


@pytest.mark.skipif(compiler() is None, reason="the reference kernels' bits depend on the batch")
def test_a_config_drafts_and_changes_no_bit(home):
    """A drafter named by a config is not what drafts, each engine loads its weights anew, or texts are others."""
    plain = parts(home, EngineConfig(**PAGES)).engine.generate(ASKED)
    found = parts(home, engine(home))
    again = found.another()
    one, other = (each.scheduler.drafting.drafter for each in (found.engine, again))
    assert isinstance(one, ModelDrafter) and isinstance(other, ModelDrafter) and one is not other
    assert one.paged.decoder is other.paged.decoder and len(one.paged.decoder.layers) == 1
    for each in (found.engine, again):
        done = each.generate(ASKED)
        assert [(c.tokens, c.logprobs) for c in done] == [(c.tokens, c.logprobs) for c in plain]
        assert each.stats.drafted_tokens > 50
    own = parts(home, engine(home, "model")).engine
    own.generate(ASKED)
    assert own.stats.accepted_tokens == own.stats.drafted_tokens > 100


def test_what_does_not_fit_is_refused(home, tmp_path, monkeypatch):
    """A drafter that reads other tokens, lacks a head, has other shapes or a device that it is not for is noticed when
    weights are read, or never."""
    monkeypatch.setattr(Checkpoint, "tensors", lambda *_: pytest.fail("weights were read"))
    shutil.copytree(home / "small", tmp_path / "other")
    words = tmp_path / "other" / "tokenizer.json"
    words.write_text(words.read_text().replace('"~"', '"\u00a1"'))
    with pytest.raises(ConfigError, match=r"other reads other tokens than .*: 99 and 99 of them, .*'~'"):
        planned(home, engine(tmp_path, "other"))
    shutil.copytree(home / "small", tmp_path / "headless")
    changed(tmp_path / "headless", tie_word_embeddings=False)
    with pytest.raises(ModelError, match=r"headless.*lm_head\.weight"):
        planned(home, engine(tmp_path, "headless"))
    shutil.copytree(home / "small", tmp_path / "wide")
    changed(tmp_path / "wide", hidden_size=64)
    with pytest.raises(ModelError, match=r"wide.*shape"):
        planned(home, engine(tmp_path, "wide"))
    with pytest.raises(ModelError, match="no model at"):
        planned(home, engine(tmp_path, "absent"))
    with pytest.raises(ConfigError, match=r"vocabulary is 100, of 99"):
        planned(home, engine(home, vocabulary=100))
    with pytest.raises(ConfigError, match=r"vocabulary_of .*absent is not there"):
        planned(home, engine(home, vocabulary=9, vocabulary_of=str(tmp_path / "absent")))
    with pytest.raises(ConfigError, match=r"leave engine\.kv_window out"):
        planned(home, replace(engine(home), kv_window=16))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda: (1 << 34, 1 << 34))
    with pytest.raises(ConfigError, match=r"model\.device cuda: models draft on the CPU alone"):
        planned(home, engine(home), device="cuda")


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"engine.draft.by": "model"}, "Give both"),
        ({"engine.draft.model": "small", "engine.draft.by": "lookup"}, "Give both"),
        ({"engine.draft.by": "suffix", "engine.draft.vocabulary": "9"}, "no whole head"),
        ({"engine.draft.by": "model", "engine.draft.model": "m", "engine.draft.vocabulary_of": "t"}, "how many tokens"),
    ],
)
def test_settings_that_do_not_go_together_are_refused(settings, said):
    """A setting that nothing reads is taken."""
    with pytest.raises(ConfigError, match=said):
        override(EngineConfig(), {name.removeprefix("engine."): value for name, value in settings.items()})


def test_a_model_does_not_draft_without_a_runner():
    """A simulator that is told to draft by a model says nothing, or raises at once."""
    with pytest.raises(ConfigError, match=r"this engine's runner was given none"):
        drafter_of(DraftConfig("model", model="small")).draft([], [])


def held(decoder: Decoder) -> int:
    tensors = {
        t.data_ptr(): t for _, w in decoder.weights() for t in (w.value, w.packed) if t is not None and not t.is_meta
    }
    return sum(tensor.nbytes for tensor in tensors.values())


@pytest.mark.parametrize("vocabulary", [0, 40])
def test_a_plan_knows_a_drafter(home, vocabulary):
    """A drafter's weights or pages are in no line of the plan, or its pages take what is not there."""
    text = home / "text.txt"
    text.write_text("12+34=46")
    config = engine(home, vocabulary=vocabulary, **({"vocabulary_of": str(text)} if vocabulary else {}))
    lines, found = planned(home, config), parts(home, config)
    drafter = found.engine.scheduler.drafting.drafter
    assert isinstance(drafter, ModelDrafter)
    if drafter.paged.decoder.compiled:
        rows = drafter.head._rows
        kept = 0 if not vocabulary else rows.value.nbytes + rows.packed.nbytes
        # norms are in both, and a panel has 64 rows
        assert abs(lines["drafter"] / (held(drafter.paged.decoder) + kept) - 1) < 0.1
    assert lines["drafter's keys and values"] == sum(pool.nbytes for pool in drafter.paged.pools)
    alone = planned(home, replace(config, kv_memory_bytes=0, draft=DraftConfig()))
    beside = planned(home, replace(config, kv_memory_bytes=0))
    assert beside["pages of keys and values"] <= alone["pages of keys and values"]


def test_pages_and_a_drafters_share_what_there_is(home, monkeypatch):
    """Pages of the engine fill what is left, and a drafter's beside them, twice as large, what is not."""
    checkpoint = open_checkpoint(str(home / "small"))
    given = checkpoint, checkpoint.load_tokenizer(), ModelConfig(str(home / "small"))
    monkeypatch.setattr(env, "memory_bytes", lambda: (1 << 30, 100 << 20))
    config = replace(engine(home, "model"), kv_memory_bytes=0, max_sequences=6000, batch_tokens=6000)
    plan = plan_parts(*given, config, 0, None, use="serve")
    lines = {line.name: line.size_bytes for line in plan.lines}
    assert plan.short() is None
    assert lines["drafter's keys and values"] > 1.9 * lines["pages of keys and values"] > 16 << 20


def test_which_tokens_are_kept(home, tmp_path):
    """Frequencies are those of other texts, of a run's first steps, or of a map in another order; or stop tokens go."""
    tokenizer = open_checkpoint(str(home / "model")).load_tokenizer()
    ids = {text: tokenizer.encode(text)[0] for text in "abcdef~"}

    def kept(path: Path, count: int, **more: int) -> list[int]:
        asked = DraftConfig("model", model="m", vocabulary=count, vocabulary_of=str(path), **more)
        return kept_ids(asked, tokenizer, 99)

    (tmp_path / "text.txt").write_text("aab aab ccccc a")
    assert kept(tmp_path / "text.txt", 2) == sorted([ids["a"], ids["c"]])
    (tmp_path / "lines.jsonl").write_text('{"text": "ddd"}\n{"text": "dee"}\n')
    assert kept(tmp_path / "lines.jsonl", 2) == sorted([ids["d"], ids["e"]])
    steps = tmp_path / "run" / "trajectories"
    steps.mkdir(parents=True)
    for step, text in ((2, "aaaa"), (10, "bbb"), (9, "cc")):
        (steps / f"step-{step}.jsonl").write_text(json.dumps({"text": text}) + "\n")
    assert kept(tmp_path / "run", 1, history=4) == [ids["b"]] and kept(tmp_path / "run", 1, history=40) == [ids["a"]]
    torch.save(torch.tensor([7, 3, 50]), tmp_path / "map.pt")
    assert kept(tmp_path / "map.pt", 2) == [7, 3]
    drafter = parts(
        home, engine(home, vocabulary=2, vocabulary_of=str(tmp_path / "map.pt"))
    ).engine.scheduler.drafting.drafter
    assert isinstance(drafter, ModelDrafter) and drafter.head.ids == sorted({3, 7, *tokenizer.stop_token_ids})
    torch.save([7, 99], tmp_path / "map.pt")
    with pytest.raises(ConfigError, match="99, outside the vocabulary of 99"):
        kept(tmp_path / "map.pt", 2)
    (tmp_path / "map.pt").write_text("no map")
    with pytest.raises(ConfigError, match="is no list of token ids"):
        kept(tmp_path / "map.pt", 2)
