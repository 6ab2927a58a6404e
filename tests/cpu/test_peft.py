"""Adapters in PEFT's format: read, written, refused, merged; PEFT's own forward pass where it is installed.

Tolerance: two orders of adding fp32 numbers over some forty products, whose sums are about 1 to 100.
"""

from __future__ import annotations

import json
import warnings
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from tandem.errors import ConfigError, ModelError, TandemWarning
from tandem.models.adapter import AdapterSet, Base
from tandem.models.checkpoint import open_checkpoint, save_checkpoint
from tandem.models.config import PROJECTIONS, AdapterConfig, pattern_of
from tandem.models.decoder import Decoder
from tandem.models.peft import CONFIG, WEIGHTS, merged, read_adapter, save_adapter
from tandem.models.view import PackView
from tandem.run.merge import merge
from tandem.run.model import load
from tandem.run.source import origin_of
from tandem.sync.publish import weight_version

FORMS: dict[str, dict[str, Any]] = {
    "lora": {},
    "rslora": {"rslora": True},
    "dora": {"dora": True},
    "patterns": {
        "targets": ("q_proj", "v_proj", "up_proj"),
        "rank_pattern": (("layers.1.self_attn.q_proj", 5), ("layers.\\d.mlp.up_proj", 2)),
        "alpha_pattern": (("up_proj", 3.0),),
        "rslora": True,
        "dora": True,
    },
}
CONTEXT = [3, 1, 4, 1, 5, 9, 2, 6, 5, 3, 5]


def written(folder: Path, decoder: Decoder, base: str, **form: Any) -> AdapterSet:
    """An adapter that changes everything, in `folder`."""
    generator = torch.Generator().manual_seed(4)
    made = AdapterSet(decoder, replace(AdapterConfig(rank=4, alpha=8.0), **form)).draw(2)
    for one in made.additions:
        up = one.piece.up.value
        up.copy_(torch.randn(up.shape, generator=generator) / up.shape[1] ** 0.5)
        if one.piece.magnitude is not None:
            one.piece.magnitude.value *= 1 + 0.1 * torch.randn(len(up), generator=generator)
    made.repack()
    made.base = Base(base, weight_version(decoder, 0).digest)
    save_adapter(folder, made)
    return made


def logits(decoder: Decoder) -> torch.Tensor:
    with torch.no_grad():
        return decoder.logits(decoder.forward(torch.tensor(CONTEXT), PackView([0, len(CONTEXT)])))


@pytest.fixture
def model(tmp_path: Path, make_decoder: Any) -> tuple[Path, Decoder]:
    """In fp32, as a Hugging Face folder and loaded."""
    decoder = make_decoder()
    save_checkpoint(tmp_path / "model", decoder.spec, dict(decoder.export()), None, "float32")
    return tmp_path / "model", decoder


def test_patterns_are_matched_as_peft_matches_them() -> None:
    """`up_proj` that matches `group_proj`, an end that is none, or the last of several that match."""
    name = "model.layers.11.self_attn.q_proj"
    assert pattern_of(("layers.1.self_attn.q_proj", "proj", "q_proj", "self_attn.q_proj"), name) == "q_proj"
    assert pattern_of((r"layers\.1\d\..*",), name) == r"layers\.1\d\..*"
    assert pattern_of(("attn.q_proj", "layers.11"), name) is None
    config = AdapterConfig(rank=8, rank_pattern=(("q_proj", 2),), alpha_pattern=(("layers.11.*", 5.0),))
    assert config.size(name) == (2, 5.0) and config.size("model.layers.0.mlp.up_proj") == (8, 32.0)
    assert config.size("lm_head") is None


def test_files_by_hand(tmp_path: Path, make_decoder: Any) -> None:
    """A file that was written without tandem is read into other layers, or halves, or with another scale."""
    decoder = make_decoder()
    names = ["model.layers.0.self_attn.v_proj", "model.layers.1.mlp.down_proj"]
    sizes = {names[0]: (32, 32), names[1]: (32, 48)}  # [out, in]
    asked = {"peft_type": "LORA", "r": 2, "lora_alpha": 3, "target_modules": ["layers.0.self_attn.v_proj", "down_proj"]}
    asked |= {"use_rslora": True, "rank_pattern": {"v_proj": 1}, "lora_dropout": 0.1, "bias": "none"}
    (tmp_path / CONFIG).write_text(json.dumps(asked))
    tensors, generator = {}, torch.Generator().manual_seed(0)
    for name in [*names, "model.layers.0.mlp.down_proj"]:
        rows, depth = sizes.get(name, sizes[names[1]])
        rank = 1 if "v_proj" in name else 2
        tensors[f"base_model.model.{name}.lora_A.weight"] = torch.randn(rank, depth, generator=generator)
        tensors[f"base_model.model.{name}.lora_B.weight"] = torch.randn(rows, rank, generator=generator)
    save_file(tensors, tmp_path / WEIGHTS)
    before, other = logits(decoder), make_decoder()
    decoder.wear(read_adapter(tmp_path).onto(decoder))
    whole = dict(other.export())
    for name, scale in {names[0]: 3 / 1, names[1]: 3 / 2**0.5, "model.layers.0.mlp.down_proj": 3 / 2**0.5}.items():
        down, up = (tensors[f"base_model.model.{name}.lora_{side}.weight"] for side in "AB")
        whole[f"{name}.weight"] += scale * up @ down
    other.repack()
    torch.testing.assert_close(logits(decoder), logits(other), rtol=1e-4, atol=1e-3)
    assert (logits(decoder) - before).abs().max() > 0.1


@pytest.mark.parametrize("form", FORMS.values(), ids=FORMS)
def test_written_and_read_again(form: dict[str, Any], model: tuple[Path, Decoder], tmp_path: Path) -> None:
    """A tensor that is written from a view with the values of another, a setting that is lost; a merged model that is
    not what the adapter made."""
    folder, decoder = model
    made = written(tmp_path / "adapter", decoder, str(folder), **form)
    found = read_adapter(tmp_path / "adapter")
    assert found.config == replace(made.config, targets=tuple(sorted(made.config.targets)))
    assert found.base == str(folder)
    again = found.onto(decoder)
    for (name, one), (_, other) in zip(made.export(), again.export(), strict=True):
        assert torch.equal(one, other), name
    decoder.wear(again)
    wanted = logits(decoder)
    checkpoint = open_checkpoint(str(folder))
    tensors = dict(merged(checkpoint, made))
    torch.testing.assert_close(
        logits(Decoder(decoder.spec, "float32").load(tensors.items())), wanted, rtol=1e-4, atol=1e-3
    )
    made.additions[-1] = made.additions[-1]._replace(module="model.layers.9.mlp.down_proj")
    with pytest.raises(ModelError, match="have no model.layers.9.mlp.down_proj.weight, which the adapter adds to"):
        dict(merged(checkpoint, made))


def test_merged_is_a_model_of_its_own(tmp_path: Path, write_model: Any) -> None:
    """`tandem convert merge` writes the base, or a folder that Transformers reads otherwise."""
    import transformers

    write_model(tmp_path / "model", scale=10.0)
    checkpoint = open_checkpoint(str(tmp_path / "model"))
    decoder = Decoder(checkpoint.spec, "float32").load(checkpoint.tensors())
    made = written(tmp_path / "adapter", decoder, str(tmp_path / "model"))
    merge(str(tmp_path / "adapter"), tmp_path / "out", "float32")
    decoder.wear(made)
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype=torch.float32)
    with torch.no_grad():
        found = theirs(torch.tensor([CONTEXT])).logits[0]
    torch.testing.assert_close(found, logits(decoder), rtol=1e-3, atol=1e-3)
    with pytest.raises(ConfigError, match="exists already"):
        merge(str(tmp_path / "adapter"), tmp_path / "out", "float32")
    with pytest.raises(ConfigError, match="is no adapter"):
        merge(str(tmp_path / "model"), tmp_path / "another", "float32")
    assert not (tmp_path / "another.part").exists()
    assert origin_of(str(tmp_path / "adapter"))[0] == str(tmp_path / "model")


def test_a_base_that_has_moved_is_said(tmp_path: Path, write_model: Any) -> None:
    """A path of another machine that is taken for a hub's name; a merge that can't be told the new place."""
    write_model(tmp_path / "model")
    checkpoint = open_checkpoint(str(tmp_path / "model"))
    decoder = Decoder(checkpoint.spec, "float32").load(checkpoint.tensors())
    written(tmp_path / "adapter", decoder, str(tmp_path / "model"))
    (tmp_path / "model").rename(tmp_path / "moved")
    with pytest.raises(ModelError, match="base_model_name_or_path in its adapter_config.json.*moved.*--base"):
        origin_of(str(tmp_path / "adapter"))
    merge(str(tmp_path / "adapter"), tmp_path / "out", "float32", str(tmp_path / "moved"))
    assert (tmp_path / "out" / "model.safetensors").is_file()


def test_another_base_is_refused(tmp_path: Path, write_model: Any) -> None:
    """A base that was changed in its place, or another of the same shapes, taken without a word; a warning of the base
    that it is of; a merge that is not to be had even by who knows better."""
    write_model(tmp_path / "model")
    checkpoint = open_checkpoint(str(tmp_path / "model"))
    decoder = Decoder(checkpoint.spec, "bfloat16").load(checkpoint.tensors())
    written(tmp_path / "adapter", decoder, str(tmp_path / "model"))
    right = weight_version(decoder, 0).digest[:12]
    with warnings.catch_warnings():
        warnings.simplefilter("error", TandemWarning)
        merge(str(tmp_path / "adapter"), tmp_path / "out", "bfloat16")
    write_model(tmp_path / "model", scale=2.0)
    says = f"weights that hash to {right}, and those of .* hash to (?!{right})"
    with pytest.warns(TandemWarning, match=says):
        merge(str(tmp_path / "adapter"), tmp_path / "other", "bfloat16")
    with pytest.raises(ModelError, match=says):
        load(tmp_path / "adapter")


def spoil(folder: Path, config: dict[str, Any] | None = None, **tensors: torch.Tensor | None) -> None:
    if config is not None:
        (folder / CONFIG).write_text(json.dumps(json.loads((folder / CONFIG).read_text()) | config))
    held = load_file(folder / WEIGHTS)
    for end, tensor in tensors.items():
        name = next((name for name in held if name.endswith(end.replace("__", "."))), f"base_model.model.{end}")
        held.pop(name, None)
        held |= {} if tensor is None else {name: tensor}
    save_file(held, folder / WEIGHTS)


WRONG: dict[str, tuple[dict[str, Any], str]] = {
    "lacks": (
        {"layers__1__self_attn__o_proj__lora_B__weight": None},
        r"lacks 1 of the 28 tensors .*base_model.model.model.layers.1.self_attn.o_proj.lora_B.weight first\) and has 0",
    ),
    "beyond": (
        {"lm_head.lora_A.weight": torch.zeros(2, 2)},
        r"lacks 0 .* and has 1 beyond them \(base_model.model.lm_head.lora_A.weight first\)",
    ),
    "shape": (
        {"layers__0__mlp__up_proj__lora_A__weight": torch.zeros(3, 32)},
        r"layers.0.mlp.up_proj.lora_A.weight has shape \(3, 32\); .* wants \(4, 32\)",
    ),
    "numbers": ({"layers__0__mlp__up_proj__lora_A__weight": torch.full((4, 32), torch.nan)}, "are not finite"),
    "kind": ({"config": {"peft_type": "IA3"}}, "peft_type is 'IA3'; LORA is read"),
    "head": (
        {"config": {"target_modules": ["q_proj", "lm_head"]}},
        "is of lm_head .target_modules., where adapters are not",
    ),
    "nothing": (
        {"config": {"target_modules": ["c_attn"]}},
        "is of c_attn .target_modules., which no linear layer of this",
    ),
    "rank": ({"config": {"r": 2_000_000_000}}, r"has shape \(4, \d+\); .* wants \(2000000000, \d+\)"),
    "one that is nothing": (
        {"config": {"target_modules": [*PROJECTIONS, "foo_proj"]}},
        "is of foo_proj .target_modules., which no linear layer of this",
    ),
    "flag": ({"config": {"use_rslora": "no"}}, "has use_rslora = 'no'; true or false"),
    "biases": ({"config": {"bias": "lora_only"}}, "sets bias to 'lora_only', which is not computed here"),
    "saved": ({"config": {"modules_to_save": ["lm_head"]}}, r"sets modules_to_save to \['lm_head'\], which"),
    "base": ({"config": {"init_lora_weights": "pissa"}}, "sets init_lora_weights to 'pissa', which"),
    "regex": ({"config": {"target_modules": ".*_proj"}}, r"has target_modules = '\.\*_proj'; a list"),
    "pattern": ({"config": {"rank_pattern": {"q_proj": 0}}}, "rank_pattern = .'q_proj': 0.; an object of patterns"),
}


@pytest.mark.parametrize(("changes", "says"), WRONG.values(), ids=WRONG)
def test_what_is_wrong_is_named(changes: Any, says: str, model: tuple[Path, Decoder], tmp_path: Path) -> None:
    """An adapter that PEFT loads without a word: incomplete, another's, or of what is not computed."""
    folder, decoder = model
    written(tmp_path / "adapter", decoder, str(folder))
    spoil(tmp_path / "adapter", **changes)
    with pytest.raises(ModelError, match=says):
        read_adapter(tmp_path / "adapter").onto(decoder)


@pytest.mark.skipif(find_spec("peft") is None, reason="peft is not installed: pip install peft")
@pytest.mark.parametrize("form", FORMS.values(), ids=FORMS)
def test_through_peft_with_equal_logits(form: dict[str, Any], tmp_path: Path, write_model: Any) -> None:
    """A layer, a scale, a magnitude or a name that PEFT reads otherwise, or writes otherwise than it is read here."""
    import peft
    import transformers

    write_model(tmp_path / "model", scale=3.0)
    checkpoint = open_checkpoint(str(tmp_path / "model"))
    decoder = Decoder(checkpoint.spec, "float32").load(checkpoint.tensors())
    decoder.wear(written(tmp_path / "adapter", decoder, str(tmp_path / "model"), **form))
    wanted = logits(decoder)
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "model", dtype=torch.float32)
    adapted = peft.PeftModel.from_pretrained(theirs, tmp_path / "adapter").eval()
    with torch.no_grad():
        found = adapted(torch.tensor([CONTEXT])).logits[0]
    torch.testing.assert_close(found, wanted, rtol=1e-3, atol=1e-3)
    adapted.save_pretrained(tmp_path / "again")
    decoder.wear(read_adapter(tmp_path / "again").onto(decoder))
    torch.testing.assert_close(logits(decoder), wanted, rtol=1e-5, atol=1e-5)
