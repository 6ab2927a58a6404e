"""What a caller is told that gets no answer, in the shape of OpenAI's errors."""

from __future__ import annotations

import re
from typing import Any

import msgspec

from tandem.errors import CapacityError, TandemError, UserError

KINDS = {403: "permission_error", 409: "conflict_error", 429: "rate_limit_error", 503: "service_unavailable"}
_PLACE = re.compile(r"(?P<what>.*?)(?: - at `\$(?P<path>.*)`)?", re.DOTALL)
_UNKNOWN = re.compile(r"Object contains unknown field `(?P<name>.*)`", re.DOTALL)


class Refusal(Exception):
    """A call that is not answered: an HTTP status, and words. `retry_s`: when the same call may be answered."""

    def __init__(
        self, status: int, message: str, code: str | None = None, param: str | None = None, retry_s: int | None = None
    ) -> None:
        super().__init__(message)
        self.status, self.message, self.code, self.param, self.retry_s = status, message, code, param, retry_s

    def body(self) -> dict[str, Any]:
        """
        >>> Refusal(401, "No key.", "invalid_api_key").body()["error"]["type"]
        'invalid_request_error'
        """
        kind = KINDS.get(self.status, "server_error" if self.status >= 500 else "invalid_request_error")
        return {"error": {"message": self.message, "type": kind, "param": self.param, "code": self.code}}

    def headers(self) -> dict[str, str]:
        return {} if self.retry_s is None else {"retry-after": str(self.retry_s)}


def refused(error: TandemError) -> Refusal:
    """What of tandem's own errors a caller hears: those that it can mend word for word."""
    if isinstance(error, CapacityError):
        return Refusal(400, str(error), "context_length_exceeded")
    if isinstance(error, UserError):
        return Refusal(400, str(error), "invalid_value")
    return Refusal(500, f"the engine failed, and this request with it: {error} Ask again.", "engine_failed")


def misfit(error: msgspec.ValidationError) -> Refusal:
    """Of a body that is JSON, but not what is asked for: names the field.

    >>> misfit(msgspec.ValidationError("Expected `int`, got `str` - at `$.n`")).param
    'n'
    """
    found = _PLACE.fullmatch(str(error))
    what, path = (found["what"], found["path"] or "") if found else (str(error), "")
    unknown = _UNKNOWN.fullmatch(what)
    if unknown:
        path = f"{path}.{unknown['name']}".removeprefix(".")
        return Refusal(400, f"there is no parameter {path}. Take it out.", "unknown_parameter", path)
    path = path.removeprefix(".")
    code = "missing_required_parameter" if "missing required field" in what else "invalid_type"
    where = f"{path}: " if path else ""
    return Refusal(400, f"{where}{what[:1].lower()}{what[1:]}.", code, path or None)
