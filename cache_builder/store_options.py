"""The options of every command that opens a store: which one, who we are there, and our certificates.

The password is no option: everybody on the machine can read an argument. It comes by LREA_STORE_PASSWORD or by file.
"""

import inspect
import os
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import typer

from cache_builder.connection import Connection
from cache_builder.embedded import open_store
from cache_builder.store import Store

DEFAULT_STORE = "embedded:./.lrea-store"
PASSWORD_VARIABLE = "LREA_STORE_PASSWORD"


@dataclass(frozen=True)
class StoreOptions:
    """Which store a command was told to open, and how. Nothing is read or checked before `open`."""

    url: str
    connection: Connection

    def open(self, *, create: bool = True) -> AbstractContextManager[Store]:
        """As embedded.open_store."""
        return open_store(self.url, self.connection, create=create)


def _option(name: str, variable: str, text: str) -> Any:
    return typer.Option(name, envvar=variable, help=text)


_URL = Annotated[str, _option("--store", "LREA_STORE_URL", "redis://…, redis+cluster://… or embedded:FOLDER")]
_CONNECTION = {
    "username": Annotated[str | None, _option("--store-username", "LREA_STORE_USERNAME", "of the store's user")],
    "password_file": Annotated[
        Path | None, _option("--store-password-file", "LREA_STORE_PASSWORD_FILE", "file with the password")
    ],
    "ca_file": Annotated[Path | None, _option("--store-ca-file", "LREA_STORE_CA_FILE", "whom to trust, PEM")],
    "cert_file": Annotated[Path | None, _option("--store-cert-file", "LREA_STORE_CERT_FILE", "our certificate, PEM")],
    "key_file": Annotated[Path | None, _option("--store-key-file", "LREA_STORE_KEY_FILE", "its private key, PEM")],
}


def with_store(command: Callable[..., None], **fixed: Any) -> Callable[..., None]:
    """`command` for typer, with the options above where it has the parameter `store: StoreOptions`.

    fixed: arguments that are no options.
    """

    def run(**given: Any) -> None:
        values = {name: given.pop(f"store_{name}") for name in _CONNECTION}
        connection = Connection(password=os.environ.get(PASSWORD_VARIABLE) or None, **values)
        command(store=StoreOptions(given.pop("store"), connection), **given, **fixed)

    keyword = inspect.Parameter.KEYWORD_ONLY
    own = [one.replace(kind=keyword) for one in inspect.signature(command).parameters.values()]
    own = [one for one in own if one.name not in fixed]
    place = [one.name for one in own].index("store")
    url = inspect.Parameter("store", keyword, default=DEFAULT_STORE, annotation=_URL)
    others = [
        inspect.Parameter(f"store_{name}", keyword, default=None, annotation=_CONNECTION[name]) for name in _CONNECTION
    ]
    parameters = [*own[:place], url, *others, *own[place + 1 :]]
    run.__name__, run.__doc__ = command.__name__, command.__doc__
    run.__annotations__ = {parameter.name: parameter.annotation for parameter in parameters}
    run.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
    return run
