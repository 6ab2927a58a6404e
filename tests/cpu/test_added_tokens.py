"""Which tokens a folder's files add, by which ids and names, against AutoTokenizer on the same folder."""

from __future__ import annotations

import dataclasses
import json
import logging
from collections.abc import Iterator
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import gguf
import pytest
import transformers
from hypothesis import HealthCheck, event, example, given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken, decoders, models, normalizers, pre_tokenizers, processors
from tokenizers import Tokenizer as Backend

from tandem.errors import ModelError, TandemWarning
from tandem.models.gguf import read_header
from tandem.models.tokenizer import load_gguf_tokenizer, load_tokenizer

LETTERS = sorted(pre_tokenizers.ByteLevel.alphabet())
IN_VOCAB = ["<v0>", "<v1>"]  # entries of the model's vocabulary that no merge makes
CONTENTS = ["<a>", "<|b|>", "</c>", "<D>", "ee", "<a", "f g", *IN_VOCAB]
NAMES = ["bos_token", "eos_token", "unk_token", "pad_token", "mask_token"]
OWN_NAMES = ["image_token", "boi_token"]
SIZE = len(LETTERS) + 1 + len(IN_VOCAB)
FLAGS = st.fixed_dictionaries(
    {},
    optional={name: st.booleans() for name in ("single_word", "lstrip", "rstrip", "normalized", "special")},
)
texts = st.lists(st.sampled_from([*CONTENTS, " ", "  ", "a", "ab", "D", "e", "\n", "é", "<", "d>"]), max_size=10)


def write(folder: Path, name: str, value: Any) -> None:
    (folder / name).write_text(json.dumps(value), encoding="utf-8")


def backend(added: dict[str, AddedToken], lower: bool, padding: str | None) -> Backend:
    vocab = {letter: index for index, letter in enumerate([*LETTERS, "ab", *IN_VOCAB])}
    made = Backend(models.BPE(vocab=vocab, merges=[("a", "b")]))
    if lower:
        made.normalizer = normalizers.Lowercase()
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = decoders.ByteLevel()
    made.add_tokens(list(added.values()))
    if padding is not None:
        made.enable_padding(pad_id=0, pad_token=padding)
    return made


@st.composite
def folders(draw: st.DrawFn) -> dict[str, Any]:
    """Files by name. `fits` says that every id in them is the one that the token gets."""
    contents = draw(st.permutations(CONTENTS))
    first, second = sorted((draw(st.integers(0, 4)), draw(st.integers(0, 6))))
    in_json = {content: AddedToken(content, **draw(FLAGS)) for content in contents[:first]}
    lower, padding = draw(st.booleans()), draw(st.sampled_from([None, None, contents[0], contents[-1]]))
    made = backend(in_json, lower, padding)
    ids = {content: made.token_to_id(content) for content in in_json}
    fits = True
    for content in contents[first:second]:
        if made.token_to_id(content) is None:
            ids[content] = max(SIZE - 1, *ids.values(), -1) + 1
        else:
            ids[content] = made.token_to_id(content)
    if draw(st.integers(0, 3)) == 0 and ids:  # an id that is another's, or nobody's
        ids[draw(st.sampled_from(sorted(ids)))] += draw(st.sampled_from([1, 2, 40]))
        fits = False
    config: dict[str, Any] = {"tokenizer_class": draw(st.sampled_from(["PreTrainedTokenizerFast", "MadeUpTokenizer"]))}
    files: dict[str, Any] = {"tokenizer.json": made.to_str(), "tokenizer_config.json": config}
    where = draw(st.sampled_from(["decoder", "added_tokens.json", "both", "neither"]))
    tell = draw(st.permutations([content for content in ids if content not in in_json or draw(st.booleans())]))
    if where in ("decoder", "both"):
        config["added_tokens_decoder"] = {str(ids[one]): {"content": one, **draw(FLAGS)} for one in tell}
        fits = fits and len(config["added_tokens_decoder"]) == len(tell)
    if where in ("added_tokens.json", "both"):
        files["added_tokens.json"] = {one: ids[one] for one in tell}
        fits = fits and len(set(ids.values())) == len(ids)
    token = st.sampled_from(CONTENTS)
    flagged = st.builds(lambda content, flags: {"__type": "AddedToken", "content": content, **flags}, token, FLAGS)
    config |= draw(st.dictionaries(st.sampled_from([*NAMES, *OWN_NAMES]), token | flagged | st.none(), max_size=4))
    extra = st.lists(token | flagged, max_size=3)
    config |= draw(
        st.fixed_dictionaries(
            {},
            optional={
                "additional_special_tokens": extra,
                "extra_special_tokens": extra | st.dictionaries(st.sampled_from(["x_token", "y"]), token, max_size=2),
            },
        )
    )
    if draw(st.booleans()):
        plain = st.builds(lambda content, flags: {"content": content, **flags}, token, FLAGS)
        files["special_tokens_map.json"] = {
            **draw(st.dictionaries(st.sampled_from([*NAMES, *OWN_NAMES]), token | plain, max_size=4)),
            **draw(
                st.fixed_dictionaries(
                    {},
                    optional={
                        "additional_special_tokens": st.lists(token, max_size=2),
                        "extra_special_tokens": st.lists(token | plain, max_size=2),
                    },
                )
            ),
        }
    return {"files": files, "fits": fits}


@pytest.fixture(scope="module")
def quiet() -> Iterator[None]:
    """Without what Transformers warns of each odd folder."""
    logging.disable(logging.WARNING)
    yield
    logging.disable(logging.NOTSET)


@pytest.mark.usefixtures("quiet")
@settings(max_examples=400, deadline=None, suppress_health_check=list(HealthCheck))
@given(drawn=folders(), words=st.lists(texts, min_size=1, max_size=4))
def test_any_layout_has_the_ids_of_auto_tokenizer(drawn: dict[str, Any], words: list[list[str]]) -> None:
    """A token that only one of the files knows is split into letters, or has other flags, another id or name."""
    with TemporaryDirectory() as place:
        folder = Path(place)
        for name, value in drawn["files"].items():
            (folder / name).write_text(value if isinstance(value, str) else json.dumps(value), encoding="utf-8")
        try:
            theirs: Any = transformers.AutoTokenizer.from_pretrained(folder)
        except (TypeError, ValueError, AttributeError) as error:
            event(f"Transformers: {type(error).__name__}")
            return
        try:
            ours = load_tokenizer(folder)
        except ModelError as error:
            event("refused")
            assert not drawn["fits"], error
            assert "the id" in str(error)
            return
    event("equal")
    assert ours.special_tokens == theirs.special_tokens_map
    for parts in words:
        text = "".join(parts)
        ids = theirs.encode(text, add_special_tokens=False)
        assert ours.encode(text) == ids, text
        assert ours.decode(ids) == theirs.decode(ids)
        assert ours.decode(ids, True) == theirs.decode(ids, skip_special_tokens=True)
    assert ours.backend.get_added_tokens_decoder() == theirs.added_tokens_decoder


def folder_of(path: Path, config: dict[str, Any], added: tuple[str, ...] = (), **files: Any) -> Path:
    made = backend({content: AddedToken(content, special=True) for content in added}, False, None)
    made.save(str(path / "tokenizer.json"))
    write(path, "tokenizer_config.json", {"tokenizer_class": "PreTrainedTokenizerFast", **config})
    for name, value in files.items():
        write(path, f"{name}.json", value)
    return path


CHATML = "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
KNOWN_BY: dict[str, dict[str, Any]] = {
    "added_tokens_decoder": {
        "config": {
            "added_tokens_decoder": {
                str(SIZE): {"content": "<|im_start|>", "special": True},
                str(SIZE + 1): {"content": "<|im_end|>", "special": True},
            }
        }
    },
    "added_tokens.json": {"config": {}, "added_tokens": {"<|im_end|>": SIZE + 1, "<|im_start|>": SIZE}},
    "additional_special_tokens": {"config": {"additional_special_tokens": ["<|im_start|>", "<|im_end|>"]}},
    "extra_special_tokens": {"config": {"extra_special_tokens": {"x_token": "<|im_start|>", "y": "<|im_end|>"}}},
    "special_tokens_map.json": {
        "config": {},
        "special_tokens_map": {"bos_token": {"content": "<|im_start|>", "lstrip": False}, "eos_token": "<|im_end|>"},
    },
    "names": {"config": {"bos_token": "<|im_start|>", "eos_token": "<|im_end|>"}},
}


@pytest.mark.parametrize("place", KNOWN_BY)
def test_chat_tokens_that_one_file_knows(tmp_path: Path, place: str) -> None:
    """A chat is 50 letters instead of its tokens, and no stop token is one that the template makes."""
    files = dict(KNOWN_BY[place])
    config = {"chat_template": CHATML, **files.pop("config")}
    ours = load_tokenizer(folder_of(tmp_path, config, **files))
    theirs: Any = transformers.AutoTokenizer.from_pretrained(tmp_path)
    chat = [{"role": "user", "content": "ab"}, {"role": "assistant", "content": "a"}]
    ids = ours.render_messages(chat, False)
    assert ids == theirs.apply_chat_template(chat, return_dict=False)
    assert len(ids) == 2 * 2 + len("user\nassistant\n\n\n") + 2
    assert SIZE + 1 in ours.stop_token_ids
    ours.save(tmp_path)
    for name in ("added_tokens.json", "special_tokens_map.json"):
        (tmp_path / name).unlink(missing_ok=True)
    again, theirs = load_tokenizer(tmp_path), transformers.AutoTokenizer.from_pretrained(tmp_path)
    assert again.render_messages(chat, False) == ids == theirs.apply_chat_template(chat, return_dict=False)
    assert again.special_tokens.get("eos_token") == ours.special_tokens.get("eos_token") == theirs.eos_token


@pytest.mark.parametrize(
    ("config", "files", "named"),
    [
        ({"added_tokens_decoder": {str(SIZE + 5): {"content": "<x>"}}}, {}, rf"'<x>' the id {SIZE + 5}"),
        ({"added_tokens_decoder": {"3": {"content": "<x>"}}}, {}, r"'<x>' the id 3"),
        ({}, {"added_tokens": {"<x>": SIZE, "<y>": SIZE}}, r"'<y>' the id|'<x>' the id"),
        ({}, {"added_tokens": {"<x>": "7"}}, r"added_tokens.json has <x> = '7'; a whole number"),
        (
            {"added_tokens_decoder": ["<x>"]},
            {},
            r"tokenizer_config.json has added_tokens_decoder = \['<x>'\]; an object",
        ),
        ({"added_tokens_decoder": {"a": {"content": "<x>"}}}, {}, r"the id 'a', which is no number"),
        ({"added_tokens_decoder": {"259": "<x>"}}, {}, r"has 259 = '<x>'; an object with a token's content"),
        ({"added_tokens_decoder": {"259": {"content": "<x>", "lstrip": "no"}}}, {}, "has 259 = .*'lstrip': 'no'"),
        ({"eos_token": 5}, {}, "has eos_token = 5; null or a token"),
        ({"eos_token": ["<x>"]}, {}, "has eos_token = "),
        ({"extra_special_tokens": "<x>"}, {}, "has extra_special_tokens = '<x>'; null or a list"),
        ({"extra_special_tokens": {"a_token": 3}}, {}, "extra_special_tokens has a_token = 3; a token"),
        ({"additional_special_tokens": ["\ud800"]}, {}, "extra_special_tokens = .*a list, each entry a token"),
        ({"chat_template": 5}, {}, "has chat_template = 5; null or a string"),
        ({"chat_template": [{"name": "default"}]}, {}, "chat_template lacks template"),
        ({"chat_template": ["x"]}, {}, r"has chat_template = \['x'\]; a list, each entry an object"),
        ({"split_special_tokens": "no"}, {}, "has split_special_tokens = 'no'; null or true or false"),
        ({}, {"special_tokens_map": ["<x>"]}, "special_tokens_map.json holds a list, not an object"),
        ({}, {"special_tokens_map": {"eos_token": {"content": 5}}}, r"special_tokens_map.json has eos_token = "),
    ],
)
def test_files_that_contradict_are_refused_by_name(tmp_path: Path, config: Any, files: Any, named: str) -> None:
    """A token gets another row of the embedding than its file says, or a wrong type is a traceback."""
    with pytest.raises(ModelError, match=named):
        load_tokenizer(folder_of(tmp_path, config, **files))


JSON = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-3, 400)
    | st.floats(allow_nan=False)
    | st.text(max_size=3)
    | st.just("\ud800"),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(
            st.sampled_from(["content", "__type", "lstrip", "special", "name", "x", "3"]), inner, max_size=3
        )
    ),
    max_leaves=5,
)
FIELDS = [*NAMES, *OWN_NAMES, "added_tokens_decoder", "additional_special_tokens", "extra_special_tokens", "x"]
MORE = ["chat_template", "split_special_tokens", "clean_up_tokenization_spaces"]


@settings(max_examples=300, deadline=None)
@example(config={"image_token": "\ud800"}, special={}, added={})
@example(config={"bos_token": {}}, special={"bos_token": None}, added={})
@given(
    config=st.dictionaries(st.sampled_from(FIELDS + MORE), JSON, max_size=3),
    special=st.dictionaries(st.sampled_from(FIELDS), JSON, max_size=3),
    added=st.dictionaries(st.text(max_size=2), JSON, max_size=2),
)
def test_any_values(config: Any, special: Any, added: Any) -> None:
    """A wrong type in one of the files is a traceback."""
    with TemporaryDirectory() as place:
        try:
            load_tokenizer(folder_of(Path(place), config, special_tokens_map=special, added_tokens=added))
        except ModelError:
            event("refused")


def test_id_in_tokenizer_json_that_its_vocabulary_does_not_give(tmp_path: Path) -> None:
    """tokenizer.json says 300 for a token that the library numbers 259 with a warning that nobody sees."""
    folder_of(tmp_path, {}, added=("<x>",))
    path = tmp_path / "tokenizer.json"
    path.write_text(path.read_text().replace(f'"id": {SIZE}', '"id": 300'))
    with pytest.raises(ModelError, match=f"'<x>' the id 300, but .* has the id {SIZE}"):
        load_tokenizer(tmp_path)


def test_chat_template_in_other_places(tmp_path: Path) -> None:
    """A template that Transformers finds is none here, or another one is taken."""
    named = [{"name": "tool_use", "template": "t"}, {"name": "default", "template": "d"}]
    folder_of(tmp_path, {"chat_template": named})

    def same(expected: str | None) -> None:
        theirs: Any = transformers.AutoTokenizer.from_pretrained(tmp_path).chat_template
        assert load_tokenizer(tmp_path).chat_template == expected
        assert (theirs.get("default") if isinstance(theirs, dict) else theirs) == expected

    same("d")
    write(tmp_path, "tokenizer_config.json", {"chat_template": {"default": "e", "rag": "r"}})
    same("e")
    (tmp_path / "additional_chat_templates").mkdir()
    (tmp_path / "additional_chat_templates" / "tool_use.jinja").write_text("u")
    same(None)
    (tmp_path / "additional_chat_templates" / "default.jinja").write_text("f")
    same("f")
    (tmp_path / "chat_template.jinja").write_text("g")
    theirs: Any = transformers.AutoTokenizer.from_pretrained(tmp_path).chat_template
    assert load_tokenizer(tmp_path).chat_template in ("f", "g") and theirs["default"] in ("f", "g")


@pytest.mark.parametrize("flags", [{}, {"add_bos_token": True, "add_eos_token": True, "add_prefix_space": True}])
def test_bos_of_the_post_processor(tmp_path: Path, flags: dict[str, Any]) -> None:
    """A template that writes bos gets a second one from the tokeniser, or settings that count for nothing count."""
    config = {"bos_token": "<s>", "eos_token": "</s>", "chat_template": "{{ bos_token }}" + CHATML, **flags}
    folder_of(tmp_path, config, added=("<s>", "</s>"))
    made = Backend.from_file(str(tmp_path / "tokenizer.json"))
    made.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", SIZE)])
    made.save(str(tmp_path / "tokenizer.json"))
    ours, theirs = load_tokenizer(tmp_path), transformers.AutoTokenizer.from_pretrained(tmp_path)
    chat = [{"role": "user", "content": "ab"}]
    ids = ours.render_messages(chat)
    assert ids.count(SIZE) == 1 and ids == theirs.apply_chat_template(chat, return_dict=False)
    for special in (False, True):
        assert ours.encode("ab </s>", special) == theirs.encode("ab </s>", add_special_tokens=special)


@pytest.mark.parametrize("split", [False, True])
@pytest.mark.parametrize("cleans", [False, True])
def test_settings_of_encode_and_decode(tmp_path: Path, split: bool, cleans: bool) -> None:
    """`split_special_tokens` or `clean_up_tokenization_spaces` counts in Transformers and not here, or the reverse."""
    flags = {"split_special_tokens": split, "clean_up_tokenization_spaces": cleans}
    made = Backend(models.Unigram([("<unk>", 0.0), *((one, -1.0) for one in "▁ab.?!,'ntsve"), ("<x>", -1.0)], 0))
    made.pre_tokenizer, made.decoder = pre_tokenizers.Metaspace(), decoders.Metaspace()
    made.add_special_tokens(["<x>"])
    text = "a . b ? a ! b , a ' b n't a 's b <x>"
    for kind in (made, None):
        folder_of(tmp_path, {"eos_token": "<x>", **flags}, added=("<x>",))
        if kind is not None:
            kind.save(str(tmp_path / "tokenizer.json"))
        ours, theirs = load_tokenizer(tmp_path), transformers.AutoTokenizer.from_pretrained(tmp_path)
        ids = theirs.encode(text, add_special_tokens=False)
        assert ours.encode(text) == ids
        assert ours.decode(ids) == theirs.decode(ids)


ENDS = {
    "eos": ("{% for m in messages %}{{ m.content }}{{ eos_token }}{% endfor %}", "</s>"),
    "gemma": ("{% for m in messages %}<t>{{ m.content | trim }}<e>\n{% endfor %}", "<e>"),
    "words first": ("{% for m in messages %}{{ m.role }}: {{ m.content }} (end)<e>{% endfor %}", "<e>"),
    "last only": ("{% for m in messages %}<t>{{ m.content }}{% if loop.last %}<e>{% endif %}{% endfor %}", "<e>"),
}


@pytest.mark.parametrize("name", ENDS)
def test_stop_tokens_have_what_the_template_ends_a_turn_with(tmp_path: Path, name: str) -> None:
    """Answers run on to their length: eos is `</s>`, and the template ends a turn with `<e>`, which nobody named."""
    template, end = ENDS[name]
    folder_of(tmp_path, {"eos_token": "</s>", "chat_template": template}, added=("</s>", "<t>", "<e>"))
    ours = load_tokenizer(tmp_path, stop_ids=(7,))
    assert set(ours.stop_token_ids) == {7, SIZE, ours.token_to_id(end)}


def test_a_token_named_like_what_templates_are_given(tmp_path: Path) -> None:
    """A token that its file names `messages` takes the conversation's place."""
    folder_of(tmp_path, {"extra_special_tokens": {"messages": "<x>", "y": "<z>"}, "chat_template": CHATML + "{{ y }}"})
    assert load_tokenizer(tmp_path).render_text([{"role": "user", "content": "a"}]).endswith("a<|im_end|>\n<z>")


def test_template_whose_end_is_no_token(tmp_path: Path) -> None:
    """Nothing says that answers have no end: the template's `<|im_end|>` is ten letters to this tokeniser."""
    folder_of(tmp_path, {"eos_token": "</s>", "chat_template": CHATML}, added=("</s>",))
    with pytest.warns(TandemWarning, match=r"ends an answer with '<\|im_end\|>\\n', which is none of"):
        assert load_tokenizer(tmp_path).stop_token_ids == (SIZE,)


@pytest.mark.parametrize("place", ["added", "vocabulary", "decoder", "sparse"])
def test_ids_that_the_model_does_not_have(tmp_path: Path, place: str) -> None:
    """A token's id lies outside the embedding: the engine reads outside the matrix."""
    added = ("<x>",) if place == "added" else ()
    config = {"added_tokens_decoder": {str(SIZE): {"content": "<x>"}}} if place == "decoder" else {}
    folder_of(tmp_path, config, added=added)
    size, token, index = SIZE, "<x>", SIZE
    if place == "vocabulary":
        size, token, index = SIZE - 1, IN_VOCAB[-1], SIZE - 1
    if place == "sparse":
        path, token, index = tmp_path / "tokenizer.json", IN_VOCAB[-1], 4000
        path.write_text(path.read_text().replace(f'"{token}": {SIZE - 1}', f'"{token}":{index}'))
    with pytest.raises(ModelError, match=rf"'{token}' with id {index}, where vocab_size is {size}.*resize_token"):
        load_tokenizer(tmp_path, vocab_size=size)
    load_tokenizer(tmp_path, vocab_size=index + 1)
    load_tokenizer(tmp_path, vocab_size=index + 900)


@settings(max_examples=60, deadline=None)
@given(st.dictionaries(st.sampled_from([*CONTENTS, *"abcdef"]), st.integers(0, 400), min_size=1), st.integers(1, 401))
def test_any_sizes(ids: dict[str, int], size: int) -> None:
    """An id at or beyond vocab_size is let through, or one below it is refused."""
    with TemporaryDirectory() as place:
        vocab = {content: index for index, content in {index: content for content, index in ids.items()}.items()}
        Backend(models.WordLevel(vocab, unk_token="a")).save(f"{place}/tokenizer.json")
        if max(vocab.values()) < size:
            load_tokenizer(Path(place), vocab_size=size)
        else:
            with pytest.raises(ModelError, match=f"where vocab_size is {size}"):
                load_tokenizer(Path(place), vocab_size=size)


def write_gguf(path: Path, tokens: list[str], kinds: list[int], named: dict[str, int], template: str) -> Path:
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("smollm")
    writer.add_token_list(tokens)
    writer.add_token_types(kinds)
    writer.add_token_merges(["a b"])
    for name, index in named.items():
        writer.add_uint32(f"tokenizer.ggml.{name}_token_id", index)
    writer.add_chat_template(template)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


@settings(max_examples=80, deadline=None)
@given(
    drawn=st.lists(
        st.tuples(st.sampled_from([*CONTENTS, "<｜u｜>", "▁", "\n\n", "<think>"]), st.sampled_from([1, 3, 3, 4])),
        unique_by=lambda one: one[0],
        max_size=6,
    ),
    named=st.dictionaries(st.sampled_from(["bos", "eos", "unknown", "padding"]), st.integers(0, 5), max_size=3),
    template=st.lists(st.sampled_from([*CONTENTS, "<｜u｜>", "\n\n"]), max_size=3).map("".join),
    words=texts,
)
def test_any_gguf_layout(drawn: Any, named: dict[str, int], template: str, words: list[str]) -> None:
    """A GGUF's control token in other letters than its byte alphabet is split, and its template's turns with it."""
    tokens = [*LETTERS, "ab", *(content for content, _ in drawn)]
    kinds = [1] * (len(LETTERS) + 1) + [kind for _, kind in drawn]
    named = {name: len(LETTERS) + index for name, index in named.items() if index <= len(drawn)}
    text = "".join([*words, *(content for content, _ in drawn), template])
    with TemporaryDirectory() as place:
        path = write_gguf(Path(place) / "m.gguf", tokens, kinds, named, template)
        theirs: Any = transformers.PreTrainedTokenizerFast.from_pretrained(place, gguf_file="m.gguf")
        split = {content for index, content in enumerate(tokens) if theirs.convert_tokens_to_ids(content) != index}
        written = {one for one, kind in drawn if kind > 1 and one in template and not one.isspace()}
        try:
            ours = load_gguf_tokenizer(read_header(path), vocab_size=len(tokens))
        except ModelError as error:
            event("refused")
            assert any(repr(token) in str(error) for token in split & (written | {tokens[i] for i in named.values()}))
            return
        with pytest.raises(ModelError, match=f"where vocab_size is {len(LETTERS)}"):
            load_gguf_tokenizer(read_header(path), vocab_size=len(LETTERS))
    event("equal")
    assert not split & written
    assert ours.encode(text) == theirs.encode(text, add_special_tokens=False)


@pytest.mark.parametrize("fault", ["eos", "template", "tokens", "merges"])
def test_gguf_fields_of_the_wrong_type(tmp_path: Path, fault: str) -> None:
    """A number where a string is needed, or an id of no token, is a traceback."""
    tokens = [*LETTERS, "ab"]
    file = read_header(write_gguf(tmp_path / "m.gguf", tokens, [1] * len(tokens), {"eos": 3}, "x"))
    wrong = {"eos": ("ggml.eos_token_id", 900), "template": ("chat_template", 5), "tokens": ("ggml.tokens", 5),
             "merges": ("ggml.merges", ["a zz"])}[fault]  # fmt: skip
    changed = dataclasses.replace(file, fields={**file.fields, f"tokenizer.{wrong[0]}": wrong[1]})
    with pytest.raises(
        ModelError, match="eos_token_id = 900; .* below the vocabulary's|chat_template = 5|no tokeniser|cannot be built"
    ):
        load_gguf_tokenizer(changed)


def test_gguf_beside_another_tokenizer_json(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Transformers takes the tokenizer.json that lies beside a GGUF for the GGUF's, and the cache keeps it."""
    monkeypatch.setenv("TANDEM_CACHE", str(tmp_path / "cache"))
    tokens = [*reversed(LETTERS), "ab"]
    path = write_gguf(tmp_path / "m.gguf", tokens, [1] * len(tokens), {"eos": 3}, "x")
    folder_of(tmp_path, {})
    file = read_header(path)
    file = dataclasses.replace(file, fields={**file.fields, "tokenizer.ggml.pre": "qwen2"})  # not built here
    assert load_gguf_tokenizer(file).encode("a") == [tokens.index("a")]
