"""TinyDiT, flow matching, training, judging and releasing of small cat generators. Imports nothing heavy."""

from typing import TYPE_CHECKING, Literal

from tinycats_core.threads import bound_spin

if TYPE_CHECKING:
    from tinycats_core.release.cats import Cats

__version__ = "0.1.0"

bound_spin()  # here, before any module of the package imports PyTorch


def load(release: str, runtime: Literal["pytorch", "onnx"] = "pytorch", device: str = "auto") -> "Cats":
    """Load the generator of a release: a folder, `owner/name` or `hub:owner/name`. See `release.cats.Cats`.

    Raises:
        RegistryError: there is no such release, it is damaged, or the Hub cannot be reached.
    """
    from tinycats_core.release.cats import load

    return load(release, runtime, device)
