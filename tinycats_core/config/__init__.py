"""The configuration of a release: a frozen part per stage. `presets` joins them from a preset and a person's overrides."""

from typing import Self

from pydantic import Field, model_validator

from tinycats_core.config.base import MOST_CLASSES, Part
from tinycats_core.config.budget import BudgetConfig
from tinycats_core.config.data import (
    BREEDS,
    CLASSES,
    MIN_IMAGES,
    OTHER,
    PLACES,
    ClassifierConfig,
    ClassifierShape,
    DataConfig,
    ModelConfig,
)
from tinycats_core.config.sampling import GUIDANCE_SETTINGS, SampleConfig, SampleOptions, SamplerPart
from tinycats_core.config.shipping import (
    NAME_PATTERN,
    SIGSTORE,
    ComputeConfig,
    EvaluateConfig,
    ExportConfig,
    PublishConfig,
    ReleaseName,
)
from tinycats_core.config.training import TrainConfig
from tinycats_core.errors import ConfigError

__all__ = [
    "BREEDS", "CLASSES", "GUIDANCE_SETTINGS", "MIN_IMAGES", "MOST_CLASSES", "NAME_PATTERN", "OTHER", "PLACES", "SIGSTORE",
    "BudgetConfig", "ClassifierConfig", "ClassifierShape", "ComputeConfig", "DataConfig", "EvaluateConfig", "ExportConfig",
    "ModelConfig", "Part", "PublishConfig", "ReleaseConfig", "ReleaseName", "SampleConfig", "SampleOptions", "SamplerPart",
    "TrainConfig",
]  # fmt: skip


class ReleaseConfig(Part):
    """Everything that decides what a release is."""

    data: DataConfig = DataConfig()
    model: ModelConfig = ModelConfig()
    train: TrainConfig = TrainConfig()
    classifier: ClassifierConfig = ClassifierConfig()
    sample: SampleOptions = SampleOptions()
    evaluate: EvaluateConfig = EvaluateConfig()
    export: ExportConfig = ExportConfig()
    publish: PublishConfig = Field(default_factory=PublishConfig)  # made when asked for: its folder is relative to here
    compute: ComputeConfig = ComputeConfig()
    budget: BudgetConfig = BudgetConfig()

    @model_validator(mode="after")
    def _parts_agree(self) -> Self:
        if self.data.image_size != self.model.image_size:
            raise ValueError(
                f"data.image_size is {self.data.image_size} but model.image_size is {self.model.image_size}; "
                "they must be equal: override both"
            )
        if self.train.batch_size % self.compute.processes:
            raise ValueError(
                f"train.batch_size is {self.train.batch_size}, not divisible by compute.processes {self.compute.processes}"
            )
        if self.compute.where == "modal" and self.train.resume_from is not None:
            raise ValueError(
                "train.resume_from is a path on this machine, and compute.where is 'modal'; set compute.where to 'local'"
            )
        self._budget_fits()
        if self.train.other_share == 0 and self.evaluate.other_share != 0:
            raise ValueError(
                f"train.other_share is 0 but evaluate.other_share is {self.evaluate.other_share}: a class that was never seen "
                "would be drawn; set both to 0"
            )
        least = self.evaluate.neighbours
        for name, count in (("sample.sweep_images", self.sample.sweep_images), ("evaluate.samples", self.evaluate.samples)):
            if count <= least:
                raise ValueError(f"{name} is {count}; it must be more than evaluate.neighbours, which is {least}")
        return self

    def _budget_fits(self) -> None:
        minutes, dollars, where = self.budget.minutes, self.budget.dollars, self.compute.where
        if minutes is not None and where != "local":
            raise ValueError(
                f"budget.minutes is {minutes:g} but compute.where is {where!r}, where no speed is measured beforehand; "
                "give budget.dollars, or set compute.where to 'local'"
            )
        if dollars is not None and where != "modal":
            raise ValueError(
                f"budget.dollars is {dollars:g} but compute.where is {where!r}, which costs none; give budget.minutes, "
                "or set compute.where to 'modal'"
            )

    def for_data(self, classes: int, photos: int) -> Self:
        """Return this configuration for data of so many classes and training photos. Raises ConfigError as `for_classes` does."""
        config = self.for_classes(classes)
        return config.model_copy(update={"train": config.train.for_photos(photos)})

    def for_classes(self, count: int) -> Self:
        """Return this configuration with the number of classes that the data has. Raises ConfigError if another was set."""
        if "num_classes" in self.model.model_fields_set and self.model.num_classes != count:
            raise ConfigError(
                f"model.num_classes is {self.model.num_classes}, but the data has {count}; leave it out: the data decides it"
            )
        if self.evaluate.samples < count * 2:
            raise ConfigError(
                f"evaluate.samples is {self.evaluate.samples}; at least {count * 2} are needed (two for each of {count} classes)"
            )
        return self.model_copy(update={"model": self.model.model_copy(update={"num_classes": count})})
