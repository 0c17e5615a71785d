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
        ("LREA_LOG_LEVEL", "loud"),
    ],
)
def test_what_cannot_work_is_refused(monkeypatch: pytest.MonkeyPatch, variable: str, value: str) -> None:
    monkeypatch.setenv(variable, value)
    with pytest.raises(ValidationError, match=variable.removeprefix("LREA_").lower()):
        Settings()


def test_a_refused_password_is_not_shown(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LREA_STORE_URL", "http://user:hunter2@cache")
    with pytest.raises(ValidationError) as error:
        Settings()
    assert "hunter2" not in str(error.value)


def test_settings_do_not_change() -> None:
    with pytest.raises(ValidationError):
        Settings().port = 1  # type: ignore[misc]


def test_a_misspelt_setting_is_named_with_the_one_that_was_meant() -> None:
    found = unknown_variables(["LREA_MAX_CANDIDATE", "LREA_PORT", "LREA_LOADTEST_SEED", "PATH", "LREA_QQQQQQQQQQQQ"])
    assert found == [
        "LREA_MAX_CANDIDATE is not a setting and has no effect: did you mean LREA_MAX_CANDIDATES?",
        "LREA_QQQQQQQQQQQQ is not a setting and has no effect",
    ]
