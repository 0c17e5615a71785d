"""The settings: what the environment says is what is used, and what cannot work is refused."""

from pathlib import Path

import pytest
from pydantic import ValidationError

from service.settings import Settings, unknown_variables


def test_the_environment_is_read(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LREA_STORE_URL", "rediss://user:secret@cache:6380/2")
    monkeypatch.setenv("LREA_BUNDLES_DIR", "/bundles")
    monkeypatch.setenv("LREA_MAX_CANDIDATES", "17")
    monkeypatch.setenv("LREA_OF_ANOTHER_PROGRAM", "1")
    settings = Settings()
    assert settings.store_url == "rediss://user:secret@cache:6380/2"
    assert settings.bundles_dir == Path("/bundles")
    assert settings.max_candidates == 17


@pytest.mark.parametrize(
    ("variable", "value"),
    [
        ("LREA_STORE_URL", "embedded:./folder"),
        ("LREA_STORE_URL", "cache:6379"),
        ("LREA_STORE_URL", ""),
        ("LREA_MODEL_ID", "../../etc"),
        ("LREA_MODEL_ID", "ABCDEF012345"),
        ("LREA_MODEL_ID", "0123456789ab\n"),
        ("LREA_KEY_PREFIX", "{a}"),
        ("LREA_PORT", "65536"),
        ("LREA_DEVICE", "tpu"),
        ("LREA_MAX_CANDIDATES", "0"),
        ("LREA_TIMEOUT_MS", "soon"),
        ("LREA_POLL_SECONDS", "0"),
        ("LREA_POLL_SECONDS", "inf"),
        ("LREA_POLL_SECONDS", "nan"),
        ("LREA_USER_CACHE_MB", "1000000000"),
        ("LREA_TORCH_THREADS", "100000000000"),
        ("LREA_STORE_URL", "redis://cache:99999/0"),
        ("LREA_BUNDLES_DIR", ""),
        ("LREA_API_KEYS_FILE", ""),
        ("LREA_TLS_CLIENT_CA_FILE", ""),
        ("LREA_LOG_LEVEL", "loud"),
    ],
)
def test_what_cannot_work_is_refused(monkeypatch: pytest.MonkeyPatch, variable: str, value: str) -> None:
    monkeypatch.setenv(variable, value)
    with pytest.raises(ValidationError, match=variable.removeprefix("LREA_").lower()):
        Settings()


def test_every_number_has_an_end() -> None:
    """A slip of a few digits must not become a MemoryError, a service that waits for days or one that never asks."""
    numbers = [name for name, field in Settings.model_fields.items() if field.annotation in (int, float)]
    assert len(numbers) > 20
    for name in numbers:
        for value in (10**15, float("inf"), float("nan"), -1):
            with pytest.raises(ValidationError):
                Settings(**{name: value})  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("url", "said"),
    [
        ("http://user:hunter2@cache", "the URL starts with 'http', wanted one of redis://, rediss://, unix://"),
        ("redis://:hunter2@cache:99999/0", "the port is none, wanted a number up to 65535 behind the host ["),
        ("redis://:hunter2@cache:hunter2/0", "the port is none, wanted a number up to 65535 behind the host ["),
        ("redis://cache:99999/0?password=hunter2@", "the port is none, "),
        (
            "redis://:hunter2/more@cache:6379/0",
            "or the password has a character that must be percent-encoded (/ is %2F)",
        ),
        (
            "redis://:hunter2#more@cache:6379/0",
            "or the password has a character that must be percent-encoded (/ is %2F)",
        ),
    ],
)
def test_a_store_s_url_is_refused_without_its_password(monkeypatch: pytest.MonkeyPatch, url: str, said: str) -> None:
    monkeypatch.setenv("LREA_STORE_URL", url)
    with pytest.raises(ValidationError) as error:
        Settings()
    assert said in str(error.value)
    assert "hunter2" not in str(error.value)


def test_settings_do_not_change() -> None:
    with pytest.raises(ValidationError):
        Settings().port = 1  # type: ignore[misc]


def test_a_misspelt_setting_is_named_with_the_one_that_was_meant() -> None:
    others = ["LREA_PORT", "LREA_LOADTEST_SEED", "LREA_WORK_DIR", "PATH"]
    found = unknown_variables(["LREA_MAX_CANDIDATE", *others, "LREA_QQQQQQQQQQQQ"])
    assert found == [
        "LREA_MAX_CANDIDATE is not a setting and has no effect: did you mean LREA_MAX_CANDIDATES?",
        "LREA_QQQQQQQQQQQQ is not a setting and has no effect",
    ]
