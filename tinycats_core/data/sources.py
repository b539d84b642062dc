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


def check(config: DataConfig) -> None:
    """Raise ConfigError if the source is unknown, or does not go with data.folder."""
    find(config.source).check(config)
