"""The page of a server, and of a router: load, tenants and programs, live."""

from __future__ import annotations

from functools import cache
from pathlib import Path

from starlette.responses import Response

POLICY = "default-src 'none'; style-src 'unsafe-inline'; script-src 'unsafe-inline'; connect-src 'self'; img-src data:"


def page() -> Response:
    """It asks for /events itself, with the key that its reader gives."""
    return Response(_page(), media_type="text/html", headers={"content-security-policy": POLICY})


@cache
def _page() -> bytes:
    return Path(__file__).with_name("page.html").read_bytes()
