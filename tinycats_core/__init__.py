"""TinyDiT, flow matching, training, judging and releasing of small cat generators. Imports nothing heavy."""

from typing import TYPE_CHECKING, Any, Literal

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
    from tinycats_core.release import pretrained

    return pretrained.load(release, runtime, device)


def from_pretrained(release: str, **options: Any) -> "Cats":
    """Load a release folder or a repository of the Hub, `owner/name`, through huggingface_hub's mixin.

    Args:
        options: runtime, device, and the mixin's: revision, token, cache_dir, force_download, local_files_only.

    Raises:
        RegistryError: there is no such release, it is damaged, or the Hub cannot be reached.
    """
    from tinycats_core.release import pretrained

    return pretrained.hub_class().from_pretrained(release, **options)
