"""TLS: the context that the service listens with, made and checked before anything else is loaded."""

import ssl
from pathlib import Path

from service.errors import StartupError

CERTIFICATE, KEY, CLIENT_CA = "LREA_TLS_CERTIFICATE_FILE", "LREA_TLS_KEY_FILE", "LREA_TLS_CLIENT_CA_FILE"


def server_context(certificate: Path | None, key: Path | None, client_ca: Path | None) -> ssl.SSLContext | None:
    """What the three settings say; None for plain HTTP. Raises StartupError.

    client_ca: callers must show a certificate that one of its authorities has signed.
    """
    if certificate is None or key is None:
        _check_all_unset({CERTIFICATE: certificate, KEY: key, CLIENT_CA: client_ca})
        return None
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.minimum_version = ssl.TLSVersion.TLSv1_2
    _load_pair(context, certificate, key)
    if client_ca is not None:
        _load_authorities(context, client_ca)
    return context


def _check_all_unset(files: dict[str, Path | None]) -> None:
    given = [name for name, file in files.items() if file is not None]
    missing = [name for name in (CERTIFICATE, KEY) if name not in given]
    if given:
        raise StartupError(f"{' and '.join(given)} without {' and '.join(missing)}: set both, or none for plain HTTP")


def _load_pair(context: ssl.SSLContext, certificate: Path, key: Path) -> None:
    _check_readable(CERTIFICATE, certificate)
    _check_readable(KEY, key)

    def no_passphrase() -> str:  # without it, OpenSSL asks whoever sits at the terminal
        raise StartupError(f"{KEY}: {key} has a passphrase, wanted a key without one")

    try:
        context.load_cert_chain(certificate, key, no_passphrase)
    except ssl.SSLError as error:
        if error.reason == "KEY_VALUES_MISMATCH":
            raise StartupError(
                f"{KEY}: {key} is not the key of the first certificate in {certificate}: set two that belong together"
            ) from error
        found = f"{certificate} and {key} are not a certificate and its key"
        raise StartupError(f"{CERTIFICATE} and {KEY}: {found}, wanted both in PEM ({error.reason})") from error


def _load_authorities(context: ssl.SSLContext, client_ca: Path) -> None:
    _check_readable(CLIENT_CA, client_ca)
    try:
        context.load_verify_locations(client_ca)
    except ssl.SSLError as error:
        raise StartupError(f"{CLIENT_CA}: {client_ca} has no certificate in PEM ({error.reason})") from error
    context.verify_mode = ssl.CERT_REQUIRED


def _check_readable(name: str, file: Path) -> None:
    try:
        file.read_bytes()
    except OSError as error:
        raise StartupError(f"{name}: cannot read {file} ({error.strerror})") from error
