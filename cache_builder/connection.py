"""How the store is reached: its URL, whose user and password, which certificates. And what of a URL may be shown.

    redis://host:port/0             one server                     rediss://host:port/0           the same over TLS
    redis+cluster://host:port       a cluster, by any of its nodes rediss+cluster://host:port     the same over TLS
    unix:///path                    one server on this machine

No password is ever in a message, a name or a repr.
"""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from urllib.parse import SplitResult, urlsplit

from cache_builder.errors import StoreError

SERVERS = ("redis", "rediss", "unix")
CLUSTERS = {"redis+cluster": "redis", "rediss+cluster": "rediss"}  # and the scheme of one node
WANTED = (
    "redis://host:port, rediss://host:port, redis+cluster://host:port, rediss+cluster://host:port, unix:///path or "
    "embedded:FOLDER, with %40 for @, %2F for /, %3F for ? and %23 for # in a password"
)


@dataclass(frozen=True)
class Connection:
    """What a URL does not say, or should not."""

    username: str | None = None
    password: str | None = field(default=None, repr=False)
    password_file: Path | None = None
    ca_file: Path | None = None  # None: the authorities that the system trusts
    cert_file: Path | None = None
    key_file: Path | None = None

    def arguments(self, url: str) -> dict[str, Any]:
        """What redis-py is told beside `url`.

        Raises StoreError for a file that cannot be read, and for what contradicts itself or the URL.
        """
        parts = urlsplit(url)
        login = {"username": self.username, "password": self._password()}
        for name, in_url in (("username", parts.username), ("password", parts.password)):
            if in_url and login[name]:
                raise StoreError(f"store {redacted(url)} has a {name} in its URL and another beside it: give one")
        given = {name: value for name, value in login.items() if value}
        return {**given, **self._certificates(url, parts.scheme.startswith("rediss"))}

    def _password(self) -> str | None:
        if self.password and self.password_file:
            raise StoreError(f"a password and a password file, {self.password_file}, are given: give one of them")
        if self.password_file is None:
            return self.password
        password = _read("password file", self.password_file).rstrip("\r\n")
        if not password:
            raise StoreError(f"password file {self.password_file} is empty: write the password into it")
        return password

    def _certificates(self, url: str, tls: bool) -> dict[str, Any]:
        files = {"CA file": self.ca_file, "certificate": self.cert_file, "key file": self.key_file}
        given = [name for name, file in files.items() if file is not None]
        if not tls:
            if given:
                raise StoreError(f"a {given[0]} is given, but {redacted(url)} is not TLS: write rediss for redis")
            return {}
        if (self.cert_file is None) != (self.key_file is None):
            raise StoreError(
                f"a {given[-1]} is given alone: a client shows a certificate and has its key file, or none"
            )
        for name, file in files.items():
            if file is not None:
                _read(name, file)
        found = {"ssl_ca_certs": self.ca_file, "ssl_certfile": self.cert_file, "ssl_keyfile": self.key_file}
        options = {name: str(file) for name, file in found.items() if file is not None}
        # No key's passphrase is asked for at the terminal: a key that has one is refused.
        return {**options, "ssl_check_hostname": True, "ssl_password": ""}


def server_url(url: str) -> tuple[str, bool]:
    """`url` in redis-py's spelling, and whether it is a cluster's. Raises StoreError for what is no URL of a store."""
    parts = _parts(url)
    if parts is None or parts.scheme not in (*SERVERS, *CLUSTERS):
        raise StoreError(f"store {redacted(url)} is not a URL that can be opened: wanted {WANTED}")
    if parts.scheme not in CLUSTERS:
        return url, False
    if parts.path not in ("", "/", "/0"):
        raise StoreError(f"store {redacted(url)} names a database: a cluster has but one, leave {parts.path} out")
    return parts._replace(scheme=CLUSTERS[parts.scheme]).geturl(), True


def redacted(url: str) -> str:
    """`url` without what a log must not hold: user name, password and query."""
    parts = _parts(url)
    if parts is None:
        return "(unreadable URL)"
    host = parts.netloc.rpartition("@")[2]
    return f"{parts.scheme}://{host}{parts.path}" if parts.scheme else "(URL without a scheme)"


def _parts(url: str) -> SplitResult | None:
    """The parts of `url`; None where a password with / ? or # in it may be in the wrong one of them."""
    try:
        parts = urlsplit(url)
        _ = parts.port  # raises ValueError
    except ValueError:
        return None
    return None if "@" in parts.path + parts.query + parts.fragment else parts


def _read(name: str, file: Path) -> str:
    try:
        return file.read_text()
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "it is not text"
        raise StoreError(f"{name} {file} cannot be read: {reason}") from error
