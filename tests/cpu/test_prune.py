"""Students cut out of teachers: which parts are kept, and that what is kept computes what it computed."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from tandem.cli.main import main
from tandem.errors import ConfigError
from tandem.models.checkpoint import open_checkpoint
from tandem.models.decoder import Decoder
from tandem.models.parts import expected_shapes
from tandem.models.spec import LayerAttention, ModelSpec
from tandem.models.view import PackView
from tandem.surgery.prune import Kept, Size, choose, evenly, measured, most, pieces, pruned
from tandem.types import Reach

TOKENS = [5, 9, 2, 7, 3, 11, 40, 41]


def logits(decoder: Decoder) -> torch.Tensor:
    with torch.no_grad():
        hidden = decoder.forward(torch.tensor(TOKENS), PackView([0, len(TOKENS)]))
        return decoder.logits(hidden)


def student(teacher: Decoder, size: Size, kept: Kept | None = None) -> Decoder:
    wanted = size.of(teacher.spec)
    spec, tensors = pruned(teacher.spec, teacher.export(), wanted, kept or choose(teacher.spec, wanted))
    return Decoder(spec, "float32").load(tensors.items())


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"architecture": "qwen2", "attention_bias": True, "tied_embeddings": True},
        {"architecture": "qwen3", "qk_norm": True},
    ],
    ids=("llama", "qwen2", "qwen3"),
)
def test_what_does_nothing_can_go(changes: dict[str, Any]) -> None:
    """A tensor is cut at other places than its neighbours: parts whose outputs are 0 are taken out, and logits stay."""
    teacher = random_model(layers=4, **changes)
    for index, layer in enumerate(teacher.layers):
        layer.mix.out.value.view(32, 4, 16)[:, [1, 2, 3] if index == 1 else [0, 1, 2]] = 0.0  # of all heads but one
        layer.feed.down.value[:, 10:] = 0.0
        if index in (0, 2):
            layer.mix.out.value.zero_()
            layer.feed.down.value.zero_()
    teacher.repack()
    neurons = tuple(range(10))
    kept = Kept((1, 3), {1: (0,), 3: (1,)}, {1: (0,), 3: (3,)}, {1: neurons, 3: neurons}, tuple(range(32)))
    made = student(teacher, Size(layers=2, heads=1, kv_heads=1, ff_width=10), kept)
    assert made.spec.layers == 2 and made.spec.heads == made.spec.kv_heads == 1 and made.spec.ff_width == 10
    torch.testing.assert_close(logits(made), logits(teacher), rtol=1e-4, atol=1e-4)


def random_model(architecture: str = "llama", **changes: Any) -> Decoder:
    """Biases and norms random too."""
    shape = {"vocab_size": 97, "width": 32, "ff_width": 48, "layers": 4, "heads": 4, "kv_heads": 2, "head_size": 16}
    spec = ModelSpec(architecture, **{**shape, "max_position": 256, **changes})
    generator = torch.Generator().manual_seed(0)
    tensors = {}
    for name, size in expected_shapes(spec).items():
        noise = torch.randn(size, generator=generator)
        tensors[name] = noise * 2 / size[-1] ** 0.5 if len(size) == 2 else 1 + 0.2 * noise
    return Decoder(spec, "float32").load(tensors.items())


def test_channels_that_are_always_zero_can_go(make_decoder: Callable[..., Decoder]) -> None:
    """The residual stream is cut at other places in one matrix than in another."""
    teacher = make_decoder()
    gone = list(range(1, 32, 4))
    teacher.embed.value[:, gone] = 0.0
    for layer in teacher.layers:
        layer.mix.out.value[gone] = 0.0
        layer.feed.down.value[gone] = 0.0
    teacher.repack()
    wanted, whole = logits(teacher), choose(teacher.spec, teacher.spec)
    # The mean square over the 24 that are left is larger by 32 / 24.
    for weight in [teacher.norm, *(norm for one in teacher.layers for norm in (one.mix.norm, one.feed.feed_norm))]:
        weight.value *= (32 / 24) ** 0.5
    channels = tuple(index for index in range(32) if index not in gone)
    made = student(teacher, Size(width=24), dataclasses.replace(whole, channels=channels))
    torch.testing.assert_close(logits(made), wanted, rtol=1e-3, atol=1e-3)


def test_importance_is_measured_where_it_is(make_decoder: Callable[..., Decoder]) -> None:
    """A layer, head, neuron or channel that does most is not the one that is kept, or scores are another layer's."""
    teacher = make_decoder(layers=3)
    for index, layer in enumerate(teacher.layers):
        layer.mix.out.value *= 0.01
        layer.feed.down.value *= 0.01
        qkv = layer.mix.qkv.value  # q of 4 heads, k of 2, v of 2, of 16 rows each
        qkv[6 * 16 :] *= 0.1
        qkv[(6 + index % 2) * 16 : (7 + index % 2) * 16] *= 30.0  # v of one key head
        layer.feed.gate_up.value[48 + 7 * index] *= 50.0
    teacher.layers[1].feed.down.value *= 300.0
    for layer in teacher.layers:
        layer.mix.norm.value[3] *= 9.0
    teacher.repack()
    found = measured(teacher, [TOKENS, TOKENS[::-1]])
    wanted = Size(layers=1, heads=1, kv_heads=1, ff_width=1, width=2).of(teacher.spec)
    assert int(found.layers_L.argmax()) == 1 and int(found.channels_M.argmax()) == 3
    assert found.neurons_LF.argmax(1).tolist() == [0, 7, 14]
    kept = choose(teacher.spec, wanted, found)
    assert kept.layers == (1,) and kept.kv_heads == {1: (1,)} and kept.neurons == {1: (7,)} and 3 in kept.channels
    assert kept.heads[1][0] in (2, 3)
    both = measured(teacher, [TOKENS]), measured(teacher, [TOKENS[::-1]])
    mean = (both[0].neurons_LF + both[1].neurons_LF) / 2
    torch.testing.assert_close(found.neurons_LF, mean)
    states: list[torch.Tensor] = [teacher.embed.value[torch.tensor(TOKENS)]]
    with torch.no_grad():
        view = PackView([0, len(TOKENS)])
        teacher.forward(torch.tensor(TOKENS), view, watch=lambda _, hidden: states.append(hidden.clone()))
    for index in range(3):
        cosine = torch.nn.functional.cosine_similarity(states[index].double(), states[index + 1].double(), dim=-1)
        assert float(both[0].layers_L[index]) == pytest.approx(float(1 - cosine.mean()), rel=1e-4, abs=1e-6)


def test_evenly_and_most() -> None:
    """A part is kept twice or out of order, or the last layer, which the head reads, is dropped first."""
    for count in range(1, 33):
        for kept in range(1, count + 1):
            for ends in (False, True):
                chosen = evenly(count, kept, ends=ends)
                assert list(chosen) == sorted(set(chosen)) and len(chosen) == kept and chosen[-1] < count
            assert kept == 1 or evenly(count, kept, ends=True)[:: kept - 1] == (0, count - 1)
    assert most(torch.tensor([3.0, 1.0, 3.0, 2.0]), 2) == (0, 2)
    assert [len(one) for one in pieces([range(1100), range(30)], 512)] == [512, 512, 76, 30]
    assert [len(one) for one in pieces([range(300)], 128)] == [128, 128, 44]


def test_layers_keep_their_reach() -> None:
    """A layer with a window has another layer's after some were dropped."""
    window, whole = LayerAttention(Reach(window=8)), LayerAttention()
    spec = ModelSpec("qwen3", 32, 8, 16, 6, 2, 1, 4, qk_norm=True, attention=(window, window, whole))
    wanted = Size(layers=3).of(spec)
    made, _ = pruned(spec, iter(()), wanted, Kept((1, 2, 5), {}, {}, {}, ()))
    assert made.layer_attention == (window, whole, whole)


@pytest.mark.parametrize(
    ("size", "said"),
    [
        (Size(layers=9), "layers is 9, and the model has 2"),
        (Size(ff_width=0), "ff_width is 0"),
        (Size(heads=3), "3 heads do not go to 2 key-value heads"),
        (Size(heads=4, kv_heads=1), "4 heads do not go to 1 key-value heads of at most 2"),
        (Size(width=7), "width is 7; give an even one"),
    ],
)
def test_sizes_that_do_not_fit(make_decoder: Callable[..., Decoder], size: Size, said: str) -> None:
    """A size that the teacher has not ends in a traceback, or in a model that no class loads."""
    with pytest.raises(ConfigError, match=said):
        size.of(make_decoder().spec)
    with pytest.raises(ConfigError, match="there is no text"):
        measured(make_decoder(), [])


def test_the_verb(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """What is written is no model that Transformers and tandem load alike, or a folder is overwritten."""
    import transformers

    source = "new:width=64,layers=6,heads=4,kv_heads=2,ff_width=96,max_position=128"
    out, text = tmp_path / "student", tmp_path / "text.txt"
    text.write_text("12 + 34 - 5 = 46 - 5 = 41\n" * 9)
    sizes = ["--size", "layers=3", "--size", "heads=2", "--size", "kv_heads=1", "--size", "ff_width=40"]
    command = ["convert", "prune", source, "--out", str(out), *sizes, "--size", "width=48"]
    assert main([*command, "--measure", str(text), "--json"]) == 0
    said = json.loads(capsys.readouterr().out)
    checkpoint = open_checkpoint(str(out))
    assert said["layers"] == 3 and len(said["kept_layers"]) == 3 and len(said["importance_of_layers"]) == 6
    assert said["parameters"] == sum(tensor.numel() for _, tensor in checkpoint.tensors()) < said["of"]
    model = transformers.AutoModelForCausalLM.from_pretrained(out, dtype=torch.float32)
    decoder = Decoder(checkpoint.spec, "float32").load(checkpoint.tensors())
    with torch.no_grad():
        theirs = model(torch.tensor([TOKENS])).logits[0]
    torch.testing.assert_close(logits(decoder), theirs, rtol=1e-3, atol=1e-4)
    assert checkpoint.load_tokenizer().encode("12") == open_checkpoint(source).load_tokenizer().encode("12")
    assert main(command) == 2 and "is there already" in capsys.readouterr().err
    adapter = tmp_path / "adapter"
    adapter.mkdir()
    (adapter / "adapter_config.json").write_text("{}")
    assert main(["convert", "prune", str(adapter), "--out", str(tmp_path / "other"), "--size", "layers=3"]) == 2
    assert f"tandem convert merge {adapter} --out DIR" in capsys.readouterr().err
    for wrong, why in (
        (["--size", "depth=3"], "no 'depth'"),
        (["--size", "layers=x"], "give a whole number"),
        ([], "nothing is to be left out. Give --size NAME=N"),
        (["--size", "layers=3", "--set", "seed=1"], "give them to `convert teacher`"),
        (["--size", "layers=3", "--measure", str(tmp_path / "none")], "cannot be read"),
    ):
        assert main(["convert", "prune", source, "--out", str(tmp_path / "other"), *wrong]) == 2
        assert why in capsys.readouterr().err and not (tmp_path / "other").exists()
