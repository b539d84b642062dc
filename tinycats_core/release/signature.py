"""The signature of a release, by the OpenSSF's model signing: `model.sig` over every file, release.json included."""

import os
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING

from tinycats_core.config import SIGSTORE, PublishConfig
from tinycats_core.errors import ConfigError, RegistryError
from tinycats_core.release.manifest import SIGNATURE

if TYPE_CHECKING:
    from model_signing.signing import Config

PASSWORD = "TINYCATS_SIGN_PASSWORD"  # of an encrypted key


def check_key(config: PublishConfig) -> None:
    """Raise ConfigError if releases should be signed, and the key or the library is missing."""
    if config.sign_key is not None:
        _signer(config.sign_key)


def ensure_signed(folder: Path, config: PublishConfig) -> None:
    """Sign a release folder if the configuration asks for it and it has no signature yet.

    Raises:
        ConfigError: the key cannot be used.
        RegistryError: the signature cannot be made or written.
    """
    if config.sign_key is None or (folder / SIGNATURE).is_file():
        return
    from model_signing import hashing

    signer = _signer(config.sign_key).set_hashing_config(hashing.Config().set_ignored_paths(paths=[folder / SIGNATURE]))
    try:
        with tempfile.TemporaryDirectory(dir=folder.parent) as beside:  # the file is no part of what is signed
            signer.sign(folder, Path(beside, SIGNATURE))
            Path(beside, SIGNATURE).replace(folder / SIGNATURE)
    except Exception as error:  # of the network, of sigstore, of the file system
        raise RegistryError(
            f"{folder} cannot be signed: {type(error).__name__}: {error}. Mend that, or unset publish.sign_key."
        ) from error


def _signer(key: str) -> "Config":
    """Return what signs: with a key file, or with sigstore and the credentials of this machine. Raises ConfigError."""
    try:
        from model_signing import signing
    except ImportError as error:
        raise ConfigError(f"publish.sign_key needs the package {error.name}: run `pip install 'tinycats[sign]'`") from None
    if key == SIGSTORE:
        return signing.Config().use_sigstore_signer(use_ambient_credentials=True)
    if not Path(key).is_file():
        raise ConfigError(f"publish.sign_key is {key}, which is no file; give a private key in PEM form, or 'sigstore'")
    try:
        return signing.Config().use_elliptic_key_signer(private_key=Path(key), password=_password())
    except (ValueError, TypeError, AttributeError, OSError) as error:  # the third: a key of another kind, such as RSA
        raise ConfigError(
            f"publish.sign_key is {key}, which cannot be used ({error}); give an unencrypted private key of the curve "
            f"secp256r1, secp384r1 or secp521r1, or set {PASSWORD}"
        ) from None


def _password() -> str | None:
    password = os.environ.get(PASSWORD)
    return password.encode() if password else None  # pyright: ignore[reportReturnType]  # the library hands on what must be bytes
