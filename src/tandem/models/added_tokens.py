"""The tokens that a Hugging Face folder adds to its tokenizer.json, and the names it gives them (bos_token, ...).

Which of the files and fields count, in which order and with which flags, is as Transformers 5 has it
(`PreTrainedTokenizerBase._from_pretrained`, `TokenizersBackend.__init__`), read here without importing it. One thing
differs: where Transformers gives a token another id than its file says, the folder is refused.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tandem.errors import ModelError
from tandem.models.fields import Fields, Kind, listed, optional, read_json, table, whole

if TYPE_CHECKING:
    import tokenizers

SPECIAL_NAMES = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token")
_EXTRA, _OLD_EXTRA, _DECODER = "extra_special_tokens", "additional_special_tokens", "added_tokens_decoder"
_FLAGS = ("content", "single_word", "lstrip", "rstrip", "normalized", "special")
_ARRAY = re.compile(r'"added_tokens"\s*:\s*(?=\[)')  # within a string of JSON its quotes would be escaped


def _accept(value: Any) -> Any:
    """A token as Transformers passes it on: a string as it is, an object as an AddedToken of its flags."""
    from tokenizers import AddedToken

    if isinstance(value, Mapping) and "content" in value:
        try:
            return AddedToken(**{name: value[name] for name in _FLAGS if name in value})
        except TypeError as error:
            raise ValueError from error
    if not isinstance(value, (str, AddedToken)):
        raise ValueError
    str(value).encode()  # a lone surrogate raises a ValueError
    return value


def _special(value: Any) -> Any:
    token = _accept(value)
    if not isinstance(token, str):
        token.special = True
    return token


_TOKEN: Kind[Any] = Kind("a token (a string, or an object with its content and flags)", _accept)
_TOKENS = optional(listed(_TOKEN))
_SPECIAL: Kind[Any] = Kind(_TOKEN.wanted, _special)
_OBJECT: Kind[Any] = Kind("an object with a token's content and flags", lambda value: _accept(table.accept(value)))


def add_tokens(backend: tokenizers.Tokenizer, folder: Path, settings: Mapping[str, Any], text: str) -> dict[str, str]:
    """Add to `backend` what its tokenizer.json (`text`) lacks; returns the tokens that have a name, by name.

    `settings` is tokenizer_config.json. Raises ModelError where a file holds no token where one is needed, and where a
    token's id is not the one that a file gives it.
    """
    config = dict(settings)
    if _OLD_EXTRA in config and not config.get(_EXTRA):
        config[_EXTRA] = config.pop(_OLD_EXTRA)
    fields = Fields(str(folder / "tokenizer_config.json"), config)
    own = {name: config.pop(name) for name in settings if _is_own_name(name) and isinstance(settings[name], str)}
    _name_extras(fields.where, config, own)
    fields.take(_EXTRA, _TOKENS, None)
    declared = [(one["id"], _accept(one)) for one in _in_whole(text)]  # the library has read them by now
    if _DECODER in config:
        known = _read_decoder(fields)
        declared += known.items()
    else:
        _read_map(folder / "special_tokens_map.json", config, own)
        legacy = _read_legacy(folder / "added_tokens.json", config)
        known = dict(legacy) | dict(declared)
        declared += legacy
    if backend.padding is not None:
        config.setdefault("pad_token", backend.padding["pad_token"])
    if _OLD_EXTRA in config and _EXTRA not in config:
        config[_EXTRA] = config.pop(_OLD_EXTRA)

    given = {name: fields.take(name, optional(_TOKEN), None) for name in SPECIAL_NAMES}
    named = {name: token for name, token in given.items() if token is not None}
    own = {name: fields.take(name, _TOKEN) for name in config if _is_own_name(name) and _is_token(config[name])} | own
    named |= own
    tokens = [known[index] for index in sorted(known)]
    present = {token.content for token in backend.get_added_tokens_decoder().values()} | {str(one) for one in tokens}
    for token in (*named.values(), *(fields.take(_EXTRA, _TOKENS, None) or ())):
        if str(token) not in present and token not in tokens:
            tokens.append(token)
    names = {name: str(token) for name, token in named.items()}
    backend.add_tokens([_flagged(token, names.values()) for token in tokens])
    _check_ids(backend, folder, declared)
    return names


def _flagged(token: Any, names: Iterable[str]) -> Any:
    """A string is a special token, and so is a token that has a name."""
    from tokenizers import AddedToken

    if isinstance(token, str):
        return AddedToken(token, special=True)
    token.special = token.special or str(token) in names
    return token


def _check_ids(backend: tokenizers.Tokenizer, folder: Path, declared: Iterable[tuple[int, Any]]) -> None:
    for index, token in declared:
        found = backend.token_to_id(str(token))
        if found != index:
            raise ModelError(
                f"the files of {folder} give the token {str(token)!r} the id {index}, but with the vocabulary of its "
                f"tokenizer.json it has {'none' if found is None else f'the id {found}'}. They are not of one "
                "tokeniser: copy the tokeniser's files of the original model again."
            )


def _is_own_name(name: str) -> bool:
    """Whether it names a token that only this model has: image_token."""
    return name.endswith("_token") and name not in SPECIAL_NAMES


def _is_token(value: Any) -> bool:
    """Whether Transformers takes the value of any name for a token: add_bos_token is true or false."""
    from tokenizers import AddedToken

    return isinstance(value, AddedToken | str) or (isinstance(value, Mapping) and value.get("__type") == "AddedToken")


def _name_extras(where: str, config: dict[str, Any], own: dict[str, Any]) -> None:
    """Extra tokens in an object have names."""
    if isinstance(config.get(_EXTRA), Mapping):
        extras = Fields(f"{where}: {_EXTRA}", config.pop(_EXTRA))
        own |= {name: extras.take(name, _TOKEN) for name in extras.values}


def _in_whole(text: str) -> list[dict[str, Any]]:
    """`added_tokens` of a tokenizer.json, without parsing its vocabulary."""
    found = _ARRAY.search(text)
    return json.JSONDecoder().raw_decode(text, found.end())[0] if found else []


def _read_decoder(fields: Fields) -> dict[int, Any]:
    """`added_tokens_decoder`: flags by id."""
    decoder = fields.take(_DECODER, table)
    entries = Fields(f"{fields.where}: {_DECODER}", decoder)
    wrong = next((name for name in entries.values if not (name.isascii() and name.isdecimal())), None)
    if wrong is not None:
        raise ModelError(f"{entries.where} has the id {wrong!r}, which is no number. Copy the original file again.")
    return {int(name): entries.take(name, _OBJECT) for name in entries.values}


def _read_map(path: Path, config: dict[str, Any], own: dict[str, Any]) -> None:
    """special_tokens_map.json goes before the config where that has no `added_tokens_decoder`."""
    fields = Fields(str(path), read_json(path) if path.is_file() else {})
    for name, value in fields.values.items():
        if name in (_EXTRA, _OLD_EXTRA) and not isinstance(value, Mapping):
            found = fields.take(name, optional(listed(_SPECIAL))) or ()
            before = config.get(_EXTRA) or [] if name == _EXTRA else []
            config[name] = [*before, *(token for token in found if token not in before)]
        else:
            config[name] = fields.take(name, _SPECIAL) if isinstance(value, Mapping) and name != _EXTRA else value
    _name_extras(fields.where, config, own)


def _read_legacy(path: Path, config: Mapping[str, Any]) -> list[tuple[int, Any]]:
    """added_tokens.json, of tokenisers older than `added_tokens_decoder`: id by token."""
    from tokenizers import AddedToken

    fields = Fields(str(path), read_json(path) if path.is_file() else {})
    special = {str(config[name]) for name in SPECIAL_NAMES if config.get(name)}
    special |= {str(token) for token in config.get(_EXTRA) or ()}
    tokens = {token: token in special for token in fields.values}
    return [
        (fields.take(token, whole()), AddedToken(token, normalized=not named, special=named))
        for token, named in tokens.items()
    ]
