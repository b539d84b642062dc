"""A signed release passes the stock verification, and a changed byte fails it and ours."""

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import ec, rsa

from tinycats_core.config import PublishConfig
from tinycats_core.errors import ConfigError
from tinycats_core.records import ReleaseParts
from tinycats_core.release import bundle, manifest, signature


def write_key(path: Path, key: Any, password: bytes | None = None) -> Path:
    encryption = serialization.BestAvailableEncryption(password) if password else serialization.NoEncryption()
    path.write_bytes(key.private_bytes(serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, encryption))
    public = key.public_key().public_bytes(serialization.Encoding.PEM, serialization.PublicFormat.SubjectPublicKeyInfo)
    path.with_suffix(".pub").write_bytes(public)
    return path


def stock_verification(folder: Path, key: Path) -> subprocess.CompletedProcess[str]:
    tool = Path(sys.executable).with_name("model_signing")
    options = ["--signature", str(folder / "model.sig"), "--public_key", str(key.with_suffix(".pub"))]
    return subprocess.run([tool, "verify", "key", str(folder), *options], capture_output=True, text=True)


def signed(parts: dict[str, Any], key: Path) -> ReleaseParts:
    given = ReleaseParts(**parts)
    publish = given.config.publish.model_copy(update={"sign_key": str(key)})
    return given.model_copy(update={"config": given.config.model_copy(update={"publish": publish})})


def test_the_stock_tool_verifies_a_release_until_a_byte_changes(parts: dict[str, Any], tmp_path: Path):
    key = write_key(tmp_path / "key.pem", ec.generate_private_key(ec.SECP256R1()))
    unsigned = bundle.build(tmp_path / "registry", ReleaseParts(**parts))
    assert not (unsigned.folder / "model.sig").exists()
    release = bundle.build(tmp_path / "registry", signed(parts, key))
    assert release == unsigned  # a signature belongs to a release and changes nothing of it
    assert manifest.inspect(release.folder)[1] == []
    assert "key.pem" not in "".join(path.read_text() for path in release.folder.glob("*.json"))
    done = stock_verification(release.folder, key)
    assert done.returncode == 0, done.stderr
    before = (release.folder / "model.sig").read_bytes()
    assert bundle.build(tmp_path / "registry", signed(parts, key)) == release
    assert (release.folder / "model.sig").read_bytes() == before  # not signed again

    changed = release.folder / "decision.json"
    changed.write_bytes(changed.read_bytes() + b" ")
    assert stock_verification(release.folder, key).returncode != 0
    assert "decision.json has changed" in manifest.inspect(release.folder)[1][0]


def test_an_encrypted_key_takes_its_password_from_the_environment(
    parts: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    key = write_key(tmp_path / "key.pem", ec.generate_private_key(ec.SECP384R1()), b"secret")
    config = PublishConfig(sign_key=str(key))
    with pytest.raises(ConfigError, match="cannot be used"):
        signature.check_key(config)
    monkeypatch.setenv(signature.PASSWORD, "secret")
    signature.check_key(config)
    release = bundle.build(tmp_path / "registry", signed(parts, key))
    assert stock_verification(release.folder, key).returncode == 0


def test_a_key_that_cannot_sign_is_refused_before_anything_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    with pytest.raises(ConfigError, match="which is no file; give a private key in PEM form"):
        signature.check_key(PublishConfig(sign_key=str(tmp_path / "none.pem")))
    (tmp_path / "text.pem").write_text("no key")
    rsa_key = write_key(tmp_path / "rsa.pem", rsa.generate_private_key(65537, 2048))
    for path in (tmp_path / "text.pem", rsa_key):
        with pytest.raises(ConfigError, match="secp256r1"):
            signature.check_key(PublishConfig(sign_key=str(path)))
    monkeypatch.setitem(sys.modules, "model_signing", None)
    with pytest.raises(ConfigError, match=r"pip install 'tinycats\[sign\]'"):
        signature.check_key(PublishConfig(sign_key="sigstore"))
    signature.check_key(PublishConfig())
