"""The presets, and `resolve`, which joins one of them with a person's overrides."""

import difflib
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import UnionType
from typing import Annotated, Any, Union, get_args, get_origin

from pydantic import ValidationError

from tinycats_core.config import ReleaseConfig
from tinycats_core.errors import NAMED, ConfigError, printable


def _plan(steps: int, lr: float, warmup: int, accumulation: int = 1) -> dict[str, Any]:
    return {
        "train": {"steps": steps, "lr": lr, "warmup_steps": warmup, "accumulation": accumulation},
        "compute": {"where": "modal"},
        "publish": {"to": "hub"},
    }


PRESETS: dict[str, dict[str, Any]] = {
    "smoke": {
        "data": {"source": "toycats", "image_size": 32},
        "model": {"image_size": 32, "patch_size": 8, "width": 192, "depth": 4, "heads": 6},
        "train": {
            "steps": 4000,
            "snapshots": 4,
            "batch_size": 16,
            "lr": 2e-3,
            "warmup_steps": 50,
            "ema_decays": [0.999],
            "checkpoint_every": 1000,
            "sample_every": 2000,
            "log_every": 40,
        },
        "classifier": {"backbone": "resnet8", "epochs": 3},
        "sample": {"guidance": [1.5, 1.0, 2.0], "sweep_images": 260},
        "evaluate": {"extractor": "breed", "samples": 520},
        "publish": {"name": "tinycats-smoke"},
    },
    "photos": {  # of one's own, on a laptop; the recipe of docs/recipe.md
        "data": {"source": "folder", "folder": "photos", "image_size": 32},
        "model": {"image_size": 32, "patch_size": 4, "width": 192, "depth": 4, "heads": 6},
        "train": {
            "steps": 28_000,  # an hour on two cores
            "passes": 1_500,  # few photos are copied before that
            "snapshots": 10,
            "batch_size": 16,
            "lr": 2e-3,
            "warmup_steps": 560,
            "ema_decays": [0.999, 0.9998],
            "checkpoint_every": 1000,
            "sample_every": 5000,
            "log_every": 100,
        },
        "sample": {"guidance": [1.5, 3.0, 5.0], "sweep_images": 312},
        "evaluate": {"samples": 520},
    },
    "standard": _plan(200_000, 1e-4, 10_000),
    "budget": _plan(300_000, 1e-4, 10_000),
    "high-accuracy": _plan(400_000, 5e-5, 15_000, accumulation=2),
    "aggressive": _plan(500_000, 3e-5, 20_000, accumulation=2),
    "max-quality": _plan(1_000_000, 2e-5, 25_000, accumulation=2) | {"data": {"image_size": 256}, "model": {"image_size": 256}},
}


def resolve(preset: str = "smoke", overrides: Mapping[str, Any] | None = None) -> ReleaseConfig:
    """Join a preset with nested overrides into a checked configuration.

    Args:
        preset: one of PRESETS.
        overrides: nested mapping, e.g. {"train": {"steps": 100}}.

    Raises:
        ConfigError: an unknown preset or field, or an impossible value; names the field, the value and what is allowed.
    """
    if preset not in PRESETS:
        raise ConfigError(f"preset is {preset!r}; allowed: {', '.join(PRESETS)}")
    if overrides is not None and not isinstance(overrides, Mapping):
        raise ConfigError(f'overrides is {overrides!r}; it must map parts to fields, such as {{"train": {{"steps": 100}}}}')
    return load({"publish": {"name": f"tinycats-{preset}"}}, PRESETS[preset], overrides or {})


def load(*layers: Mapping[str, Any]) -> ReleaseConfig:
    """Join layers of nested settings, the last one winning, into a checked configuration. Raises ConfigError."""
    merged: dict[str, Any] = {}
    for layer in layers:
        merged = merge(merged, layer)
    try:
        return ReleaseConfig.model_validate(merged)
    except ValidationError as error:
        raise ConfigError(explain(error)) from None


def parse_overrides(text: str) -> dict[str, Any]:
    """Read overrides given as JSON on a command line. Raises ConfigError."""
    try:
        value = json.loads(text or "{}")
    except json.JSONDecodeError as error:
        raise ConfigError(f'overrides is not JSON: {error}. Write it like \'{{"train": {{"steps": 100}}}}\'') from None
    if not isinstance(value, dict):
        raise ConfigError(f"overrides is {text}; it must be a JSON object of parts, such as {{}}")
    return value


def parse_settings(texts: Sequence[str]) -> dict[str, Any]:
    """Read settings given one by one as `part.field=value`, the last one of a field winning.

    A value is JSON, or else text; a setting that holds a text or a path takes what was typed as it stands.

    Raises:
        ConfigError: one has no `=`, names a whole part, or is unknown; names the nearest setting.
    """
    found: dict[str, Any] = {}
    for text in texts:
        name, equals, typed = text.partition("=")
        part, _, field = name.strip().partition(".")
        if not equals:
            raise ConfigError(f"--set {text}: it has no '='; write it as part.field=value, such as train.steps=100")
        if part in ReleaseConfig.model_fields and not field:
            raise ConfigError(f"--set {text}: {part} is a part; name one of its settings: {', '.join(_fields_of((part,)))}")
        if (annotation := _settings().get(f"{part}.{field}")) is None:
            raise ConfigError(_unknown(name.strip(), _fields_of((part,) if part in ReleaseConfig.model_fields else ())))
        found = merge(found, {part: {field: _value(typed.strip(), annotation)}})
    return found


def merge(base: Mapping[str, Any], over: Mapping[str, Any]) -> dict[str, Any]:
    """Join nested settings; `over` wins."""
    merged = dict(base)
    for key, value in over.items():
        old = merged.get(key)
        merged[key] = merge(old, value) if isinstance(old, Mapping) and isinstance(value, Mapping) else value
    return merged


def explain(error: ValidationError) -> str:
    """Return a validation error in one line: the first few fields, their values, and what is allowed."""
    items = error.errors()
    rest = f"; and {len(items) - NAMED} more" if len(items) > NAMED else ""
    return "; ".join(_explain(item) for item in items[:NAMED]) + rest


def _explain(item: Any) -> str:
    """One line for one pydantic error: field, value, what is allowed."""
    field = ".".join(printable(part, 60) for part in item["loc"])
    if item["type"] == "extra_forbidden":
        return _unknown(field, _fields_of(item["loc"][:-1]))
    message = item["msg"].removeprefix("Value error, ")
    if item["type"] == "value_error" and len(item["loc"]) < 2:
        return message  # what looks at a whole part names fields and values itself
    return f"{field} is {printable(repr(item['input']))}: {message[:1].lower()}{message[1:]}"


def _fields_of(location: tuple[Any, ...]) -> list[str]:
    part: Any = ReleaseConfig
    for name in location:
        part = part.model_fields[name].annotation
    return list(part.model_fields)


def _unknown(name: str, allowed: Sequence[str]) -> str:
    """Say that a setting does not exist, what exists beside it, and which one is nearest."""
    settings = list(_settings())
    near = [other for other in settings if other.partition(".")[2] == name] or difflib.get_close_matches(name, settings, 1)
    hint = f"; did you mean {' or '.join(near)}?" if near else ""
    return f"{name} is not a setting; allowed: {', '.join(allowed)}{hint}"


def _settings() -> dict[str, Any]:
    """Return every setting, `part.field`, with its type."""
    parts: dict[str, Any] = {name: field.annotation for name, field in ReleaseConfig.model_fields.items()}
    return {f"{name}.{field}": info.annotation for name, part in parts.items() for field, info in part.model_fields.items()}


def _value(typed: str, annotation: Any) -> Any:
    try:
        value = json.loads(typed)
    except json.JSONDecodeError:
        return typed
    return typed if _holds_text(annotation) and value is not None and not isinstance(value, str) else value


def _holds_text(annotation: Any) -> bool:
    """Return whether a type is a text or a path, or may be one."""
    if get_origin(annotation) in (Union, UnionType, Annotated):
        return any(_holds_text(part) for part in get_args(annotation))
    return annotation in (str, Path)
