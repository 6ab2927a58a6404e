"""What llguidance and xgrammar make of schemas, against the package jsonschema; the table of docs/structured.md."""

from __future__ import annotations

import json
from collections.abc import Callable
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest

from tandem.engine.constraint import _spelled, unmet
from tandem.errors import ConfigError
from tandem.types import Constraint
from tests.schemas import BEYOND, CASES, Case
from tests.tables import check_table

pytest.importorskip("llguidance", reason="constraints are those of the extra serve")
PAGE = "docs/structured.md"
ROOT = Path(__file__).parents[2]
Fits = Callable[[str], bool]


def by_llguidance(schema: dict[str, Any]) -> Fits:
    """As tandem asks it; ConfigError where it refuses."""
    constraint = Constraint("json_schema", json.dumps(schema))
    state = _spelled(constraint)
    if state.is_error():
        raise ConfigError(state.get_error())

    def fits(text: str) -> bool:
        one, content = state.deep_copy(), text.encode()
        return one.try_consume_tokens(list(content)) == len(content) and one.is_accepting()

    return fits


def by_xgrammar(schema: dict[str, Any]) -> Fits:
    """By its defaults, but for strict_mode, which takes every object for closed; ConfigError where it refuses."""
    import xgrammar

    tokens = [*(bytes([byte]) for byte in range(256)), b"<end>"]
    info = xgrammar.TokenizerInfo(tokens, xgrammar.VocabType.RAW, vocab_size=257, stop_token_ids=[256])
    try:
        compiled = xgrammar.GrammarCompiler(info, max_threads=1).compile_json_schema(
            json.dumps(schema), strict_mode=False
        )
    except RuntimeError as error:
        raise ConfigError(str(error)) from error

    def fits(text: str) -> bool:
        one = xgrammar.GrammarMatcher(compiled)
        return all(one.accept_token(byte) for byte in text.encode()) and one.accept_token(256)

    return fits


def verdict(case: Case, by: Callable[[dict[str, Any]], Fits]) -> str:
    """Worst first: it takes a text that does not fit; it takes none of some that do; it refuses; it holds."""
    try:
        fits = by(case.schema)
    except ConfigError:
        return "refuses"
    for text in case.wrong:
        if fits(text):
            return f"**wrong**: takes `{text}`"
    if case.name == "a remote $ref":
        return "**wrong**: takes anything"
    missed = [text for text in case.right if not fits(text)]
    return f"narrower: not `{' '.join(missed[0].split())}`" if missed else "holds"


def shown(case: Case) -> str:
    text = json.dumps(case.schema, ensure_ascii=False)
    return f"`{text}`" if len(text) <= 110 else ""


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_texts_fit_as_jsonschema_says(case):
    """The table judges backends by texts that are on the wrong side themselves, or a text is read again as another."""
    jsonschema = pytest.importorskip("jsonschema", reason="the independent reference")
    own = jsonschema.validators.validator_for(case.schema, default=jsonschema.Draft202012Validator)
    own.check_schema(case.schema)
    for text in (*case.right, *case.wrong):
        try:
            fits = own(case.schema, format_checker=jsonschema.FormatChecker()).is_valid(
                json.loads(text, parse_constant=lambda name: json.loads(""))
            )
        except json.JSONDecodeError:
            fits = False
        assert fits == (text in case.right or text in BEYOND), text
        if case.name not in ("an unknown format", "pattern with lookahead"):  # which the door refuses
            assert (unmet(Constraint("json_schema", json.dumps(case.schema)), text) == "") == (text in case.right), text


def test_what_tandem_holds_is_what_fits():
    """llguidance takes a text that does not fit its schema, and nothing says so: what is wrong here is in the docs."""
    wrong = {case.name for case in CASES if verdict(case, by_llguidance).startswith("**wrong**")}
    assert wrong == {"format date", "a key twice"}


def test_the_table_of_schemas(request):
    """Docs say that a schema is held which is refused, or a new version of a backend holds another."""
    columns = [[verdict(case, by_llguidance) for case in CASES]]
    if find_spec("xgrammar") is None:  # it brings Transformers; the other column is compared alone
        lines = (ROOT / PAGE).read_text(encoding="utf-8").splitlines()
        cells = [[cell.strip() for cell in line.split("|")] for line in lines if line.count("|") == 5]
        assert {row[1]: row[3] for row in cells}.items() >= {
            case.name: cell for case, cell in zip(CASES, columns[0], strict=True)
        }.items()
        return
    columns.append([verdict(case, by_xgrammar) for case in CASES])
    head = " | ".join(f"{name} {version(name)}" for name in ("llguidance", "xgrammar"))
    rows = [
        f"| {case.name} | {shown(case)} | {' | '.join(cells)} |" for case, *cells in zip(CASES, *columns, strict=True)
    ]
    check_table(request, PAGE, "schemas", "\n".join([f"| | schema | {head} |", "|---|---|---|---|", *rows]))
