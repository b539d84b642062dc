import math
import os
from pathlib import Path
from typing import Any

import pytest
import torch
from small_sets import draw_cats, make_dataset, make_samples
from torch import Tensor

from tinycats_core.config import ClassifierConfig, EvaluateConfig
from tinycats_core.data.splits import load_split
from tinycats_core.errors import CheckpointError, EvaluationError, TinycatsError
from tinycats_core.evaluation import extractors, fidelity
from tinycats_core.evaluation.classifier import load_classifier, predict, train_classifier
from tinycats_core.files import read_json, sha256_of
from tinycats_core.records import Dataset, FidelityReport, SampleSet, Weights
from tinycats_core.tensors import read_safetensors, write_safetensors

CLASSES = ("Bombay", "Persian", "other")
CONFIG = EvaluateConfig(extractor="breed", samples=30, kid_subsets=20)
INCEPTION = Path(
    os.environ.get("TINYCATS_INCEPTION_WEIGHTS") or Path(__file__).parents[4] / "shared" / "weights" / "inception-fid-nofc.pth"
)


@pytest.fixture(scope="module")
def cats(tmp_path_factory: pytest.TempPathFactory) -> Dataset:
    train, test = draw_cats(CLASSES, 20, 33, seed=0), draw_cats(CLASSES, 12, 33, seed=1)
    return make_dataset(tmp_path_factory.mktemp("cats"), train, test, CLASSES)


@pytest.fixture(scope="module")
def classifier(cats: Dataset, tmp_path_factory: pytest.TempPathFactory) -> Weights:
    config = ClassifierConfig(backbone="resnet8", epochs=2, batch_size=16)
    return train_classifier(cats, config, tmp_path_factory.mktemp("classifier"), "cpu")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("evaluations")


@pytest.fixture(scope="module")
def drawn(folder: Path) -> SampleSet:
    settings = {"guidance": 1.5, "guidance_interval": [0.0, 1.0]}
    return make_samples(folder / "drawn.safetensors", *draw_cats(CLASSES, 10, 33, seed=2), **settings)


@pytest.fixture(scope="module")
def report(drawn: SampleSet, cats: Dataset, classifier: Weights, folder: Path) -> FidelityReport:
    return fidelity.evaluate(drawn, cats, CONFIG, classifier, folder, "cpu")


def with_header(path: Path, source: Weights, tensors: dict[str, Tensor] | None = None, **changes: Any) -> Weights:
    old, header = read_safetensors(source.path, "classifier")
    del header["digest"]
    write_safetensors(path, tensors or old, {**header, **changes})
    return Weights(path=path, sha256=sha256_of(path), kind="classifier", step=1)


class Images(torch.utils.data.Dataset):
    def __init__(self, images: Tensor):
        self.images = images

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> Tensor:
        return self.images[index]


def test_numbers_are_those_of_torch_fidelity(report: FidelityReport, drawn: SampleSet, cats: Dataset, classifier: Weights) -> None:
    from torch_fidelity import calculate_metrics

    made, _ = fidelity.load_samples(drawn)
    theirs = calculate_metrics(
        input1=Images(made),
        input2=Images(load_split(cats, "test")[0]),
        feature_extractor=extractors.register_breed_extractor(),
        feature_extractor_weights_path=str(classifier.path),
        fid=True,
        kid=True,
        isc=True,
        prc=True,
        kid_subsets=20,
        kid_subset_size=15,
        rng_seed=CONFIG.seed,
        cuda=False,
        cache=False,
        save_cpu_ram=True,
        verbose=False,
    )
    mine = report.metrics
    assert mine["fd_breed"] == pytest.approx(theirs["frechet_inception_distance"], rel=1e-5)
    assert mine["kid_breed"] == pytest.approx(theirs["kernel_inception_distance_mean"], rel=1e-4)
    assert mine["is_breed"] == pytest.approx(theirs["inception_score_mean"], rel=1e-5)
    assert (mine["precision"], mine["recall"]) == pytest.approx((theirs["precision"], theirs["recall"]), rel=1e-6)


def test_report_is_a_file_with_its_conditions(report: FidelityReport, drawn: SampleSet, cats: Dataset, classifier: Weights) -> None:
    written = read_json(report.verify().path)
    assert written == report.model_dump(mode="json", exclude={"path", "sha256"})
    assert report.metrics.keys() == report.floor.keys()
    conditions = report.conditions
    assert (conditions["generated"], conditions["reference"], conditions["floor"]) == (30, 36, 30)
    assert (conditions["split"], conditions["extractor"], conditions["extractor_sha256"]) == ("test", "breed", classifier.sha256)
    assert (conditions["kid_subset_size"], conditions["neighbours"], conditions["runtime"]) == (15, 3, "pytorch")
    assert conditions["sampler"] == {"sampler": "heun", "steps": 20, "seed": 1}
    assert conditions["drawn_by"] == {"model": "0" * 64}
    assert (conditions["guidance"], conditions["guidance_interval"]) == (1.5, [0.0, 1.0])
    assert conditions["trivial_kid"].keys() == {"noise", "coloured_noise", "mean_image"}
    assert conditions["torch_fidelity"].startswith("0.4")
    assert any("2,048" in note for note in report.notes)
    assert any("rank" in note for note in report.notes)
    network = load_classifier(classifier.path)

    def right(images: Tensor, labels: Tensor) -> Tensor:
        return (predict(network, images).argmax(1) == labels).double()

    images, labels = fidelity.load_samples(drawn)
    made = right(images, labels)
    assert report.metrics["breed_accuracy"] == made.mean()
    assert report.floor["breed_accuracy"] == right(*load_split(cats, "test")).mean()
    assert [row.name for row in report.classes] == list(CLASSES)
    for label, row in enumerate(report.classes):
        assert row.breed_accuracy == made[labels == label].mean()
    assert sum(row.floor or 0 for row in report.classes) / len(CLASSES) == pytest.approx(report.floor["breed_accuracy"])
    assert [list(row) for row in read_json(report.path)["classes"]] == [["class", "breed_accuracy", "floor"]] * len(CLASSES)


def test_real_training_images_measure_as_the_floor(cats: Dataset, classifier: Weights, folder: Path) -> None:
    images, labels = load_split(cats, "train")
    samples = make_samples(folder / "train.safetensors", images, labels)
    report = fidelity.evaluate(samples, cats, CONFIG, classifier, folder, "cpu")
    report.metrics.pop("breed_accuracy")
    assert (report.metrics["copy_rate"], report.metrics["altered_copy_rate"]) == (1, 1)
    assert report.metrics.pop("authenticity") == 0
    for name, value in report.metrics.items():
        if "copy_rate" in name or name in ("mind_breed_std", "mind_breed_low", "mind_breed_high", "mind_breed_drawn_std"):
            continue  # the errors of MIND are those within the classes that a generator was asked for
        # The floor is the same set in another order: subsets for KID and splits for IS fall differently.
        tolerance = 0.3 if name.startswith(("kid", "is")) else 1e-3
        assert value == pytest.approx(report.floor[name], abs=tolerance), name


def test_one_real_image_again_and_again_is_precise_and_recalls_nothing(cats: Dataset, classifier: Weights, folder: Path) -> None:
    image = load_split(cats, "test")[0][:1]
    samples = make_samples(folder / "one.safetensors", image.repeat(30, 1, 1, 1), torch.zeros(30, dtype=torch.int64))
    metrics = fidelity.evaluate(samples, cats, CONFIG, classifier, folder, "cpu").metrics
    assert metrics["precision"] == 1
    assert metrics["recall"] is not None
    assert metrics["recall"] < 2 / 36  # the image itself; with the arguments swapped it would be 1
    assert metrics["spread"] == pytest.approx(0, abs=1e-6)
    assert metrics["distinct"] == 1 / 30
    assert metrics["is_breed"] == pytest.approx(1)


def test_a_second_evaluation_reads_the_real_images_from_the_cache(
    report: FidelityReport, drawn: SampleSet, cats: Dataset, classifier: Weights, tmp_path: Path
) -> None:
    first = fidelity.evaluate(drawn, cats, CONFIG, classifier, tmp_path, "cpu")
    times = {path: path.stat().st_mtime_ns for path in (tmp_path / "cache").iterdir()}
    assert len(times) == 6  # features of test and train; moments and radii of test; spacing and copy rates of train; floor
    again = fidelity.evaluate(drawn, cats, CONFIG, classifier, tmp_path, "cpu")
    assert report.metrics == first.metrics == again.metrics
    assert report.floor == first.floor == again.floor
    assert {path: path.stat().st_mtime_ns for path in (tmp_path / "cache").iterdir()} == times
    for path in times:
        content = bytearray(path.read_bytes())
        content[-1] ^= 1
        path.write_bytes(content)
    with pytest.raises(CheckpointError, match="damaged"):
        fidelity.evaluate(drawn, cats, CONFIG, classifier, tmp_path, "cpu")


def test_conditions_say_what_may_be_compared(report: FidelityReport, cats: Dataset, classifier: Weights, folder: Path) -> None:
    images, labels = draw_cats(CLASSES, 10, 33, seed=3)

    def conditions_hash(count: int = 30, config: EvaluateConfig = CONFIG, **settings: Any) -> str:
        samples = make_samples(folder / "other.safetensors", images[:count], labels[:count], **settings)
        return fidelity.evaluate(samples, cats, config, classifier, folder, "cpu").conditions["conditions_hash"]

    same = report.conditions["conditions_hash"]
    assert conditions_hash(model="1" * 64) == same
    assert conditions_hash(guidance=3.0, guidance_interval=[0.2, 0.8]) == same  # they belong to a release as its weights do
    assert conditions_hash(steps=10) != same
    assert conditions_hash(runtime="onnx-int8") != same
    assert conditions_hash(count=29) != same
    assert conditions_hash(config=CONFIG.model_copy(update={"neighbours": 4})) != same


def test_sets_that_cannot_be_compared(cats: Dataset, classifier: Weights, drawn: SampleSet, tmp_path: Path) -> None:
    images, labels = fidelity.load_samples(drawn)

    def evaluate(samples: SampleSet = drawn, data: Dataset = cats, classifier: Weights | None = classifier) -> None:
        fidelity.evaluate(samples, data, CONFIG, classifier, tmp_path / "evaluations", "cpu")

    few = make_samples(tmp_path / "few.safetensors", images[:15], labels[:15])
    with pytest.raises(EvaluationError, match="15 generated images; at least 16"):
        evaluate(few)
    train, test = load_split(cats, "train"), load_split(cats, "test")
    with pytest.raises(EvaluationError, match="9 test images; at least 16"):
        evaluate(data=make_dataset(tmp_path / "little", train, (test[0][:9], test[1][:9]), CLASSES))
    with pytest.raises(EvaluationError, match=r"\(3, 32, 32\) but the data set's have \(3, 33, 33\)"):
        evaluate(make_samples(tmp_path / "small.safetensors", images[..., :32, :32], labels))
    with pytest.raises(EvaluationError, match="labels run from 0 to 3"):
        evaluate(make_samples(tmp_path / "labels.safetensors", images, labels + labels.eq(2)))
    with pytest.raises(EvaluationError, match="'breed' but there is no classifier"):
        evaluate(classifier=None)
    with pytest.raises(EvaluationError, match="differ in Sphynx, other"):
        evaluate(classifier=with_header(tmp_path / "a.safetensors", classifier, classes=["Bombay", "Persian", "Sphynx"]))
    with pytest.raises(EvaluationError, match="differ in their order"):
        evaluate(classifier=with_header(tmp_path / "b.safetensors", classifier, classes=["Persian", "Bombay", "other"]))
    with pytest.raises(EvaluationError, match="trained at 64 px but the images have 33 px"):
        evaluate(classifier=with_header(tmp_path / "c.safetensors", classifier, image_size=64))
    tensors = {name: tensor * math.nan for name, tensor in read_safetensors(classifier.path, "classifier")[0].items()}
    tensors |= {name: tensor for name, tensor in read_safetensors(classifier.path, "classifier")[0].items() if "num" in name}
    with pytest.raises(EvaluationError, match="nan"):
        evaluate(classifier=with_header(tmp_path / "d.safetensors", classifier, tensors=tensors))
    with pytest.raises(TinycatsError, match="is gone"):
        evaluate(drawn.model_copy(update={"path": tmp_path / "nothing"}))
    assert not list(tmp_path.rglob("fidelity-*.json"))


class Opens:
    """Leaves a file when it is unpickled."""

    def __init__(self, path: Path):
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (str(self.path),)


def test_inception_that_is_unavailable(cats: Dataset, drawn: SampleSet, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def evaluate() -> None:
        config = CONFIG.model_copy(update={"extractor": "inception"})
        fidelity.evaluate(drawn, cats, config, None, tmp_path / "evaluations", "cpu")

    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "torch"))
    monkeypatch.setenv("https_proxy", "http://127.0.0.1:9")  # nobody listens there
    monkeypatch.delenv("TINYCATS_INCEPTION_WEIGHTS", raising=False)
    with pytest.raises(EvaluationError, match="cannot be downloaded"):
        evaluate()
    file = tmp_path / "weights.pth"
    for absent in (str(file), "~nobody.here/weights.pth", str(tmp_path / ("x" * 300))):
        monkeypatch.setenv("TINYCATS_INCEPTION_WEIGHTS", absent)
        with pytest.raises(EvaluationError, match=f"^TINYCATS_INCEPTION_WEIGHTS is {absent}, which is not a file"):
            evaluate()
    monkeypatch.setenv("TINYCATS_INCEPTION_WEIGHTS", str(file))
    file.write_text("no weights")
    with pytest.raises(EvaluationError, match=r"\(10 bytes\) does not hold"):
        evaluate()
    torch.save({"fc.weight": torch.zeros(1008, 2048)}, file)
    with pytest.raises(EvaluationError, match="does not hold"):
        evaluate()
    torch.save([1, 2], file)
    with pytest.raises(EvaluationError, match="does not hold"):
        evaluate()
    torch.save({"fc.weight": Opens(tmp_path / "opened")}, file)
    with pytest.raises(EvaluationError, match="does not hold"):
        evaluate()
    assert not (tmp_path / "opened").exists()


@pytest.mark.parametrize("weights", ["random", "real"])
def test_fast_extraction_changes_no_figure(weights: str, cats: Dataset, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Channels last and fast arithmetic give the features of torch-fidelity as it comes."""
    from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3 as Theirs

    path = INCEPTION if weights == "real" else tmp_path / "random.pth"
    if weights == "real" and not path.is_file():
        pytest.skip("needs Inception weights in TINYCATS_INCEPTION_WEIGHTS, or beside the repository")
    if weights == "random":
        torch.manual_seed(0)
        torch.save({}, path)
        with monkeypatch.context() as patch:
            patch.setattr(Theirs, "load_state_dict", lambda self, _: None)
            blank = Theirs("inception-v3-compat", ["2048"], feature_extractor_weights_path=str(path))
        for parameter in blank.parameters():
            if parameter.dim() > 1:
                torch.nn.init.kaiming_normal_(parameter)  # torch's own would let the images fade from layer to layer
        torch.save(blank.state_dict(), path)
    monkeypatch.setenv("TINYCATS_INCEPTION_WEIGHTS", str(path))
    images = load_split(cats, "test")[0][::3]
    found = extractors.extract(extractors.load_inception(), images, 8)["2048"]
    (wanted,) = Theirs("inception-v3-compat", ["2048"], feature_extractor_weights_path=str(path))(images)
    assert wanted.std(0).mean() > 1e-3  # the images differ in what is seen
    assert ((found - wanted).norm() / wanted.norm()).item() < 1e-5
    assert ((found - wanted).norm() / (wanted - wanted.mean(0)).norm()).item() < 1e-4


def test_a_gpu_extracts_without_tf32() -> None:
    """Which would put an error of 1.5e-3 on Inception's features: `benchmarks.cats128`."""

    class Says(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = torch.nn.Parameter(torch.ones(1))

        def forward(self, images: Tensor) -> tuple[Tensor]:
            return (torch.full((len(images), 2), float(cudnn.enabled and not cudnn.allow_tf32)),)

    cudnn = torch.backends.cudnn
    before = cudnn.enabled, cudnn.allow_tf32
    extractor = extractors.FeatureExtractor("said", Says(), "features", None, "0" * 64, "none")
    assert extractors.extract(extractor, torch.zeros(3, 3, 8, 8, dtype=torch.uint8), 2)["features"].all()
    assert (cudnn.enabled, cudnn.allow_tf32) == before


@pytest.mark.slow
@pytest.mark.skipif(not INCEPTION.is_file(), reason="needs Inception weights")
def test_inception_without_its_last_layer_gives_no_score(cats: Dataset, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TINYCATS_INCEPTION_WEIGHTS", str(INCEPTION))
    monkeypatch.setattr(fidelity, "NOISE_IMAGES", 8)
    (train, train_labels), (test, test_labels) = load_split(cats, "train"), load_split(cats, "test")
    few = make_dataset(tmp_path / "few", (train[::3], train_labels[::3]), (test[::2], test_labels[::2]), CLASSES)
    samples = make_samples(tmp_path / "samples.safetensors", test[1::2], test_labels[1::2])
    config = CONFIG.model_copy(update={"extractor": "inception"})
    report = fidelity.evaluate(samples, few, config, None, tmp_path, "cpu")
    assert report.metrics["is_inception"] is None
    assert report.floor["is_inception"] is None
    assert any("all zeros" in note for note in report.notes)
    assert "breed_accuracy" not in report.metrics
    assert report.conditions["extractor_sha256"].startswith("b0a970647c56")
    kid, noise = report.metrics["kid_inception"], report.conditions["trivial_kid"]["noise"]
    assert kid is not None
    assert kid < noise / 4
    assert report.metrics["fid_inception"] is not None


@pytest.mark.parametrize(
    ("counts", "remedy"),
    [
        ({"training": 48, "test": 12}, "Add images, or set data.test_fraction to 0.29"),
        ({"training": 12, "test": 4}, "training and test images together must be 34 or more"),
        ({"generated": 8}, "Draw more samples"),
    ],
)
def test_too_few_images_are_refused_with_a_way_out(counts: dict[str, int], remedy: str):
    with pytest.raises(EvaluationError, match=f"at least 16 are needed .*{remedy}"):
        fidelity.require_enough(counts, CONFIG)
