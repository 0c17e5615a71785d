"""Every setting of the service, read once by `__main__` from `LREA_…` variables. No other file reads the environment.

docs/service.md lists them all; a test holds the two together.
"""

import difflib
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Literal
from urllib.parse import urlsplit

from pydantic import Field, SecretStr, field_validator
from pydantic_settings import BaseSettings, SettingsConfigDict

from model.cache_format import check_model_id, check_prefix

PREFIX = "LREA_"
OTHER_PROGRAMS = ("LREA_LOADTEST_", "LREA_WORK_DIR")
STORE_SCHEMES = ("redis://", "rediss://", "unix://")
HOUR_S, DAY_S = 3600, 86_400


class Settings(BaseSettings):
    """Frozen and checked: a value that cannot work is refused before anything starts.

    The upper bounds are beyond what anybody wants: they are there for slips, such as bytes where MiB are meant.
    """

    # hide_input_in_errors: the store's URL may hold a password.
    model_config = SettingsConfigDict(
        env_prefix=PREFIX, frozen=True, extra="ignore", hide_input_in_errors=True, allow_inf_nan=False
    )

    store_url: str = Field("redis://127.0.0.1:6379/0", description="Redis or Valkey with the cache, by URL")
    key_prefix: str = Field("lrea", description="first part of every key in the store")
    bundles_dir: Path = Field(Path("bundles"), description="folder of bundles, one sub-folder per model_id")
    model_id: str | None = Field(None, description="what to serve while the store names nothing")
    host: str = Field("127.0.0.1", description="address to listen on")
    port: int = Field(8000, ge=0, le=65535, description="port to listen on; 0 picks a free one")
    api_keys_file: Path | None = Field(None, description="file of API keys, read again when it changes")
    api_keys: SecretStr | None = Field(None, description="API keys beside those of the file, separated by ; or newline")
    tls_certificate_file: Path | None = Field(
        None, description="certificate chain to serve with, PEM; none: plain HTTP"
    )
    tls_key_file: Path | None = Field(None, description="its private key, PEM, without a passphrase")
    tls_client_ca_file: Path | None = Field(
        None, description="authorities, PEM: callers must show a certificate that one of them signed"
    )
    workers: int = Field(1, ge=1, le=256, description="processes that share the port, each with a model of its own")
    device: Literal["auto", "cpu", "cuda"] = Field(
        "auto", description="where to compute; auto: cuda where there is one"
    )
    dtype: Literal["float32", "bfloat16"] = Field(
        "float32", description="of the MLP's products; bfloat16 is refused where it moves logits too far"
    )
    max_logit_error: float = Field(
        0.02,
        gt=0,
        le=100,
        description="most that LREA_DTYPE may move a logit, measured when a model is loaded; else float32",
    )
    torch_threads: int = Field(
        0,
        ge=0,
        le=1024,
        description="CPU threads of one forward; 0: as many as torch takes, shared out among the workers",
    )
    max_candidates: int = Field(4000, ge=1, le=1_000_000, description="most candidates in one request")
    max_history: int = Field(
        100_000, ge=1, le=10_000_000, description="most rows in one request's history, and in its recent_items"
    )
    max_batch_requests: int = Field(
        64, ge=1, le=100_000, description="most requests in one forward, and in one /v1/score/batch"
    )
    max_batch_candidates: int = Field(
        16_384, ge=1, le=10_000_000, description="most candidates in one forward, of several requests"
    )
    max_waiting_candidates: int = Field(
        262_144,
        ge=1,
        le=1_000_000_000,
        description="most candidates that have come and are not answered; beyond it 429",
    )
    max_body_bytes: int = Field(
        8_388_608, ge=1, le=1 << 30, description="largest request body; a larger one answers 413"
    )
    max_bodies_mb: int = Field(
        256,
        ge=1,
        le=1 << 20,
        description="memory in MiB for bodies that are being received or wait to be read; beyond it 429",
    )
    max_header_bytes: int = Field(
        32_768, ge=1024, le=1 << 20, description="most bytes of a request beside its body; more answer 431"
    )
    max_connections: int = Field(
        4096,
        ge=1,
        le=1_000_000,
        description="most connections of one process; a further one is for probes, or answers 503",
    )
    header_timeout_s: float = Field(
        10.0, gt=0, le=HOUR_S, description="longest wait for a request's line and headers; then 408"
    )
    body_timeout_s: float = Field(
        30.0, gt=0, le=HOUR_S, description="longest wait for a request's body, then 408, or for the answer to be taken"
    )
    keep_alive_s: int = Field(
        75, ge=1, le=DAY_S, description="longest wait for the next request on a connection; then closed"
    )
    store_timeout_ms: int = Field(
        50, ge=1, le=HOUR_S * 1000, description="longest wait for the store's answer, with connecting and a second try"
    )
    store_breaker_failures: int = Field(
        5, ge=1, le=1_000_000, description="reads of records that fail in a row until they are not tried any more"
    )
    store_breaker_open_ms: int = Field(
        500, ge=1, le=HOUR_S * 1000, description="for how long, until one is tried as a probe"
    )
    user_cache_mb: int = Field(
        64, ge=0, le=1 << 20, description="memory for resident users in MiB, on the device; 0: none"
    )
    user_cache_max_age_s: float = Field(
        300.0, gt=0, le=365 * DAY_S, description="age at which a resident user's record is read again"
    )
    timeout_ms: int = Field(
        1000, ge=1, le=HOUR_S * 1000, description="default and ceiling of a request's timeout_ms; then 504"
    )
    poll_seconds: float = Field(1.0, gt=0, le=HOUR_S, description="how often to ask the store what is active")
    drain_seconds: float = Field(0.0, ge=0, le=HOUR_S, description="time served on after SIGTERM, with /readyz at 503")
    grace_seconds: int = Field(
        30, ge=0, le=HOUR_S, description="time to finish what has begun when it stops; then it is dropped"
    )
    log_level: Literal["debug", "info", "warning", "error"] = Field("info", description="least severe line logged")

    @property
    def asks_for_keys(self) -> bool:
        return self.api_keys_file is not None or self.api_keys is not None

    @field_validator("key_prefix")
    @classmethod
    def _usable_prefix(cls, prefix: str) -> str:
        return check_prefix(prefix)

    @field_validator("model_id")
    @classmethod
    def _form_of_a_model_id(cls, model_id: str | None) -> str | None:
        return None if model_id is None else check_model_id(model_id)

    @field_validator("store_url")
    @classmethod
    def _known_scheme(cls, url: str) -> str:
        if not url.startswith(STORE_SCHEMES):
            scheme = url.partition(":")[0]
            raise ValueError(f"the URL starts with {scheme!r}, wanted one of {', '.join(STORE_SCHEMES)}")
        _check_port(url)
        return url

    @field_validator(
        "bundles_dir", "api_keys_file", "tls_certificate_file", "tls_key_file", "tls_client_ca_file", mode="before"
    )
    @classmethod
    def _names_something(cls, path: object) -> object:
        if path == "":  # as a path it would be the working folder
            raise ValueError("the path is empty: give one, or unset the variable")
        return path


def _check_port(url: str) -> None:
    """Raise ValueError, which never quotes what may be a part of a password."""
    try:
        urlsplit(url).port  # noqa: B018  it is read when it is asked for
    except ValueError:
        wanted = "wanted a number up to 65535 behind the host"
        if "@" in url and "@" not in re.split("[/?#]", url.partition("://")[2])[0]:
            wanted += ", or the password has a character that must be percent-encoded (/ is %2F)"
        raise ValueError(f"the port is none, {wanted}") from None


def unknown_variables(environment: Iterable[str]) -> list[str]:
    """A sentence for each name that looks like a setting and is none, with the one that it may have meant."""
    known = [PREFIX + name.upper() for name in Settings.model_fields]
    found = []
    for name in sorted(environment):
        if name.startswith(PREFIX) and not name.startswith(OTHER_PROGRAMS) and name not in known:
            close = difflib.get_close_matches(name, known, n=1)
            found.append(
                f"{name} is not a setting and has no effect" + (f": did you mean {close[0]}?" if close else "")
            )
    return found
