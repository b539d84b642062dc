"""The table of data sources."""

from tinycats_core.config import DataConfig
from tinycats_core.data.folder import Folder
from tinycats_core.data.oxford_pets import OxfordPets
from tinycats_core.data.source import Source
from tinycats_core.data.toycats import ToyCats
from tinycats_core.errors import ConfigError

SOURCES: dict[str, Source] = {source.name: source for source in (ToyCats(), Folder(), OxfordPets())}


def register(source: Source) -> None:
    """Make a source available as data.source, under its own name."""
    SOURCES[source.name] = source


def find(name: str) -> Source:
    """Return the source of this name. Raises ConfigError."""
    if name not in SOURCES:
        raise ConfigError(f"data.source is {name!r}; allowed: {', '.join(SOURCES)}")
    return SOURCES[name]


def check(config: DataConfig, num_classes: int) -> None:
    """Raise ConfigError if the source is unknown, lacks its folder, or has another number of classes than the model."""
    source = find(config.source)
    source.check(config)
    if source.classes and num_classes != len(source.classes):
        raise ConfigError(
            f"model.num_classes is {num_classes} but data.source {source.name!r} has {len(source.classes)} classes; "
            f"set model.num_classes to {len(source.classes)}"
        )
