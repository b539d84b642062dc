"""The experiments of `benchmarks.cats128`, as data: what each of them changes of a common beginning."""

from dataclasses import dataclass, field
from typing import Any

BASE: dict[str, dict[str, Any]] = {
    "model": {"image_size": 128, "patch_size": 16, "width": 384, "depth": 12, "heads": 6, "prediction": "x"},
    "train": {"batch_size": 256, "lr": 5e-4, "ema_decays": [0.999, 0.99], "augmentation": "basic"},
}
QUICK: dict[str, dict[str, Any]] = {  # the same experiments in seconds on a CPU
    "model": {"image_size": 32, "patch_size": 16, "width": 32, "depth": 2, "heads": 2},
    "train": {"batch_size": 16, "ema_decays": [0.98, 0.9]},
}
PATCH8: dict[str, dict[str, Any]] = {"model": {"patch_size": 8}, "train": {"batch_size": 64}}


@dataclass(frozen=True)
class Row:
    """One experiment: what it is called, what it changes, and how."""

    name: str
    what: str
    model: dict[str, Any] = field(default_factory=dict)
    train: dict[str, Any] = field(default_factory=dict)
    time: float = 1.0  # of its training, in units of the others'

    def also(self, other: "Row") -> "Row":
        """Return the experiment that changes what both of them change."""
        name, what = f"{self.name}, {other.name}", f"{self.what}; {other.what}"
        return Row(name, what, self.model | other.model, self.train | other.train, other.time)


ROWS = (
    Row("base", "x from patches of 16, AdamW at 5e-4, batches of 256, flips"),
    Row("lr-1e-4", "learning rate 1e-4", train={"lr": 1e-4}),
    Row("lr-1e-3", "learning rate 1e-3", train={"lr": 1e-3}),
    Row("lr-2e-3", "learning rate 2e-3", train={"lr": 2e-3}),
    # Noise of s times the deviation at the time t is, but for the weight in the loss, noise of deviation 1 at the logit
    # of t less log s: a mean of the logit that is lower by log 2 stands for noise of twice the deviation.
    Row("noise-0.5", "logit of t with mean -0.1, as with noise of half the deviation", train={"timestep_mean": -0.1}),
    Row("noise-2", "logit of t with mean -1.5, as with noise of twice the deviation", train={"timestep_mean": -1.5}),
    Row("aug-none", "no augmentation", train={"augmentation": "none"}),
    Row("v-patch16", "v from patches of 16 (768 numbers, twice the width)", model={"prediction": "v"}),
    Row("x-patch8", "x from patches of 8, in batches of 64: as many tokens a step", PATCH8["model"], PATCH8["train"]),
    Row("aug-medium", "flips, crops and shifts", train={"augmentation": "medium"}),
    Row("aug-full", "flips, crops, shifts, colour and affine", train={"augmentation": "full"}),
    Row("batch-64", "batches of 64", train={"batch_size": 64}),
    Row("small", "width 256, depth 8 (11M parameters)", model={"width": 256, "depth": 8, "heads": 4}),
)
LONG = (  # what the best row is trained with for longer
    Row("longer", "for longer", time=0.5),
    Row("x-patch8", "patches of 8", PATCH8["model"], PATCH8["train"] | {"augmentation": "basic"}),
    Row("x-patch8, aug-full", "patches of 8, full augmentation", PATCH8["model"], PATCH8["train"] | {"augmentation": "full"}),
)
