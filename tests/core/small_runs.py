"""A network and settings with which a training is a matter of a second."""

from tinycats_core.config import ModelConfig, TrainConfig

MODEL = ModelConfig(image_size=8, patch_size=4, width=16, depth=1, heads=2, num_classes=2)


def config(**changes: object) -> TrainConfig:
    settings = {
        "steps": 12,
        "batch_size": 8,
        "lr": 2e-3,
        "warmup_steps": 2,
        "snapshots": 1,
        "checkpoint_every": 4,
        "sample_every": 6,
        "log_every": 3,
    }
    return TrainConfig.model_validate(settings | changes)
