"""Settings and secrets: read from the environment, kept where only their owner reads them."""

from __future__ import annotations

import stat
from pathlib import Path

import pytest

from orchestrator.errors import SettingsError, YardError
from orchestrator.serve.secret import API_TOKEN, RAY_TOKEN, ensure_secret, ensure_token
from orchestrator.settings import Settings
from orchestrator.yard.record import YardRecord, as_json, environment, read_yard


def test_variables_win_over_defaults_and_arguments_over_variables(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TUNEYARD_LEASH", "7")
    assert Settings().leash == 7
    assert Settings(leash=8).leash == 8


def test_a_bad_value_is_named_and_a_bad_secret_is_not_shown(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TUNEYARD_PORT", "hunter2")
    with pytest.raises(SettingsError) as caught:
        Settings()
    assert caught.value.field == "TUNEYARD_PORT"
    assert "hunter2" not in str(caught.value)


def test_secrets_do_not_print() -> None:
    settings = Settings(token="t0ken", database_url="postgresql://me:pass@host/db")  # type: ignore[arg-type]
    for text in (repr(settings), str(settings), settings.model_dump_json()):
        assert "t0ken" not in text
        assert "pass" not in text
    assert settings.url == "postgresql://me:pass@host/db"


def test_home_is_absolute(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert Settings(home=Path("here")).root == tmp_path / "here"
    monkeypatch.setenv("HOME", str(tmp_path))
    assert Settings(home=Path("~/yard")).root == tmp_path / "yard"
    assert Settings(home=Path("here")).url == f"sqlite:///{tmp_path}/here/yard.db"


@pytest.mark.parametrize("name", [API_TOKEN, RAY_TOKEN])
def test_a_secret_is_made_once_for_its_owner_alone(tmp_path: Path, name: str) -> None:
    path = tmp_path / "home" / name
    first = ensure_secret(path)
    assert len(first) == 64
    assert ensure_secret(path) == first
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert [entry.name for entry in path.parent.iterdir()] == [name]
    assert ensure_secret(tmp_path / "other" / name) != first


def test_a_token_that_is_given_is_not_stored(tmp_path: Path) -> None:
    assert ensure_token(Settings(home=tmp_path, token="given")) == "given"  # type: ignore[arg-type]
    assert list(tmp_path.iterdir()) == []


def test_a_secret_that_cannot_be_kept(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(YardError) as caught:
        ensure_secret(tmp_path / "file" / "token")
    assert caught.value.code == "no-secret"
    assert "TUNEYARD_HOME" in (caught.value.hint or "")


@pytest.mark.parametrize("text", ["", "{", "[]", '{"id": 1}', '{"id": "a"}'])
def test_a_damaged_record_is_refused(tmp_path: Path, text: str) -> None:
    (tmp_path / "yard.json").write_text(text)
    with pytest.raises(YardError) as caught:
        read_yard(Settings(home=tmp_path))
    assert caught.value.code == "yard-record"


def test_a_record_of_a_newer_version_is_read(tmp_path: Path) -> None:
    assert read_yard(Settings(home=tmp_path)) is None
    (tmp_path / "yard.json").write_text('{"id": "a", "url": "http://h:1", "executor": "local", "new": [1]}')
    record = read_yard(Settings(home=tmp_path))
    assert record is not None
    assert (record.id, record.ray, as_json(record)["controller"]) == ("a", (), None)


def test_the_yards_processes_get_the_path_of_rays_token_never_the_token(tmp_path: Path) -> None:
    settings = Settings(home=tmp_path)
    secret = ensure_secret(tmp_path / RAY_TOKEN)
    env = environment(settings, YardRecord(id="a", url="http://127.0.0.1:99", executor="ray"))
    assert env["RAY_AUTH_TOKEN_PATH"] == str(tmp_path / RAY_TOKEN)
    assert env["TUNEYARD_PORT"] == "99"
    assert secret not in env.values()
    assert "RAY_AUTH_MODE" not in environment(settings, YardRecord(id="a", url="http://h:1", executor="local"))


def test_prices_are_json_and_cannot_be_below_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    assert (Settings().prices, Settings().currency) == ({}, None)
    monkeypatch.setenv("TUNEYARD_PRICES", '{"H100": 2.5, "cpu": 0}')
    monkeypatch.setenv("TUNEYARD_CURRENCY", "EUR")
    assert (Settings().prices, Settings().currency) == ({"H100": 2.5, "cpu": 0.0}, "EUR")
    for wrong in ('{"H100": -1}', '{"H100": NaN}', '{"H100": "much"}', "[]"):
        monkeypatch.setenv("TUNEYARD_PRICES", wrong)
        with pytest.raises(SettingsError) as caught:
            Settings()
        assert caught.value.field == "TUNEYARD_PRICES"
