"""The settings of the images, and of the networks that learn from them."""

from typing import Annotated, Literal, Self

from pydantic import Field, model_validator

from tinycats_core.config.base import MOST_CLASSES, Fraction, FullPath, ImageSize, Part, Seed, Thousands

BREEDS = (
    "Abyssinian", "Bengal", "Birman", "Bombay", "British_Shorthair", "Egyptian_Mau",
    "Maine_Coon", "Persian", "Ragdoll", "Russian_Blue", "Siamese", "Sphynx",
)  # fmt: skip
OTHER = "other"  # the class of whatever is no cat
CLASSES = (*BREEDS, OTHER)
MIN_IMAGES = 16  # of each set that is judged: with fewer a KID subset has not even eight images
PLACES = {"folder": ("photos", "folder"), "boxes": ("boxes", "file")}  # settings of data that name places: what lies in them
Backbone = Literal["resnet8", "resnet18", "resnet34", "resnet50", "mobilenet_v3_small"]


class DataConfig(Part):
    """Where the images come from and how they are decoded."""

    source: str = "oxford_pets"  # a name in data.sources, which checks it
    folder: FullPath | None = None  # for source=folder: the folder that holds the photos
    # What the folders in it are; auto: told from how they lie. docs/photos.md explains the others.
    layout: Literal["auto", "single", "classes", "breeds", "splits", "subfolders"] = "auto"
    image_size: ImageSize = 128
    crop: Literal["centre", "subject"] = "centre"  # which square of a photo is cut out; docs/photos.md
    boxes: FullPath | None = None  # for source=folder and crop=subject: a CSV file with a box around each subject
    # For source=oxford_pets: a data set of parquet files on the Hub, instead of the official archives.
    mirror: Annotated[str, Field(pattern=r"^[\w.-]{1,96}/[\w.-]{1,96}$")] | None = None
    test_fraction: Annotated[float, Field(gt=0, lt=1)] = 0.2  # of each class, where the source has no official split
    val_fraction: Annotated[float, Field(gt=0, lt=1)] = 0.1  # of each class's training images; a class of one keeps it
    corrupt_files: Literal["fail", "skip"] = "fail"
    toy_train_per_class: Thousands = 200
    toy_val_per_class: Annotated[int, Field(ge=0, le=10_000)] = 20
    toy_test_per_class: Thousands = 80
    seed: Seed = 0  # of the toy cats; images of the other sources are split by their sha256


class ModelConfig(Part):
    """TinyDiT's shape."""

    image_size: ImageSize = 128
    patch_size: Annotated[int, Field(ge=1, le=1024)] = 16
    width: Thousands = 384
    depth: Annotated[int, Field(ge=1, le=256)] = 12
    heads: Thousands = 6
    num_classes: Annotated[int, Field(ge=1, le=MOST_CLASSES)] = (
        13  # of a release: `ReleaseConfig.for_classes` takes it from the data
    )
    prediction: Literal["x", "v"] = "x"

    @model_validator(mode="after")
    def _shapes_fit(self) -> Self:
        if self.image_size % self.patch_size:
            allowed = [p for p in range(1, self.image_size + 1) if self.image_size % p == 0]
            raise ValueError(
                f"model.patch_size is {self.patch_size}, which does not divide model.image_size {self.image_size}; "
                f"allowed: {', '.join(map(str, allowed))}"
            )
        if self.width % self.heads:
            raise ValueError(f"model.width is {self.width}, which is not a multiple of model.heads {self.heads}")
        if self.width % 4:
            raise ValueError(f"model.width is {self.width}; allowed: multiples of 4 (2-D sine-cosine positions)")
        return self


class ClassifierConfig(Part):
    """The breed classifier."""

    backbone: Backbone = "resnet18"
    pretrained: bool = False  # ImageNet weights, downloaded by torchvision
    epochs: Thousands = 30
    batch_size: Annotated[int, Field(ge=3, le=10_000)] = (
        64  # batch normalisation cannot take one image; of 2, an odd number leaves one
    )
    lr: Annotated[float, Field(gt=0, le=1)] = 1e-3  # the highest: it rises for 30 % of the steps, then falls to nothing
    weight_decay: Annotated[float, Field(ge=0)] = 1e-2
    balance: Fraction = 1.0  # 1: every class weighs the same in the loss, 0: every image does
    seed: Seed = 0

    @model_validator(mode="after")
    def _weights_exist(self) -> Self:
        if self.pretrained and self.backbone == "resnet8":
            raise ValueError(
                "classifier.pretrained is true but there are no ImageNet weights of resnet8; set classifier.backbone to "
                "another one, such as resnet18"
            )
        return self


class ClassifierShape(Part):
    """What the header of a classifier's weights says of the network."""

    backbone: Backbone
    image_size: ImageSize
    classes: Annotated[tuple[str, ...], Field(min_length=1, max_length=MOST_CLASSES)]
    first_stride: Annotated[int, Field(ge=1, le=2)]
