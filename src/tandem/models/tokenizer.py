"""Text <-> token ids, and messages -> token ids by the model's chat template.

Holds the `tokenizers` library's tokenizer, with the added tokens that Transformers knows (added_tokens.py), and renders
templates (template.py), without importing Transformers, whose import alone takes seconds. Where only Transformers knows
the conversion (SentencePiece files, most GGUF vocabularies), it runs once; a GGUF's result is kept in env.cache_dir().
How text is split is what tokenizer.json says, also where Transformers builds that of `tokenizer_class` instead.
"""

from __future__ import annotations

import hashlib
import json
import os
import tempfile
import warnings
from collections.abc import Iterable, Mapping, Sequence
from datetime import datetime
from functools import cached_property
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tandem import env
from tandem.errors import ConfigError, ModelError, TandemWarning
from tandem.models.added_tokens import SPECIAL_NAMES, add_tokens
from tandem.models.fields import Fields, flag, listed, optional, read_json, shown, table, text, token_id
from tandem.models.regrown import Regrown
from tandem.models.spelt import Spelling, encoded

if TYPE_CHECKING:
    import tokenizers

    from tandem.models.gguf import GgufFile
    from tandem.models.spelt import Rows
    from tandem.types import Message

ANSWER = "20417"  # nothing a template trims or respells
CHAT_END_TOKENS = ("<|im_end|>", "<|eot_id|>")  # ChatML (SmolLM2, Qwen), Llama 3: an assistant's turn ends with it
_SLOW_FILES = ("tokenizer.model", "vocab.json", "vocab.txt", "tekken.json")
_CONTROL, _USER_DEFINED = 3, 4  # tokenizer.ggml.token_type
_GGUF_NAMES = {"bos_token": "bos", "eos_token": "eos", "unk_token": "unknown", "pad_token": "padding"}
# GGUF `pre` kinds that Transformers gives GPT-2's splitting, which is built here without it. For smollm it drops the
# split of single digits, so a run of several spaces or newlines before a digit gets other ids than the hub's
# tokenizer.json gives; tandem follows Transformers' reading of the file.
_GPT2_SPLIT = ("smollm", "gpt-2", "gpt2")
_CLEANED = (  # Transformers' clean_up_tokenization
    *((f" {mark}", mark) for mark in ".?!,"),
    (" ' ", "'"),
    *((f" {end}", end) for end in ("n't", "'m", "'s", "'ve", "'re")),
)


class Tokenizer:
    """A model's tokeniser. Special tokens are never added unasked: what encode gives is the text's own ids.

    `settings` is tokenizer_config.json without the chat template; `stop_ids` are the ids that end a turn besides the
    tokeniser's own eos and what the template ends a turn with. `now` and `arguments` are what templates see beside the
    messages, and `spelt_as_text` says what becomes of control tokens that a message spells; a run sets its own. A
    server sets `yields` (spelt.encoded).
    """

    def __init__(
        self,
        backend: tokenizers.Tokenizer,
        settings: Mapping[str, Any],
        chat_template: str | None = None,
        stop_ids: Iterable[int] = (),
        origin: str = "the tokeniser",
        special_tokens: Mapping[str, str] | None = None,
    ) -> None:
        backend.no_truncation()
        backend.no_padding()
        fields = Fields(f"tokenizer_config.json of {origin}", settings)
        backend.encode_special_tokens = bool(fields.take("split_special_tokens", optional(flag), False))
        self.backend = backend
        self.settings = dict(settings)
        self.chat_template = chat_template
        self.origin = origin
        self.now = datetime.now()
        self.arguments: Mapping[str, Any] = {}
        self.spelt_as_text = True
        self.yields = False
        if special_tokens is None:
            special_tokens = {name: _text(settings[name]) for name in SPECIAL_NAMES if settings.get(name) is not None}
        self.special_tokens = dict(special_tokens)
        # As Transformers: for byte-pair vocabularies the setting is not meant, and would take spaces from the text.
        self._cleans = fields.take("clean_up_tokenization_spaces", optional(flag), False) and (
            type(backend.model).__name__ != "BPE"
        )
        self._stop_ids = tuple(stop_ids)
        self._warned: set[str] = set()  # control tokens that a message has spelt

    @cached_property
    def stop_token_ids(self) -> tuple[int, ...]:
        """Ids that end a turn."""
        after = self._after_answer()
        added = self.backend.get_added_tokens_decoder()
        end = next((token for token in after if token in added and not added[token].content.isspace()), None)
        ends = [self.eos_token_id, *(self.backend.token_to_id(token) for token in CHAT_END_TOKENS), end]
        stops = dict.fromkeys([*self._stop_ids, *(token for token in ends if token is not None)])
        if after and not stops.keys() & set(after):
            warnings.warn(
                f"the chat template of {self.origin} ends an answer with {self.decode(after)!r}, which is none of the "
                "model's stop tokens: its answers may end at their length only.",
                TandemWarning,
                stacklevel=2,
            )
        return tuple(stops)

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
        return encoded(self.backend, text, add_special_tokens, self.yields).ids

    def decode(self, ids: Sequence[int], skip_special_tokens: bool = False) -> str:
        """Text of `ids`; bytes that are not whole UTF-8 characters decode to U+FFFD."""
        text = self.backend.decode(list(ids), skip_special_tokens=skip_special_tokens)
        for spaced, clean in _CLEANED if self._cleans else ():
            text = text.replace(spaced, clean)
        return text

    def token_to_id(self, token: str) -> int | None:
        return self.backend.token_to_id(token)

    def render_text(
        self,
        messages: Sequence[Message | Mapping[str, Any]],
        add_generation_prompt: bool = True,
        template: str | None = None,
        tools: Sequence[Mapping[str, Any]] = (),
    ) -> str:
        """The messages as the chat template writes them; `template` (jinja) stands in for the model's own.

        Raises ModelError where there is no template, or it refuses the messages, fails or finds no end.
        """
        from tandem.models.template import TemplateError, render

        source = template if template is not None else self.chat_template
        if source is None:
            raise ModelError(
                f"{self.origin} has no chat template, so messages cannot be rendered. Use the instruct version of the "
                "model, put a chat_template.jinja beside its tokenizer.json, or give plain text instead of messages."
            )
        if not messages:
            raise ModelError("there are no messages to render; give at least one.")
        rows = _rows(messages)
        variables: dict[str, Any] = {
            "documents": None,
            **self.arguments,
            "messages": rows,
            "tools": list(tools) or None,
        }
        variables["add_generation_prompt"] = add_generation_prompt
        try:
            return render(source, self.now, self.special_tokens | variables)
        except Exception as error:  # a template is a program that came with the model, and can raise anything
            name = type(error).__name__
            reason = " ".join(str(error).split())
            raise ModelError(
                f"the chat template of {self.origin} refuses these messages (roles "
                f"{', '.join(str(row.get('role')) for row in rows)}): "
                f"{reason if isinstance(error, TemplateError) else f'{name}: {reason}'}. "
                "Change the messages or the template."
            ) from error

    def render_messages(
        self,
        messages: Sequence[Message | Mapping[str, Any]],
        add_generation_prompt: bool = True,
        template: str | None = None,
        tools: Sequence[Mapping[str, Any]] = (),
    ) -> list[int]:
        """Token ids of `render_text`; a control token that a message spells is text.

        Unless `spelt_as_text`: then it is one, as if the template had written it, with a warning, once a token.
        """
        if not self.spelt_as_text:
            self._warn_of_spelt(messages)
        rows, mark = self._marked(messages)
        text = self.render_text(rows, add_generation_prompt, template, tools)
        if mark:
            return self._spelling.encode(text, mark, False, self.yields)
        return self._regrown.encode(text, self.yields)

    def join_messages(self, messages: Sequence[Message | Mapping[str, Any]]) -> list[int]:
        """Token ids of the messages as plain text, a blank line between, after the tokeniser's own bos."""
        rows, mark = self._marked(messages)
        text = "\n\n".join(row["content"] for row in rows)
        return self._spelling.encode(text, mark, True, self.yields) if mark else self.encode(text, True)

    def spelt(self, messages: Sequence[Message | Mapping[str, Any]]) -> int:
        """How often the messages, all but an assistant's, spell a control token."""
        return len(self._spelling.found(_rows(messages)))

    def take_arguments(self, arguments: Mapping[str, Any], called: str) -> None:
        """Variables for the chat template, beside the messages. ConfigError for one that it does not read.

        ModelError where the template cannot be read.
        """
        from tandem.models.template import TemplateError, variables

        given = {"messages", "tools", "add_generation_prompt", "strftime_now", *SPECIAL_NAMES}
        try:
            reads = sorted(variables(self.chat_template or "") - given) if arguments else []
        except TemplateError as error:
            raise ModelError(f"the chat template of {self.origin} cannot be read: {error}. Mend it.") from error
        for name in arguments:
            if name not in reads:
                raise ConfigError(
                    f"{called} has {name}, which the chat template of {self.origin} does not read. "
                    f"It reads {', '.join(reads) or 'none'}."
                )
        self.arguments = dict(arguments)

    def save(self, folder: Path) -> None:
        """Write tokenizer.json, tokenizer_config.json and chat_template.jinja, which Transformers loads."""
        (folder / "tokenizer.json").write_text(self.backend.to_str(pretty=True), encoding="utf-8")
        text = json.dumps(self.settings, indent=2, ensure_ascii=False) + "\n"
        (folder / "tokenizer_config.json").write_text(text, encoding="utf-8")
        if self.chat_template is not None:
            (folder / "chat_template.jinja").write_text(self.chat_template, encoding="utf-8")

    @cached_property
    def _regrown(self) -> Regrown:
        return Regrown(self.backend)

    @cached_property
    def _spelling(self) -> Spelling:
        return Spelling(self.backend, self.chat_template or "")

    def _marked(self, messages: Sequence[Message | Mapping[str, Any]]) -> tuple[Rows, str]:
        """The messages for the template, and the mark that breaks the control tokens that they spell."""
        rows = _rows(messages)
        return self._spelling.marked(rows) if self.spelt_as_text else (rows, "")

    def _warn_of_spelt(self, messages: Sequence[Message | Mapping[str, Any]]) -> None:
        for row in _rows(messages):
            found = set(self._spelling.found([row])) - self._warned
            if found and not self.backend.encode_special_tokens:
                self._warned |= found
                warnings.warn(
                    f"the message {shown(row.get('content'))} spells {', '.join(map(repr, sorted(found)))}: the model "
                    "reads control tokens there, as if the chat template had written them "
                    "(task.control_tokens=as_template). Said once for each token.",
                    TandemWarning,
                    stacklevel=4,
                )

    def _after_answer(self) -> list[int]:
        """What the chat template puts after an assistant's answer; nothing where it takes no such conversation."""
        turns = [{"role": "user", "content": "?"}, {"role": "assistant", "content": ANSWER}]
        try:
            _, answer, after = self.render_text(turns, False).rpartition(ANSWER) if self.chat_template else ("", "", "")
        except ModelError:
            return []
        return self.encode(after) if answer else []

    def _special_id(self, name: str) -> int | None:
        token = self.special_tokens.get(name)
        return None if token is None else self.backend.token_to_id(token)


def load_tokenizer(folder: Path, stop_ids: Iterable[int] = (), vocab_size: int | None = None) -> Tokenizer:
    """The tokeniser of a Hugging Face folder; converted by Transformers where it has no tokenizer.json.

    Raises ModelError where the folder has no tokeniser files, damaged ones or ones that contradict each other, or a
    token that a model of `vocab_size` does not have.
    """
    from tokenizers import Tokenizer as Backend

    path = folder / "tokenizer_config.json"
    settings = read_json(path) if path.is_file() else {}
    template = _template(folder, Fields(str(path), settings))
    settings.pop("chat_template", None)
    path = folder / "tokenizer.json"
    if path.is_file():
        try:
            whole = path.read_bytes().decode()
            backend = Backend.from_str(whole)
        except Exception as error:  # the tokenizers library raises Exception itself
            raise ModelError(f"{path} cannot be read: {error}. Copy or download the file again.") from error
        try:
            names = add_tokens(backend, folder, settings, whole)
        except UnicodeEncodeError as error:
            raise ModelError(
                f"the files of {folder} name a token with half a character, {error.object!r}: no text has it. Copy the "
                "original files again."
            ) from error
    elif any((folder / name).is_file() for name in _SLOW_FILES):
        backend, names = _convert(folder, None)
        settings = {"tokenizer_class": "PreTrainedTokenizerFast", **settings}
    else:
        raise ModelError(
            f"{folder} has no tokeniser: none of tokenizer.json, {', '.join(_SLOW_FILES)}. "
            "Copy the tokeniser's files of the original model into the folder."
        )
    _check_size(str(folder), backend, vocab_size)
    settings |= {name: token for name, token in names.items() if name.endswith("_token")}
    return Tokenizer(backend, settings, template, stop_ids, str(folder), names)


def load_gguf_tokenizer(file: GgufFile, stop_ids: Iterable[int] = (), vocab_size: int | None = None) -> Tokenizer:
    """The tokeniser that a GGUF file carries, with the ids that Transformers' reading of the file gives.

    Byte-level vocabularies with GPT-2's splitting are built directly (0.2 s for SmolLM2's 49,152 tokens against 6 s);
    others by Transformers, once, then from env.cache_dir(). Raises ModelError where the file carries none, where that
    reading splits a token that the file's template writes or names, and for a token that a model of `vocab_size` lacks.
    """
    import numpy as np
    from tokenizers import Tokenizer as Backend

    origin = str(file.path)
    given = {
        name.removeprefix("tokenizer."): value for name, value in file.fields.items() if name.startswith("tokenizer.")
    }
    fields, tokens = Fields(f"{origin}: tokenizer", given), given.get("ggml.tokens")
    if not isinstance(tokens, list) or not tokens or not isinstance(tokens[0], str):  # a GGUF array has one type
        raise ModelError(f"{origin} carries no tokeniser (no tokenizer.ggml.tokens). Take a file that does.")
    template = fields.take("chat_template", optional(text), None)
    named = _named_ids(fields, len(tokens))
    names = {name: tokens[index] for name, index in named.items()}
    settings = {"tokenizer_class": "PreTrainedTokenizerFast", "clean_up_tokenization_spaces": False, **names}
    plain = not given.get("ggml.add_bos_token") and not given.get("ggml.add_eos_token")
    if given.get("ggml.model") == "gpt2" and given.get("ggml.pre") in _GPT2_SPLIT and plain:
        try:
            backend = _byte_level(given)
        except Exception as error:  # the tokenizers library raises Exception itself
            raise ModelError(
                f"{origin} carries a tokeniser that cannot be built: {error}. Take another file."
            ) from error
    else:
        cached = env.cache_dir() / "tokenizers" / f"{_fingerprint(file)}.json"
        if cached.is_file():
            backend = Backend.from_file(str(cached))
        else:
            backend, _ = _convert(file.path.parent, file.path.name)
            _keep(cached, backend.to_str())
    kinds = np.asarray(given.get("ggml.token_type", ()))[: len(tokens)]
    marked = np.flatnonzero((kinds == _CONTROL) | (kinds == _USER_DEFINED)).tolist()
    written = {index for index in marked if tokens[index] in (template or "") and not tokens[index].isspace()}
    added = backend.get_added_tokens_decoder()
    for index in sorted(written | set(named.values())):
        if index not in added or added[index].content != tokens[index]:
            raise ModelError(
                f"{origin} has the control token {tokens[index]!r} with id {index}, but Transformers' reading of the "
                "file splits it into pieces. Give the model's Hugging Face folder instead."
            )
    _check_size(origin, backend, vocab_size)
    return Tokenizer(backend, settings, template, stop_ids, origin)


def _named_ids(fields: Fields, num_tokens: int) -> dict[str, int]:
    """The special tokens that a GGUF file names."""
    ids = {name: fields.take(f"ggml.{key}_token_id", token_id(num_tokens), None) for name, key in _GGUF_NAMES.items()}
    return {name: index for name, index in ids.items() if index is not None}


def _check_size(origin: str, backend: tokenizers.Tokenizer, vocab_size: int | None) -> None:
    """Refuse tokens that a model of `vocab_size` has no row for."""
    if vocab_size is None:
        return
    beyond = sorted((index, token) for token, index in backend.get_vocab().items() if index >= vocab_size)
    if beyond:
        shown_ = ", ".join(f"{token!r} with id {index}" for index, token in beyond[:3])
        raise ModelError(
            f"the tokeniser of {origin} has {len(beyond)} tokens that the model does not have: {shown_}"
            f"{', ...' if len(beyond) > 3 else ''}, where vocab_size is {vocab_size}, so ids end at {vocab_size - 1}. "
            "Take model and tokeniser of one version, or give the model rows for them (Transformers: "
            "model.resize_token_embeddings)."
        )


def _byte_level(fields: Mapping[str, Any]) -> tokenizers.Tokenizer:
    """Transformers' GPT2Tokenizer with the file's control and user-defined tokens added (`convert_gguf_tokenizer`)."""
    from tokenizers import AddedToken, decoders, models, pre_tokenizers
    from tokenizers import Tokenizer as Backend

    tokens: list[str] = fields["ggml.tokens"]
    alphabet = set(pre_tokenizers.ByteLevel.alphabet())
    spelling = byte_alphabet()
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


def byte_alphabet() -> list[str]:
    """GPT-2's printable character of each byte: itself where printable in Latin-1, else the next from U+0100 on."""
    printable = {*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)}
    fresh = iter(range(256, 512))
    return [chr(byte) if byte in printable else chr(next(fresh)) for byte in range(256)]


def _convert(folder: Path, gguf_file: str | None) -> tuple[tokenizers.Tokenizer, dict[str, str]]:
    """Transformers' conversion: the tokenizer and the tokens that it has names for."""
    from transformers import AutoTokenizer, PreTrainedTokenizerFast

    where = folder / gguf_file if gguf_file else folder
    try:
        if gguf_file:
            with tempfile.TemporaryDirectory() as alone:  # beside a tokenizer.json Transformers would read that instead
                (Path(alone) / gguf_file).symlink_to(where.resolve())
                # AutoTokenizer would read the whole model's header again, with gguf.GGUFReader
                loaded: Any = PreTrainedTokenizerFast.from_pretrained(alone, gguf_file=gguf_file, local_files_only=True)
        else:
            loaded = AutoTokenizer.from_pretrained(folder, local_files_only=True)
    except Exception as error:  # Transformers raises what its parts raise
        raise ModelError(
            f"Transformers cannot make a tokeniser of {where}: {error}. "
            "Give a Hugging Face folder that has a tokenizer.json."
        ) from error
    if getattr(loaded, "backend_tokenizer", None) is None:
        raise ModelError(f"the tokeniser of {where} has no tokenizer.json form. Use a model that has one.")
    return loaded.backend_tokenizer, dict(loaded.special_tokens_map)


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


def _template(folder: Path, fields: Fields) -> str | None:
    """The folder's chat template: files come before the config, and of named ones it is the default."""
    named = {path.stem: path for path in (folder / "additional_chat_templates").glob("*.jinja")}
    if (folder / "chat_template.jinja").is_file():
        named["default"] = folder / "chat_template.jinja"
    if named:
        return named["default"].read_text(encoding="utf-8") if "default" in named else None
    value = fields.values.get("chat_template")
    if isinstance(value, list):
        entries = [Fields(f"{fields.where}: chat_template", one) for one in fields.take("chat_template", listed(table))]
        value = {one.take("name", text): one.take("template", text) for one in entries}
    if isinstance(value, Mapping):
        return Fields(f"{fields.where}: chat_template", value).take("default", optional(text), None)
    return fields.take("chat_template", optional(text), None)


def _rows(messages: Sequence[Message | Mapping[str, Any]]) -> list[dict[str, Any]]:
    """As templates have them: without keys that have no value, and reasoning under both names that templates read it by
    (gpt-oss's: thinking), as Transformers' apply_chat_template has it.
    """
    rows = [dict(one) if isinstance(one, Mapping) else one.row() for one in messages]
    rows = [{name: value for name, value in row.items() if value is not None} for row in rows]
    for place, row in enumerate(rows):
        found = next((row[name] for name in ("reasoning_content", "thinking", "reasoning") if name in row), None)
        if found is not None:
            rows[place] = {"thinking": found, **row, "reasoning_content": found}
    return rows


def _text(token: Any) -> str:
    return str(token["content"]) if isinstance(token, Mapping) else str(token)
