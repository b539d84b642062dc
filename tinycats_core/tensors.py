"""Tensors on disk: safetensors with a JSON header and a digest over both."""

import hashlib
import json
import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from tinycats_core.errors import CheckpointError, printable
from tinycats_core.files import parse_json, write_atomically

HEADER_KEY = "tinycats"


def write_safetensors(path: Path, tensors: Mapping[str, Tensor], header: Mapping[str, Any]) -> Path:
    """Write tensors and a JSON header atomically. `header["kind"]` says what the file is.

    The header gets a `digest` over itself and every tensor's name, type, shape and bytes, so that any later change of
    the file is found on reading. Equal content gives equal bytes.

    Raises:
        OSError: the disk is full, or the place cannot be written to.
    """
    flat = {name: tensor.detach().cpu().contiguous() for name, tensor in sorted(tensors.items())}
    sealed = {**header, "digest": _digest(flat, header)}
    metadata = {HEADER_KEY: json.dumps(sealed, sort_keys=True, allow_nan=False)}
    try:
        return write_atomically(path, lambda temporary: save_file(flat, temporary, metadata=metadata))
    except SafetensorError as error:  # its own kind of error for a full disk
        code = re.search(r"os error (\d+)", str(error))
        raise (OSError(int(code[1]), os.strerror(int(code[1])), str(path)) if code else OSError(str(error))) from None


def read_header(path: Path, kind: str) -> dict[str, Any]:
    """Return the JSON header of a file of this kind, without reading or checking its tensors.

    Raises:
        CheckpointError: the file is missing, incomplete, not made by this project, or of another kind.
    """
    path = Path(path)
    if not path.is_file():
        raise CheckpointError(f"{path} does not exist. Give the path of a {kind} made by this project.")
    try:
        with safe_open(path, framework="pt") as file:
            header = parse_json((file.metadata() or {})[HEADER_KEY])
    except (SafetensorError, OSError, KeyError, ValueError) as error:
        raise CheckpointError(
            f"{path} ({path.stat().st_size:,} bytes) is not a complete {kind} file of this project: "
            f"{type(error).__name__}: {printable(error)}. Delete it and make it again."
        ) from None
    if not isinstance(header, dict) or header.get("kind") != kind:
        found = header.get("kind") if isinstance(header, dict) else header
        raise CheckpointError(f"{path} is a {printable(repr(found), 80)} file, not a {kind!r} one. Give the right file.")
    return header


def read_safetensors(path: Path, kind: str) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Return tensors (CPU) and header, checked against the digest inside. Raises CheckpointError."""
    header = read_header(path, kind)
    try:
        with safe_open(path, framework="pt") as file:
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (not a mapping)
    except (SafetensorError, OSError, ValueError, RuntimeError) as error:
        raise CheckpointError(f"{path} cannot be read: {printable(error)}. Delete it and make it again.") from None
    if _digest(tensors, {key: value for key, value in header.items() if key != "digest"}) != header.get("digest"):
        raise CheckpointError(f"{path} is damaged: its content does not match its own digest. Delete it and make it again.")
    return tensors, header


def load_strictly(model: torch.nn.Module, tensors: Mapping[str, Tensor], path: Path) -> None:
    """Put tensors into a network, all of them and nothing else. Raises CheckpointError naming what does not fit."""
    wanted = {name: (*tensor.shape, tensor.dtype) for name, tensor in model.state_dict().items()}
    found = {name: (*tensor.shape, tensor.dtype) for name, tensor in tensors.items()}
    if wanted != found:
        wrong = sorted(name for name in wanted.keys() | found.keys() if wanted.get(name) != found.get(name))
        raise CheckpointError(
            f"{path} is of another architecture: {len(wrong)} tensors do not fit, the first is {printable(wrong[0])} "
            f"(file: {found.get(wrong[0], 'absent')}, network: {wanted.get(wrong[0], 'absent')}). "
            "Use the configuration that it was made with."
        )
    model.load_state_dict(dict(tensors), strict=True, assign=True)


def _digest(tensors: Mapping[str, Tensor], header: Mapping[str, Any]) -> str:
    digest = hashlib.sha256(json.dumps(dict(header), sort_keys=True, allow_nan=False).encode())
    for name, tensor in sorted(tensors.items()):
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        digest.update(tensor.contiguous().flatten().view(torch.uint8).numpy().data)
    return digest.hexdigest()
