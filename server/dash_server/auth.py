"""Identifies callers by bearer token, client certificate or address, with the limits of each.

Tokens come from a TOML file with a table for each caller, read again when it changes:

    [team-a]
    token = "…"               # or token_sha256 = "…", so that the file holds no secret
    max_requests = 8          # inside at once; unset: DASH_MAX_REQUESTS_PER_CALLER
    max_tokens = 20000        # prompts and output limits, over all its requests inside
    weight = 2                # its share of a busy server, against others' 1
    priority = "high"         # the highest class that its requests may ask for; "normal" unless set

Knows metadata and files; knows no requests. Tokens are compared by digest in constant time, and appear in no message,
log or representation.
"""

import hashlib
import hmac
import ipaddress
import logging
import time
import tomllib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal
from urllib.parse import unquote

from pydantic import BaseModel, ConfigDict, Field, SecretStr, ValidationError, model_validator

from dash_server.fair_queue import Priority
from dash_server.statuses import Unauthenticated
from dash_server.watched_files import WatchedFiles

logger = logging.getLogger(__name__)

_MIN_TOKEN_CHARS = 16
_MAX_FILE_BYTES = 4 * 1024 * 1024
_BEARER = "bearer "


class TokenFileError(ValueError):
    """The token file cannot be used. The message names the file and the entry, never a token."""


@dataclass(frozen=True, slots=True)
class CallerLimits:
    """Requests and tokens that one caller may have inside at once (None: no limit), and its weight in the queue."""

    max_requests: int | None = None
    max_tokens: int | None = None
    weight: float = 1.0
    highest: Priority = Priority.HIGH
    """The highest class that its requests may have."""


@dataclass(frozen=True, slots=True)
class Caller:
    """One caller: a name with its limits."""

    name: str
    limits: CallerLimits = CallerLimits()
    cache_namespace: str = ""
    """Callers in one namespace may reuse each other's prompts. A caller with a secret has its own."""


class _Entry(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)

    token: SecretStr | None = Field(default=None, min_length=_MIN_TOKEN_CHARS)
    token_sha256: str | None = Field(default=None, pattern="^[0-9a-fA-F]{64}$")
    max_requests: int | None = Field(default=None, ge=1)
    max_tokens: int | None = Field(default=None, ge=1)
    weight: float = Field(default=1.0, gt=0, le=1000)
    priority: Literal["low", "normal", "high"] = "normal"

    @model_validator(mode="after")
    def _has_one_secret(self) -> "_Entry":
        if (self.token is None) == (self.token_sha256 is None):
            raise ValueError("must have either token or token_sha256")
        return self

    def digest(self) -> bytes:
        if self.token_sha256 is not None:
            return bytes.fromhex(self.token_sha256)
        assert self.token is not None
        return hashlib.sha256(self.token.get_secret_value().encode()).digest()


class TokenTable:
    """The callers in one token file."""

    def __init__(self, callers: Mapping[bytes, Caller]) -> None:
        """`callers` are keyed by the SHA-256 digests of their tokens."""
        self._callers = tuple(callers.items())

    @classmethod
    def load(cls, path: Path, limits: CallerLimits = CallerLimits()) -> "TokenTable":
        """Reads the file; `limits` apply to callers without limits of their own.

        Raises:
            TokenFileError: the file cannot be read, or an entry is wrong.
        """
        try:
            data = path.read_bytes()
            if len(data) > _MAX_FILE_BYTES:
                raise TokenFileError(f"{path} has more than {_MAX_FILE_BYTES} bytes")
            tables = tomllib.loads(data.decode())
        except OSError as error:
            raise TokenFileError(f"{path} cannot be read: {error.strerror or error}") from None
        except UnicodeDecodeError:
            raise TokenFileError(f"{path} is not UTF-8") from None
        except (tomllib.TOMLDecodeError, RecursionError):
            # The parser's message may quote the file, secrets included.
            raise TokenFileError(f"{path} is not a TOML file") from None
        callers: dict[bytes, Caller] = {}
        for name, table in tables.items():
            entry = _entry(path, name, table)
            if entry.digest() in callers:
                raise TokenFileError(f"{path}: {name} has the token of {callers[entry.digest()].name}")
            own = CallerLimits(
                limits.max_requests if entry.max_requests is None else entry.max_requests,
                limits.max_tokens if entry.max_tokens is None else entry.max_tokens,
                entry.weight,
                Priority[entry.priority.upper()],
            )
            callers[entry.digest()] = Caller(name, own, f"token:{name}")
        if not callers:
            raise TokenFileError(f"{path} has no entry")
        return cls(callers)

    def caller(self, token: str) -> Caller | None:
        """Returns the token's owner. Takes the same time for every token."""
        digest = hashlib.sha256(token.encode(errors="surrogateescape")).digest()
        found = None
        for known, caller in self._callers:
            if hmac.compare_digest(known, digest):
                found = caller
        return found


def _entry(path: Path, name: str, table: object) -> _Entry:
    if not isinstance(table, dict):
        raise TokenFileError(f"{path}: {name} must be a table, like [{name}]")
    try:
        return _Entry(**table)
    except ValidationError as error:
        details = error.errors(include_url=False, include_input=False, include_context=False)[0]
        place = "".join(f".{part}" for part in details["loc"])
        raise TokenFileError(f"{path}: {name}{place}: {details['msg'].removeprefix('Value error, ')}") from None


def _name_in(certificate: Mapping[str, Sequence[bytes]]) -> str | None:
    """Returns the name of a certificate's owner: its URI, as SPIFFE has it, or its common name, if that is its whole
    subject, or its subject, or the digest of a certificate without all these; None: there is no certificate."""

    def texts(fact: str) -> list[str]:
        return [value.decode(errors="replace") for value in certificate.get(fact, ())]

    if uris := [name for name in texts("x509_subject_alternative_name") if "://" in name]:
        return f"certificate-uri:{uris[0]}"
    names, subjects = texts("x509_common_name"), texts("x509_subject")
    if names and (not subjects or subjects[0] == f"CN={names[0]}"):
        return f"certificate:{names[0]}"
    if subjects and subjects[0]:
        return f"certificate-subject:{subjects[0]}"
    if own := certificate.get("x509_pem_cert"):
        return f"certificate-sha256:{hashlib.sha256(own[0]).hexdigest()}"
    return None


def address_of(peer: str) -> str:
    """Returns the address in a gRPC peer, `ipv4:1.2.3.4:5`; of IPv6 the first 64 bits, of which a caller has all."""
    kind, _, rest = peer.partition(":")
    host = unquote(rest).rpartition(":")[0].strip("[]")
    if kind != "ipv6":
        return f"{kind}:{host}" if host else peer
    try:
        return f"ipv6:{ipaddress.ip_network((host.partition('%')[0], 64), strict=False)}"
    except ValueError:
        return peer


class Authenticator:
    """Identifies the caller of each call."""

    def __init__(
        self,
        token_file: Path | None = None,
        limits: CallerLimits = CallerLimits(),
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """Without a token file everyone may call, within `limits`.

        Raises:
            TokenFileError: the file cannot be used.
        """
        self._path = token_file
        self._limits = limits
        self._files = WatchedFiles(token_file, clock=clock)
        self._table = None if token_file is None else TokenTable.load(token_file, limits)

    def identify(
        self,
        metadata: Sequence[tuple[str, str | bytes]],
        peer: str,
        certificate: Mapping[str, Sequence[bytes]] | None = None,
    ) -> Caller:
        """Returns the caller with this metadata, this gRPC peer address, and gRPC's facts of its certificate.

        Raises:
            Unauthenticated: a token is required, and there is none or an unknown one.
        """
        self._reload_if_changed()
        if self._table is not None:
            return self._by_token(metadata)
        if (name := _name_in(certificate or {})) is not None:
            return Caller(name, self._limits, name)
        return Caller(address_of(peer), self._limits)

    def _by_token(self, metadata: Sequence[tuple[str, str | bytes]]) -> Caller:
        assert self._table is not None
        values = [value for key, value in metadata if key == "authorization" and isinstance(value, str)]
        if not values:
            raise Unauthenticated("a bearer token is required in the metadata 'authorization'")
        if len(values) > 1 or not values[0].lower().startswith(_BEARER):
            raise Unauthenticated("the metadata 'authorization' must be one value, 'Bearer ' and a token")
        caller = self._table.caller(values[0][len(_BEARER) :].strip())
        if caller is None:
            raise Unauthenticated("nobody has this bearer token")
        return caller

    def _reload_if_changed(self) -> None:
        """Reads a changed file. Reports one that cannot be used and keeps the old callers."""
        if self._path is None or not self._files.have_changed():
            return
        try:
            self._table = TokenTable.load(self._path, self._limits)
            logger.info("tokens were read again from %s", self._path)
        except TokenFileError as error:
            logger.error("the tokens stay as they were: %s", error)
