"""API keys: read once, kept only as hashes, compared in constant time.

Knows the key file and the `Authorization` header; knows nothing of what a key may be used for (all keys are equal).
"""

from __future__ import annotations

import hashlib
import hmac
import re
from pathlib import Path

from megalith.base.errors import ConfigError

MIN_KEY_CHARS = 16
_HASHED = re.compile(r"sha256:([0-9a-fA-F]{64})")


class KeyRing:
    """The accepted keys as (name, SHA-256) pairs.

    A plain hash is enough: keys are long random strings, not passwords, so there is no dictionary to try.
    """

    def __init__(self, entries: tuple[tuple[str, bytes], ...]) -> None:
        self._entries = entries

    @classmethod
    def from_file(cls, path: str) -> KeyRing:
        """Read `path`: one key a line, `#` starts a comment line. Raises ConfigError, which never shows a key."""
        try:
            text = Path(path).expanduser().read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise ConfigError(f"The API key file {path} cannot be read: {error}.") from None
        entries: list[tuple[str, bytes]] = []
        for number, line in enumerate(text.splitlines(), 1):
            line = line.strip()
            if line and not line.startswith("#"):
                entries.append(_parse(line, f"{path}, line {number}", len(entries)))
        if not entries:
            raise ConfigError(
                f"The API key file {path} holds no key.", "Write one, for example: openssl rand -hex 32 > " + path
            )
        return cls(tuple(entries))

    def find(self, authorization: str | None) -> str | None:
        """The name of the key in an `Authorization: Bearer` header, or None when it is missing or wrong.

        Every entry is compared, whatever the outcome, and each comparison takes the same time.
        """
        scheme, _, token = (authorization or "").partition(" ")
        digest = hashlib.sha256(token.strip().encode("utf-8", "surrogateescape")).digest()
        found: str | None = None
        for name, known in self._entries:
            if hmac.compare_digest(digest, known):
                found = name
        return found if scheme.lower() == "bearer" else None


def _parse(line: str, origin: str, index: int) -> tuple[str, bytes]:
    name, colon, secret = line.partition(":")
    if not colon or name == "sha256":
        name, secret = f"key-{index + 1}", line
    match = _HASHED.fullmatch(secret)
    if match:
        return name, bytes.fromhex(match.group(1))
    if len(secret) < MIN_KEY_CHARS:
        raise ConfigError(
            f"{origin}: the key has {len(secret)} characters; at least {MIN_KEY_CHARS} are needed.",
            "Make one with: openssl rand -hex 32",
        )
    return name, hashlib.sha256(secret.encode()).digest()
