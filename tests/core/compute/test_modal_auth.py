"""Credentials, told apart here and against a loopback server."""

import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import grpclib
import pytest
from modal_server import Server, loopback_modal, without_credentials

from tinycats_core.compute import modal_auth
from tinycats_core.compute.modal_auth import check_credentials, has_credentials
from tinycats_core.errors import ComputeError, ModalUnreachable

ROOT = Path(__file__).resolve().parents[3]


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Iterator[Server]:
    with loopback_modal(monkeypatch) as running:
        yield running


@pytest.fixture
def no_credentials(monkeypatch: pytest.MonkeyPatch) -> None:
    without_credentials(monkeypatch)


@pytest.mark.usefixtures("no_credentials")
@pytest.mark.parametrize(
    ("token_id", "secret", "message"),
    [
        (None, None, r"^no Modal credentials: .* are not set .*run `modal token new`, or set MODAL_TOKEN_ID and"),
        ("", "", r"^no Modal credentials"),
        ("ak-123", None, r"^half of the Modal token is missing: no MODAL_TOKEN_SECRET"),
        (None, "as-topsecret", r"^half of the Modal token is missing: no MODAL_TOKEN_ID"),
        ("hunter2", "as-topsecret", r"^malformed Modal token: MODAL_TOKEN_ID must be 'ak-'"),
        ("ak-123", "topsecret", r"^malformed Modal token: MODAL_TOKEN_SECRET must be 'as-'"),
        ("ak-123", "as-topsecret\n", r"^malformed Modal token: MODAL_TOKEN_SECRET"),
        ("'ak-123'", "'as-topsecret'", r"^malformed Modal token: MODAL_TOKEN_ID"),
    ],
)
def test_unusable_tokens_are_told_apart_without_asking(
    monkeypatch: pytest.MonkeyPatch, token_id: str | None, secret: str | None, message: str
) -> None:
    if token_id is not None:
        monkeypatch.setenv("MODAL_TOKEN_ID", token_id)
    if secret is not None:
        monkeypatch.setenv("MODAL_TOKEN_SECRET", secret)
    with pytest.raises(ComputeError, match=message) as caught:
        check_credentials()
    assert "\n" not in str(caught.value)
    assert "topsecret" not in str(caught.value)
    assert "hunter2" not in str(caught.value)


def test_unreadable_configuration_file_is_named_but_not_quoted(tmp_path: Path) -> None:
    path = tmp_path / "modal.toml"
    path.write_text("[default]\ntoken_id = ak-123\ntoken_secret = as-topsecret\n")
    done = subprocess.run(
        [sys.executable, "-c", "from tinycats_core.compute.modal_auth import check_credentials; check_credentials()"],
        env={"MODAL_CONFIG_PATH": str(path), "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
    )
    assert f"ComputeError: {path} is not a Modal configuration file" in done.stderr
    assert "topsecret" not in done.stdout + done.stderr


def test_accepted_token(server: Server) -> None:
    assert check_credentials() == "MODAL_TOKEN_ID and MODAL_TOKEN_SECRET"
    assert "ClientHello" in server.asked


def test_rejected_token(server: Server) -> None:
    server.answers["ClientHello"] = grpclib.Status.UNAUTHENTICATED
    with pytest.raises(ComputeError, match=r"^Modal rejected the token from MODAL_TOKEN_ID and .*modal token new"):
        check_credentials()


def test_no_answer(server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    server.answers["ClientHello"] = "nothing"
    monkeypatch.setattr(modal_auth, "ANSWER_SECONDS", 0.3)
    with pytest.raises(ModalUnreachable, match=r"did not answer within 0 s; check the network"):
        check_credentials()


@pytest.mark.usefixtures("no_credentials")
def test_half_a_token_is_something_to_complain_about(monkeypatch: pytest.MonkeyPatch) -> None:
    assert not has_credentials()
    monkeypatch.setenv("MODAL_TOKEN_ID", "ak-123")
    assert has_credentials()
