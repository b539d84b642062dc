"""The words of the model card."""

METRICS = {
    "fid": "Fréchet Inception distance, lower is better",
    "fd": "Fréchet distance of the breed classifier's features, lower is better",
    "kid": "Kernel distance of the feature extractor's features, lower is better",
    "is": "Inception Score (of the extractor's classes), higher is better",
    "precision": "share of generated images that lie among real ones, higher is better",
    "recall": "share of real images that lie among generated ones, higher is better",
    "spread": "scatter of the features within a class, as a share of the real images'; low means one picture over and over",
    "distinct": "share of images that are no copy of another",
    "density": "how many real neighbourhoods a generated image lies in, by what is usual among real ones, higher is better",
    "coverage": "share of real images whose neighbourhood holds a generated one, higher is better",
    "patch_step": "steps between pixels where two of the network's patches meet, by those inside a patch; 1 means no seams",
    "copy_rate": "share of images that are copies of a training image, pixel by pixel; the floor is that of the test images",
    "authenticity": "share of images that are not nearer to a training image than its own neighbour is; floor: the test images",
    "breed_accuracy": "how often the breed classifier sees the class that was asked for, higher is better",
}
ENDINGS = {  # of metrics that say more about another one
    "_drawn_std": "its standard error over other images of this model, held against the same real ones",
    "_std": "its standard error",
    "_low": "lower end of its 95 % interval, by bootstrap over the images",
    "_high": "upper end of its 95 % interval",
    "_infinite": "the same distance, extrapolated to infinitely many generated images",
}
HEADLINES = ("kid_{extractor}", "{frechet}_{extractor}", "coverage", "copy_rate", "breed_accuracy")
FILES = {
    "sample.py": "draws images with one of the ONNX files, without tinycats",
    "LICENSE": "the licence of the weights",
    "metrics.json": "fidelity: this model, the ONNX files, the published one before, the floor, and the conditions",
    "metrics.csv": "the same as a table",
    "benchmark.json": "size and parity of the ONNX files; how fast each runtime draws, and the machine that this was measured on",
    "decision.json": "the gate's terms",
    "sweep.json": "the averages and guidances that were tried on the validation images, and which of them this release is",
    "classifier.safetensors": "the breed classifier that judged it",
    "classifier.onnx": "the same for onnxruntime: its metadata say what its images are",
    "classifier.json": "what the classifier gets right on the test images: class by class, the confusion matrix, the baseline",
    "config.json": "what the generator is: its shape, its classes, how it is sampled",
    "release_config.json": "the settings of every stage",
    "data.json": "images of each class and split, and what was found wrong with them",
    "training_log.jsonl": "loss, learning rate and speed over the training",
    "training_diary.jsonl": "when the training started, went on and ended",
    "training_cost.json": "what the training took: hours, speed, attempts, dollars, and the estimate that was made before it",
    "samples/ema_and_raw.png": "images of the shipped average beside those of the raw weights, from the same noise",
    "samples/course.png": "KID and copy rate on the validation images over the steps of the training",
    "samples/neighbours.png": "images beside the training images that lie nearest to them",
    "samples/metadata.json": "how the pictures in `samples/` were drawn",
    "release.json": "the sha256 of every file and of everything this release was made of",
}
