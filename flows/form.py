"""What Prefect's forms and the server know of the parameters of a flow: every setting with its type, limits and comment.

The server refuses a run whose parameters do not fit, before it is submitted. What one setting says of another is checked by the
flow before its first stage.
"""

import ast
import inspect
import io
import json
import textwrap
import tokenize
from collections.abc import Mapping
from typing import Annotated, Any, cast

from pydantic import Field, WithJsonSchema

from tinycats_core.config import Part, ReleaseConfig
from tinycats_core.presets import PRESETS, resolve


def overrides_schema() -> dict[str, Any]:
    """Return the JSON schema of overrides: the parts of a configuration, each setting optional and described."""
    parts = {name: part_schema(name, cast(type[Part], field.annotation)) for name, field in ReleaseConfig.model_fields.items()}
    return {"type": "object", "title": "Overrides", "additionalProperties": False, "properties": parts}


def part_schema(title: str, part: type[Part]) -> dict[str, Any]:
    """Return the JSON schema of a part of the configuration, whose settings have the comments of the code as descriptions."""
    schema: dict[str, Any] = {**part.model_json_schema(), "title": title}
    told = comments(part)
    for name, setting in schema["properties"].items():
        setting.pop("default", None)  # a form would send it, in place of the preset's value
        setting["title"] = name
        if name in told:
            setting["description"] = told[name]
    return schema


def comments(part: type[Part]) -> dict[str, str]:
    """Return the comments of a part's settings: behind them, or on the lines above."""
    found: dict[str, str] = {}
    for base in reversed(part.__mro__):
        if issubclass(base, Part) and base is not Part:
            found |= _comments(textwrap.dedent(inspect.getsource(base)))
    return {name: text for name, text in found.items() if name in part.model_fields}


def for_preset(schema: Mapping[str, Any], preset: str) -> dict[str, Any]:
    """Return the schema of a flow's parameters for a deployment of one preset: no other one, and its values beside the settings."""
    config = resolve(preset).model_dump(mode="json")
    properties = {**schema["properties"], "preset": schema["properties"]["preset"] | {"enum": [preset]}}
    return {**schema, "properties": {**properties, "overrides": _with_values(properties["overrides"], config)}}


def _with_values(overrides: Mapping[str, Any], config: Mapping[str, Any]) -> dict[str, Any]:
    def told(setting: Mapping[str, Any], value: Any) -> dict[str, Any]:
        if '"path"' in json.dumps(setting):  # of the machine that deploys
            return dict(setting)
        return {**setting, "description": f"{setting.get('description', '')} (preset: {json.dumps(value)})".strip()}

    parts = {
        name: {**part, "properties": {key: told(setting, config[name][key]) for key, setting in part["properties"].items()}}
        for name, part in overrides["properties"].items()
    }
    return {**overrides, "properties": parts}


def _comments(source: str) -> dict[str, str]:
    [tree] = ast.parse(source).body
    assert isinstance(tree, ast.ClassDef)
    lines = {
        token.start[0]: (token.string.removeprefix("# "), not token.line.strip().startswith("#"))
        for token in tokenize.generate_tokens(io.StringIO(source).readline)
        if token.type == tokenize.COMMENT
    }
    found: dict[str, str] = {}
    for field in tree.body:
        if isinstance(field, ast.AnnAssign) and isinstance(field.target, ast.Name):
            above, line = [], field.lineno - 1
            while line in lines and not lines[line][1]:
                above.insert(0, lines[line][0])
                line -= 1
            behind = [lines[number][0] for number in range(field.lineno, (field.end_lineno or 0) + 1) if number in lines]
            if text := " ".join([*above, *behind]):
                found[field.target.id] = text[0].upper() + text[1:].removesuffix(".")
    return found


Preset = Annotated[str, Field(json_schema_extra={"enum": [*PRESETS]})]  # a drop-down
Overrides = Annotated[dict[str, Any] | None, WithJsonSchema(overrides_schema())]
