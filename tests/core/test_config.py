"""Presets resolve; anything unknown or impossible is refused with the field, the value and what is allowed."""

import json
from pathlib import Path

import pytest

from tinycats_core.config import ReleaseConfig, SampleConfig
from tinycats_core.errors import ConfigError
from tinycats_core.presets import PRESETS, parse_overrides, resolve


@pytest.mark.parametrize(
    ("preset", "steps", "lr", "warmup", "accumulation", "size"),
    [
        ("standard", 200_000, 1e-4, 10_000, 1, 128),
        ("budget", 300_000, 1e-4, 10_000, 1, 128),
        ("high-accuracy", 400_000, 5e-5, 15_000, 2, 128),
        ("aggressive", 500_000, 3e-5, 20_000, 2, 128),
        ("max-quality", 1_000_000, 2e-5, 25_000, 2, 256),
    ],
)
def test_presets_carry_the_plan(preset: str, steps: int, lr: float, warmup: int, accumulation: int, size: int):
    config = resolve(preset)
    train, model = config.train, config.model
    assert (train.steps, train.lr, train.warmup_steps, train.accumulation) == (steps, lr, warmup, accumulation)
    assert (train.batch_size, train.betas, train.weight_decay, train.clip, train.ema_decays) == (
        256,
        (0.9, 0.95),
        1e-4,
        1.0,
        (0.9999, 0.999),
    )
    assert (model.patch_size, model.width, model.depth, model.heads, model.num_classes) == (16, 384, 12, 6, 13)
    assert model.image_size == config.data.image_size == size
    assert config.compute.where == "modal"
    assert config.publish.to == "hub"


def test_photos_of_ones_own_need_a_folder_and_nothing_else():
    config = resolve("photos")
    assert (config.data.source, config.data.folder) == ("folder", Path("photos").absolute())
    assert (config.compute.where, config.publish.to, config.publish.name) == ("local", "folder", "tinycats-photos")


def test_the_default_preset_needs_nothing_from_outside():
    config = resolve()
    assert (config.data.source, config.compute.where, config.publish.to) == ("toycats", "local", "folder")
    assert config.evaluate.extractor == "breed"
    assert not config.classifier.pretrained


def test_overrides_reach_one_field_and_leave_the_others():
    config = resolve("smoke", {"train": {"steps": 77, "warmup_steps": 7}})
    assert config.train == resolve("smoke").train.model_copy(update={"steps": 77, "warmup_steps": 7})
    assert config.model == resolve("smoke").model


def test_changing_the_export_does_not_change_what_training_depends_on():
    config, other = resolve("smoke"), resolve("smoke", {"export": {"int8": False}})
    assert config.train.digest() == other.train.digest()
    assert config.model.digest() == other.model.digest()
    assert config.digest() != other.digest()


def test_resolved_configuration_survives_json():
    config = resolve("max-quality")
    back = ReleaseConfig.model_validate(json.loads(config.model_dump_json()))
    assert back.model_dump() == config.model_dump()
    assert back.digest() == config.digest()


@pytest.mark.parametrize(
    ("preset", "overrides", "parts"),
    [
        ("best", {}, ["'best'", "smoke, photos, standard"]),
        ("smoke", {"train": {"stpes": 3}}, ["train.stpes is not a setting", "steps, passes, batch_size"]),
        ("smoke", {"trian": {}}, ["trian is not a setting", "data, model, train"]),
        ("smoke", {"model": {"patch_size": 5}}, ["model.patch_size is 5", "32", "1, 2, 4, 8, 16"]),
        ("smoke", {"classifier": {"pretrained": True}}, ["classifier.pretrained is true", "resnet8", "resnet18"]),
        ("smoke", {"model": {"heads": 5}}, ["model.width is 192", "model.heads 5"]),
        ("standard", {"data": {"image_size": 256}}, ["data.image_size is 256", "model.image_size is 128"]),
        ("standard", {"train": {"accumulation": 3}}, ["train.batch_size is 256", "train.accumulation 3"]),
        ("smoke", {"train": {"steps": 0}}, ["train.steps is 0", "greater than or equal to 1"]),
        ("smoke", {"train": {"steps": 10}}, ["train.warmup_steps is 50", "train.steps 10"]),
        ("smoke", {"train": {"lr": float("nan")}}, ["train.lr is nan"]),
        ("smoke", {"train": {"ema_decays": [0.9, 1.0]}}, ["train.ema_decays.1 is 1.0"]),
        ("smoke", {"train": {"ema_decays": [0.9, 0.9]}}, ["train.ema_decays is [0.9, 0.9], which names one twice"]),
        ("smoke", {"train": {"ema_decays": []}}, ["train.ema_decays is []"]),
        ("smoke", {"train": {"compile": "always"}}, ["train.compile is 'always'", "'reduce-overhead'"]),
        ("smoke", {"compute": {"processes": 3}}, ["train.batch_size is 16, not divisible by compute.processes 3"]),
        ("standard", {"train": {"resume_from": "here"}}, ["train.resume_from is a path on this machine", "'local'"]),
        ("smoke", {"sample": {"guidance": -1}}, ["sample.guidance.0 is -1"]),
        ("smoke", {"sample": {"guidance": []}}, ["sample.guidance is []", "at least 1"]),
        ("smoke", {"sample": {"guidance": [1, 2, 1.0]}}, ["sample.guidance is [1.0, 2.0, 1.0], which names one twice"]),
        ("smoke", {"sample": {"guidance": "much"}}, ["sample.guidance is 'much'"]),
        ("smoke", {"sample": {"guidance_interval": []}}, ["sample.guidance_interval is []", "at least 1"]),
        ("smoke", {"sample": {"guidance_interval": [0, 2]}}, ["sample.guidance_interval.0.1 is 2"]),
        ("smoke", {"sample": {"guidance_interval": [0.8, 0.2]}}, ["[0.8, 0.2]: the first must not exceed"]),
        ("smoke", {"sample": {"guidance_interval": [[0, 1], [0.8, 0.2]]}}, ["[0.8, 0.2]"]),
        ("smoke", {"sample": {"guidance_interval": [[0, 1], [0, 1]]}}, ["[[0.0, 1.0], [0.0, 1.0]], which names one twice"]),
        ("smoke", {"sample": {"sweep_images": 15}}, ["sample.sweep_images is 15", "16"]),
        ("smoke", {"sample": {"sweep_images": 20}, "evaluate": {"neighbours": 20}}, ["sample.sweep_images is 20", "neighbours"]),
        ("smoke", {"sample": {"sweep_images": 600}, "evaluate": {"neighbours": 520}}, ["evaluate.samples is 520", "neighbours"]),
        ("smoke", {"data": {"val_fraction": 1}}, ["data.val_fraction is 1", "less than 1"]),
        ("smoke", {"classifier": {"val_fraction": 0.1}}, ["classifier.val_fraction is not a setting"]),
        ("photos", {"data": {"folder": "~nobody.here/cats"}}, ["data.folder is '~nobody.here/cats': ~nobody.here is", "in full"]),
        ("photos", {"data": {"folder": "caf\udce9"}}, ["data.folder is 'caf\\udce9': its name is not UTF-8", "rename it"]),
        ("smoke", {"publish": {"folder": "~nobody.here"}}, ["publish.folder is '~nobody.here': ~nobody.here is"]),
        ("smoke", {"train": {"resume_from": "~nobody.here"}}, ["train.resume_from is '~nobody.here': ~nobody.here is"]),
        ("smoke", {"publish": {"repo_id": "cats"}}, ["publish.repo_id is 'cats'", "owner/name"]),
        ("smoke", {"publish": {"name": "../up"}}, ["publish.name is '../up'"]),
        ("smoke", {"compute": {"timeout_hours": 30}}, ["compute.timeout_hours is 30", "24"]),
        ("smoke", {"train": {"other_share": 0}}, ["train.other_share is 0 but evaluate.other_share is None", "set both to 0"]),
        ("smoke", {"train": {"other_share": 1}}, ["train.other_share is 1", "less than 1"]),
        ("smoke", {"evaluate": {"other_share": -0.1}}, ["evaluate.other_share is -0.1", "greater than or equal to 0"]),
        ("smoke", {"train": 3}, ["train is 3"]),
        ("smoke", [1], ["overrides is [1]"]),
    ],
)
def test_impossible_values_name_field_value_and_what_is_allowed(preset: str, overrides: dict, parts: list[str]):
    with pytest.raises(ConfigError) as error:
        resolve(preset, overrides)
    message = str(error.value)
    assert "\n" not in message
    for part in parts:
        assert part in message


def test_one_guidance_or_interval_means_a_list_of_one():
    sample = resolve("smoke", {"sample": {"guidance": 2, "guidance_interval": [0.1, 0.9]}}).sample
    assert (sample.guidance, sample.guidance_interval) == ((2.0,), ((0.1, 0.9),))
    assert sample.single() == SampleConfig(guidance=2, guidance_interval=(0.1, 0.9))


def test_candidates_are_every_pair_but_guidance_one_has_no_interval():
    given = {"steps": 5, "seed": 3, "guidance": [1, 2, 0.5], "guidance_interval": [[0, 1], [0.1, 0.6]]}
    sample = resolve("smoke", {"sample": given}).sample
    pairs = [(candidate.guidance, candidate.guidance_interval) for candidate in sample.candidates()]
    assert pairs == [(1, (0, 1)), (2, (0, 1)), (2, (0.1, 0.6)), (0.5, (0, 1)), (0.5, (0.1, 0.6))]
    assert {(candidate.steps, candidate.seed, candidate.sampler) for candidate in sample.candidates()} == {(5, 3, "ab2")}
    assert sample.at(7, (0.2, 0.3)) == SampleConfig(steps=5, seed=3, guidance=7, guidance_interval=(0.2, 0.3))
    with pytest.raises(ConfigError, match=r"sample.guidance is \[1.0, 2.0, 0.5\].* give one of each"):
        sample.single()


def test_overrides_on_a_command_line_are_json_objects():
    assert parse_overrides('{"train": {"steps": 5}}') == {"train": {"steps": 5}}
    assert parse_overrides("") == {}
    with pytest.raises(ConfigError, match="not JSON"):
        parse_overrides("{train: 5}")
    with pytest.raises(ConfigError, match="JSON object"):
        parse_overrides("[1]")


def test_every_preset_only_lists_settings_that_exist():
    for name in PRESETS:
        assert isinstance(resolve(name), ReleaseConfig)


def test_the_number_of_classes_comes_from_the_data():
    assert resolve("photos").for_classes(1).model.num_classes == 1
    assert resolve("photos", {"model": {"num_classes": 3}}).for_classes(3).model.num_classes == 3  # an old release
    with pytest.raises(ConfigError, match="model.num_classes is 3, but the data has 2; leave it out"):
        resolve("photos", {"model": {"num_classes": 3}}).for_classes(2)
    with pytest.raises(ConfigError, match="evaluate.samples is 20; at least 26 are needed"):
        resolve("smoke", {"evaluate": {"samples": 20}}).for_classes(13)
