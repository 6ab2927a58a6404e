"""Text <-> token ids, and messages -> token ids by the model's chat template.

Holds the `tokenizers` library's tokenizer and renders templates with jinja2 as Transformers does, without importing
Transformers, whose import alone takes seconds. Where only Transformers knows the conversion (SentencePiece files, most
GGUF vocabularies), it runs once; a GGUF's result is kept in env.cache_dir().
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterable, Mapping, Sequence
from datetime import datetime
from functools import lru_cache
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tandem import env
from tandem.errors import ModelError
from tandem.models.fields import read_json

if TYPE_CHECKING:
    import jinja2
    import tokenizers

    from tandem.models.gguf import GgufFile
    from tandem.types import Message

SPECIAL_NAMES = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token")
CHAT_END_TOKENS = ("<|im_end|>", "<|eot_id|>")  # ChatML (SmolLM2, Qwen), Llama 3: an assistant's turn ends with it
_SLOW_FILES = ("tokenizer.model", "vocab.json", "vocab.txt", "tekken.json")
_CONTROL, _USER_DEFINED = 3, 4  # tokenizer.ggml.token_type
# GGUF `pre` kinds that Transformers gives GPT-2's splitting, which is built here without it. For smollm it drops the
# split of single digits, so a run of several spaces or newlines before a digit gets other ids than the hub's
# tokenizer.json gives; tandem follows Transformers' reading of the file.
_GPT2_SPLIT = ("smollm", "gpt-2", "gpt2")


class Tokenizer:
    """A model's tokeniser. Special tokens are never added unasked: what encode gives is the text's own ids.

    `settings` is tokenizer_config.json without the chat template; `stop_ids` are the ids that end a turn besides the
    tokeniser's own eos and chat end token.
    """

    def __init__(
        self,
        backend: tokenizers.Tokenizer,
        settings: Mapping[str, Any],
        chat_template: str | None = None,
        stop_ids: Iterable[int] = (),
        origin: str = "the tokeniser",
    ) -> None:
        backend.no_truncation()
        backend.no_padding()
        self.backend = backend
        self.settings = dict(settings)
        self.chat_template = chat_template
        self.origin = origin
        self.special_tokens = {
            name: _text(self.settings[name]) for name in SPECIAL_NAMES if self.settings.get(name) is not None
        }
        ends = [self.eos_token_id, *(backend.token_to_id(token) for token in CHAT_END_TOKENS)]
        self.stop_token_ids: tuple[int, ...] = tuple(
            dict.fromkeys([*stop_ids, *(token for token in ends if token is not None)])
        )

    @property
    def vocab_size(self) -> int:
        """Ids the tokeniser knows; the model's embedding may have more rows."""
        return self.backend.get_vocab_size()

    @property
    def bos_token_id(self) -> int | None:
        return self._special_id("bos_token")

    @property
    def eos_token_id(self) -> int | None:
        return self._special_id("eos_token")

    @property
    def pad_token_id(self) -> int | None:
        return self._special_id("pad_token")

    def encode(self, text: str, add_special_tokens: bool = False) -> list[int]:
        """Ids of `text`. A special token written in it becomes its id. `add_special_tokens` adds the model's bos."""
        return self.backend.encode(text, add_special_tokens=add_special_tokens).ids

    def decode(self, ids: Sequence[int], skip_special_tokens: bool = False) -> str:
        """Text of `ids`; bytes that are not whole UTF-8 characters decode to U+FFFD."""
        return self.backend.decode(list(ids), skip_special_tokens=skip_special_tokens)

    def token_to_id(self, token: str) -> int | None:
        return self.backend.token_to_id(token)

    def render_text(
        self,
        messages: Sequence[Message | Mapping[str, Any]],
        add_generation_prompt: bool = True,
        template: str | None = None,
    ) -> str:
        """The messages as the chat template writes them; `template` (jinja) stands in for the model's own.

        Raises ModelError where there is no template, or it refuses the messages.
        """
        import jinja2

        source = template if template is not None else self.chat_template
        if source is None:
            raise ModelError(
                f"{self.origin} has no chat template, so messages cannot be rendered. Use the instruct version of the "
                "model, put a chat_template.jinja beside its tokenizer.json, or give plain text instead of messages."
            )
        if not messages:
            raise ModelError("there are no messages to render; give at least one.")
        rows = [
            dict(one) if isinstance(one, Mapping) else {"role": one.role, "content": one.content} for one in messages
        ]
        try:
            return _compile(source).render(
                messages=[{name: value for name, value in row.items() if value is not None} for row in rows],
                tools=None,
                documents=None,
                add_generation_prompt=add_generation_prompt,
                **self.special_tokens,
            )
        except jinja2.TemplateError as error:
            raise ModelError(
                f"the chat template of {self.origin} refuses these messages (roles "
                f"{', '.join(str(row.get('role')) for row in rows)}): {error}. Change the messages or the template."
            ) from error

    def render_messages(
        self,
        messages: Sequence[Message | Mapping[str, Any]],
        add_generation_prompt: bool = True,
        template: str | None = None,
    ) -> list[int]:
        """Token ids of `render_text`."""
        return self.encode(self.render_text(messages, add_generation_prompt, template))

    def save(self, folder: Path) -> None:
        """Write tokenizer.json, tokenizer_config.json and chat_template.jinja, which Transformers loads."""
        (folder / "tokenizer.json").write_text(self.backend.to_str(pretty=True), encoding="utf-8")
        text = json.dumps(self.settings, indent=2, ensure_ascii=False) + "\n"
        (folder / "tokenizer_config.json").write_text(text, encoding="utf-8")
        if self.chat_template is not None:
            (folder / "chat_template.jinja").write_text(self.chat_template, encoding="utf-8")

    def _special_id(self, name: str) -> int | None:
        token = self.special_tokens.get(name)
        return None if token is None else self.backend.token_to_id(token)


def load_tokenizer(folder: Path, stop_ids: Iterable[int] = ()) -> Tokenizer:
    """The tokeniser of a Hugging Face folder; converted by Transformers where it has no tokenizer.json.

    Raises ModelError where the folder has no tokeniser files or damaged ones.
    """
    from tokenizers import Tokenizer as Backend

    settings, named = (
        read_json(folder / name) if (folder / name).is_file() else {}
        for name in ("tokenizer_config.json", "special_tokens_map.json")
    )
    settings = {**{name: named[name] for name in SPECIAL_NAMES if name in named}, **settings}
    template = _named_template(settings.pop("chat_template", None))
    if (folder / "chat_template.jinja").is_file():
        template = (folder / "chat_template.jinja").read_text(encoding="utf-8")
    path = folder / "tokenizer.json"
    if path.is_file():
        try:
            backend = Backend.from_str(path.read_text(encoding="utf-8"))
        except Exception as error:  # the tokenizers library raises Exception itself
            raise ModelError(f"{path} cannot be read: {error}. Copy or download the file again.") from error
        return Tokenizer(backend, settings, template, stop_ids, str(folder))
    if not any((folder / name).is_file() for name in _SLOW_FILES):
        raise ModelError(
            f"{folder} has no tokeniser: none of tokenizer.json, {', '.join(_SLOW_FILES)}. "
            "Copy the tokeniser's files of the original model into the folder."
        )
    backend, converted = _convert(folder, None)
    return Tokenizer(backend, {**converted, **settings}, template, stop_ids, str(folder))


def load_gguf_tokenizer(file: GgufFile, stop_ids: Iterable[int] = ()) -> Tokenizer:
    """The tokeniser that a GGUF file carries, with the ids that Transformers' reading of the file gives.

    Byte-level vocabularies with GPT-2's splitting are built directly (0.2 s for SmolLM2's 49,152 tokens against 6 s);
    others by Transformers, once, then from env.cache_dir(). Raises ModelError where the file carries none.
    """
    from tokenizers import Tokenizer as Backend

    fields = {
        name.removeprefix("tokenizer."): value for name, value in file.fields.items() if name.startswith("tokenizer.")
    }
    tokens = fields.get("ggml.tokens")
    if not tokens:
        raise ModelError(f"{file.path} carries no tokeniser (no tokenizer.ggml.tokens). Take a file that does.")
    settings: dict[str, Any] = {"tokenizer_class": "PreTrainedTokenizerFast", "clean_up_tokenization_spaces": False}
    for name, key in (("bos", "bos"), ("eos", "eos"), ("unk", "unknown"), ("pad", "padding")):
        token_id = fields.get(f"ggml.{key}_token_id")
        if token_id is not None and token_id < len(tokens):
            settings[f"{name}_token"] = tokens[token_id]
    template = fields.get("chat_template")
    plain = not fields.get("ggml.add_bos_token") and not fields.get("ggml.add_eos_token")
    if fields.get("ggml.model") == "gpt2" and fields.get("ggml.pre") in _GPT2_SPLIT and plain:
        return Tokenizer(_byte_level(fields), settings, template, stop_ids, str(file.path))
    cached = env.cache_dir() / "tokenizers" / f"{_fingerprint(file)}.json"
    if cached.is_file():
        return Tokenizer(Backend.from_file(str(cached)), settings, template, stop_ids, str(file.path))
    backend, _ = _convert(file.path.parent, file.path.name)
    _keep(cached, backend.to_str())
    return Tokenizer(backend, settings, template, stop_ids, str(file.path))


def _byte_level(fields: Mapping[str, Any]) -> tokenizers.Tokenizer:
    """Transformers' GPT2Tokenizer with the file's control and user-defined tokens added (`convert_gguf_tokenizer`)."""
    from tokenizers import AddedToken, decoders, models, pre_tokenizers
    from tokenizers import Tokenizer as Backend

    tokens: list[str] = fields["ggml.tokens"]
    alphabet = set(pre_tokenizers.ByteLevel.alphabet())
    spelling = _byte_spelling()
    vocab = {
        token if alphabet.issuperset(token) else "".join(spelling[byte] for byte in token.encode()): index
        for index, token in enumerate(tokens)
    }
    merges = [tuple(merge.split(" ")) for merge in fields.get("ggml.merges", ())]
    backend = Backend(
        models.BPE(vocab=vocab, merges=merges, continuing_subword_prefix="", end_of_word_suffix="", fuse_unk=False)
    )
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    kinds = [int(kind) for kind in fields.get("ggml.token_type", ())]
    control = [token for token, kind in zip(tokens, kinds, strict=False) if kind == _CONTROL]
    named = [fields.get(f"ggml.{key}_token_id") for key in ("bos", "eos", "unknown", "padding")]
    control += [tokens[index] for index in named if index is not None and index < len(tokens)]
    backend.add_special_tokens(
        [AddedToken(token, normalized=False, special=True) for token in control if alphabet.issuperset(token)]
    )
    own = [token for token, kind in zip(tokens, kinds, strict=False) if kind == _USER_DEFINED and token in vocab]
    backend.add_tokens([AddedToken(token, normalized=False, special=False) for token in own])
    return backend


def _byte_spelling() -> list[str]:
    """GPT-2's printable character of each byte: itself where printable in Latin-1, else the next from U+0100 on."""
    printable = {*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)}
    fresh = iter(range(256, 512))
    return [chr(byte) if byte in printable else chr(next(fresh)) for byte in range(256)]


def _convert(folder: Path, gguf_file: str | None) -> tuple[tokenizers.Tokenizer, dict[str, Any]]:
    """Transformers' conversion: the tokenizer and the special tokens that its class names."""
    from transformers import AutoTokenizer, PreTrainedTokenizerFast

    where = folder / gguf_file if gguf_file else folder
    try:
        if gguf_file:  # AutoTokenizer would read the whole model's header again, with gguf.GGUFReader
            loaded: Any = PreTrainedTokenizerFast.from_pretrained(folder, gguf_file=gguf_file, local_files_only=True)
        else:
            loaded = AutoTokenizer.from_pretrained(folder, local_files_only=True)
    except (ValueError, OSError, KeyError, ImportError) as error:
        raise ModelError(
            f"Transformers cannot make a tokeniser of {where}: {error}. "
            "Give a Hugging Face folder that has a tokenizer.json."
        ) from error
    if getattr(loaded, "backend_tokenizer", None) is None:
        raise ModelError(f"the tokeniser of {where} has no tokenizer.json form. Use a model that has one.")
    settings = {name: getattr(loaded, name) for name in SPECIAL_NAMES if getattr(loaded, name, None) is not None}
    return loaded.backend_tokenizer, {"tokenizer_class": "PreTrainedTokenizerFast", **settings}


def _fingerprint(file: GgufFile) -> str:
    """Of the file's header and the libraries that convert it: a new version of either converts again."""
    digest = hashlib.blake2b(digest_size=16)
    with file.path.open("rb") as opened:
        digest.update(opened.read(file.header_bytes))
    digest.update(f"{version('transformers')} {version('tokenizers')}".encode())
    return digest.hexdigest()


def _keep(path: Path, text: str) -> None:
    """Write a cache file whole or not at all; a cache that cannot be written costs the next start only."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        aside = path.with_suffix(f".{os.getpid()}")
        aside.write_text(text, encoding="utf-8")
        aside.replace(path)
    except OSError:
        return


def _named_template(value: Any) -> str | None:
    """A template, or the one called default of a list of named ones."""
    if isinstance(value, list):
        return next((str(one["template"]) for one in value if one.get("name") == "default"), None)
    return value if isinstance(value, str) else None


def _text(token: Any) -> str:
    return str(token["content"]) if isinstance(token, Mapping) else str(token)


@lru_cache(maxsize=16)
def _compile(template: str) -> jinja2.Template:
    """The template in Transformers' environment (`chat_template_utils._compile_jinja_template`): same names, same
    whitespace rules, sandboxed because templates come with downloaded models."""
    import jinja2
    from jinja2.ext import Extension, loopcontrols
    from jinja2.sandbox import ImmutableSandboxedEnvironment

    class Generation(Extension):
        """`{% generation %}` marks the assistant's text; it renders as its body."""

        tags = {"generation"}

        def parse(self, parser: Any) -> Any:
            line = next(parser.stream).lineno
            body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
            return jinja2.nodes.Scope(body, lineno=line)

    def tojson(
        value: Any, ensure_ascii: bool = False, indent: Any = None, separators: Any = None, sort_keys: bool = False
    ) -> str:
        return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)

    def raise_exception(message: str) -> None:
        raise jinja2.TemplateError(message)

    def strftime_now(form: str) -> str:
        return datetime.now().strftime(form)

    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[Generation, loopcontrols]
    )
    environment.filters["tojson"] = tojson
    environment.globals["raise_exception"] = raise_exception
    environment.globals["strftime_now"] = strftime_now
    return environment.from_string(template)
