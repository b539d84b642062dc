"""The experiments of `benchmarks.recipe`, as data: what each of them changes of a common beginning."""

import json
from dataclasses import dataclass, field
from typing import Any

BASE = {  # where every row starts; one thing of it is changed
    "model": {"image_size": 32, "patch_size": 8, "width": 192, "depth": 4, "heads": 6, "prediction": "x"},
    "train": {
        "batch_size": 16,
        "lr": 2e-3,
        "ema_decays": [0.999],
        "timesteps": "logit_normal",
        "timestep_mean": -0.8,
        "timestep_std": 0.8,
    },
    "sample": {"guidance": 1.5},
}


@dataclass(frozen=True)
class Row:
    """One experiment: what it is called, what it changes, and how."""

    name: str
    what: str
    model: dict[str, Any] = field(default_factory=dict)
    train: dict[str, Any] = field(default_factory=dict)
    sample: dict[str, Any] = field(default_factory=dict)
    weights: str = "ema"  # what is sampled: ema (the first), raw, or the decay of one

    @property
    def training(self) -> str:
        """What decides the weights: rows that share it are trained once."""
        return json.dumps([self.model, self.train], sort_keys=True)


ROWS = [
    Row("base", "x from patches of 8, AdamW at 2e-3, batches of 16, logit-normal t"),
    Row("guidance-1", "no guidance", sample={"guidance": 1.0}),
    Row("guidance-2", "guidance 2", sample={"guidance": 2.0}),
    Row("guidance-3", "guidance 3", sample={"guidance": 3.0}),
    Row("guidance-2-late", "guidance 2 for t in [0.3, 1]", sample={"guidance": 2.0, "guidance_interval": (0.3, 1.0)}),
    Row("guidance-2-middle", "guidance 2 for t in [0.2, 0.8]", sample={"guidance": 2.0, "guidance_interval": (0.2, 0.8)}),
    Row("raw", "the last weights, no average", weights="raw"),
    Row("v-patch8", "v from patches of 8 (192 numbers, as wide as the network)", model={"prediction": "v"}),
    Row("x-patch16", "x from patches of 16 (768 numbers, 4 × the width)", model={"patch_size": 16}),
    Row("v-patch16", "v from patches of 16 (768 numbers, 4 × the width)", model={"patch_size": 16, "prediction": "v"}),
    Row("x-patch4", "x from patches of 4", model={"patch_size": 4}),
    Row("uniform-t", "uniform t", train={"timesteps": "uniform"}),
    Row("t-mean-0", "logit of t with mean 0, deviation 1", train={"timestep_mean": 0.0, "timestep_std": 1.0}),
    Row("t-mean-1.4", "logit of t with mean -1.4", train={"timestep_mean": -1.4}),
    Row("lr-1e-3", "learning rate 1e-3", train={"lr": 1e-3}),
    Row("lr-4e-3", "learning rate 4e-3", train={"lr": 4e-3}),
    Row("constant", "constant learning rate after the warm-up", train={"schedule": "constant"}),
    Row("batch-8", "batches of 8", train={"batch_size": 8}),
    Row("batch-32", "batches of 32", train={"batch_size": 32}),
    Row("wide", "width 256", model={"width": 256, "heads": 8}),
    Row("narrow", "width 128", model={"width": 128, "heads": 4}),
    Row("deep", "depth 8", model={"depth": 8}),
]
AGAINST = [  # the two of `--against ancestor`
    Row("recipe", "what photos at 32 px are trained with: the first row, with patches of 4", model={"patch_size": 4}),
    Row(
        "ancestor",
        "v from patches twice as wide as the network (8 and 96), uniform t, 1e-4",
        model={"width": 96, "depth": 12, "heads": 6, "prediction": "v"},
        train={"lr": 1e-4, "timesteps": "uniform"},
    ),
]
