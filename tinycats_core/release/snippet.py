"""The code that a model card shows."""

SAMPLERS = {  # each gives `slope`; the last step, and the first one of ab2, are Euler's
    "euler": "    slope = v",
    "heun": "    slope = v if t_next == 1 else (v + field(x + step * v, t_next)) / 2",
    "ab2": "    slope = v if t == 0 or t_next == 1 else v + step / (2 * step_before) * (v - v_before)",
}
SNIPPET = """\
import json

import numpy as np
import onnxruntime
from PIL import Image

release = "."  # the folder of the release
denoiser = onnxruntime.InferenceSession(f"{{release}}/denoiser-fp32.onnx")
about = denoiser.get_modelmeta().custom_metadata_map
size, null, classes = int(about["image_size"]), int(about["null_class"]), json.loads(about["classes"])
steps, shift, guidance, (low, high), seed = {steps}, {shift}, {guidance}, {interval}, {seed}
labels = np.arange(len(classes))  # one image of each class


def velocity(x, t, labels):
    feeds = {{"x": x.astype(np.float32), "t": np.full(len(x), t, np.float32), "labels": labels.astype(np.int64)}}
    return denoiser.run(["velocity"], feeds)[0]


def field(x, t):
    v = velocity(x, t, labels)
    if guidance == 1 or not low <= t <= high:
        return v
    without = velocity(x, t, np.full(len(x), null))
    return without + guidance * (v - without)


noise = [np.random.Generator(np.random.Philox(key=[seed, i])) for i in range(len(labels))]
x = np.stack([generator.standard_normal((3, size, size), np.float32) for generator in noise])
equal = np.linspace(0, 1, steps + 1)
times = equal / (equal + shift * (1 - equal))
for t, t_next in zip(times[:-1], times[1:]):
    v, step = field(x, t), t_next - t
{slope}
    x = x + step * slope
    v_before, step_before = v, step

pixels = ((x + 1) * 127.5).round().clip(0, 255).astype(np.uint8).transpose(0, 2, 3, 1)
for name, image in zip(classes, pixels):
    Image.fromarray(image).save(f"{{name}}.png")"""
