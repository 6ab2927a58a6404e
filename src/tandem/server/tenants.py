"""Who asks: API keys, the tenants that they name, and whom a call may say that it is of.

A tenant is a path, organisation/team/user. A key names one, and its calls are of that or of one below it.
"""

from __future__ import annotations

import re
import tomllib
from collections.abc import Mapping
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path
from typing import Any

from starlette.datastructures import Address

from tandem import env
from tandem.errors import ConfigError
from tandem.server.config import ServerConfig
from tandem.server.refusal import Refusal

PATH = re.compile(r"[\w.@+-]{1,64}(/[\w.@+-]{1,64}){0,7}", re.ASCII)


@dataclass(frozen=True, slots=True)
class Holder:
    """Of an API key."""

    tenant: str = ""  # "": any
    admin: bool = False


class Access:
    """The keys and tenants of a server. Keys are held as hashes, and looked up by them."""

    def __init__(self, config: ServerConfig) -> None:
        self._holders = read_keys(Path(config.keys)) if config.keys else {}
        if alone := env.api_key():
            self._holders[_hashed(alone)] = Holder(admin=True)
        for tenant in config.tenants:
            if not PATH.fullmatch(tenant):
                raise ConfigError(f"server.tenants has {tenant!r}. Write paths of names, as acme/search/ann.")
        self._tenants = config.tenants
        self._control = config.control

    @property
    def asks(self) -> bool:
        """Whether callers need a key."""
        return bool(self._holders)

    def holder(self, headers: Mapping[str, str]) -> Holder:
        """Who calls. 401 where keys are asked for and this is none."""
        if not self._holders:
            return Holder(admin=True)
        scheme, _, key = headers.get("authorization", "").partition(" ")
        if scheme.lower() != "bearer" or not key.strip():
            raise Refusal(401, "no API key was given. Send the header Authorization: Bearer KEY.", "missing_api_key")
        holder = self._holders.get(_hashed(key.strip()))
        if holder is None:
            raise Refusal(401, f"the API key {_masked(key.strip())} is not known here.", "invalid_api_key")
        return holder

    def tenant(self, holder: Holder, asked: str | None) -> str:
        """Whose call it is. 400 for what is no path, 403 for what the key is not of, or nobody knows."""
        if not asked:
            return holder.tenant
        if not PATH.fullmatch(asked):
            raise Refusal(
                400, f"tenant is {asked!r}. Write a path of names, as acme/search/ann.", "invalid_value", "tenant"
            )
        if not within(asked, holder.tenant):
            said = f"tenant {asked} is not within {holder.tenant}, which this API key is of."
            raise Refusal(403, said, "tenant_not_allowed", "tenant")
        if self._tenants and not any(within(asked, known) for known in self._tenants):
            raise Refusal(403, f"there is no tenant {asked} (server.tenants).", "unknown_tenant", "tenant")
        return asked

    def control(self, holder: Holder) -> None:
        """403 where the caller may not pause the engine or change its weights."""
        if not self._control:
            raise Refusal(403, "this server was started without server.control=true.", "control_is_off")
        if not holder.admin:
            raise Refusal(403, "this API key is not an admin's.", "admin_only")

    def administer(self, holder: Holder, client: Address | None) -> None:
        """403 where the caller is no admin, or is on another machine where nobody needs a key."""
        if not holder.admin:
            raise Refusal(403, "this API key is not an admin's.", "admin_only")
        if not self.asks and (client is None or client.host not in ("127.0.0.1", "::1")):
            raise Refusal(403, "without keys this is for callers on the same machine alone.", "admin_only")


def read_keys(path: Path) -> dict[bytes, Holder]:
    """Hash of a key -> its holder. ConfigError for a file that is none of keys.

    [[keys]]
    key = "sk-..."
    tenant = "acme/search"
    """
    try:
        rows = tomllib.loads(path.expanduser().read_text(encoding="utf-8")).get("keys")
    except OSError as error:
        raise ConfigError(f"server.keys: {path} cannot be read: {error.strerror}. Check the path.") from error
    except ValueError as error:
        raise ConfigError(f"server.keys: {path} is no TOML: {error}.") from error
    if not isinstance(rows, list) or not rows:
        raise ConfigError(f'server.keys: {path} has no [[keys]]. Write for each: key = "...", tenant = "..."')
    found: dict[bytes, Holder] = {}
    for number, row in enumerate(rows, start=1):
        key, holder = _row(f"server.keys: {path}, key {number}", row)
        if key in found:
            raise ConfigError(f"server.keys: {path}, key {number} stands there before. Drop one.")
        found[key] = holder
    return found


def _row(where: str, row: Any) -> tuple[bytes, Holder]:
    if not isinstance(row, dict) or set(row) - {"key", "tenant", "admin"}:
        raise ConfigError(f"{where} has other fields than key, tenant and admin.")
    key, tenant, admin = row.get("key"), row.get("tenant", ""), row.get("admin", False)
    if not isinstance(key, str) or len(key) < 8 or not key.isascii() or key != "".join(key.split()):
        raise ConfigError(f"{where}: key must be a text of 8 or more ASCII characters without spaces.")
    if not isinstance(tenant, str) or (tenant and not PATH.fullmatch(tenant)):
        raise ConfigError(f"{where}: tenant is {tenant!r}. Write a path of names, as acme/search/ann.")
    if not isinstance(admin, bool):
        raise ConfigError(f"{where}: admin is {admin!r}. Allowed: true, false.")
    return _hashed(key), Holder(tenant, admin)


def _hashed(key: str) -> bytes:
    return sha256(key.encode("utf-8", "surrogateescape")).digest()


def _masked(key: str) -> str:
    """
    >>> _masked("sk-123456789"), _masked("abc")
    ('sk-1…', '…')
    """
    return f"{key[:4] if len(key) > 8 else ''}…"


def within(path: str, above: str) -> bool:
    """
    >>> within("acme/search", "acme"), within("acme2", "acme"), within("x", "")
    (True, False, True)
    """
    return not above or path == above or path.startswith(f"{above}/")
