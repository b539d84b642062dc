"""The noise that a browser draws with: number for number that of NumPy."""

import shutil
import subprocess

import numpy as np
import pytest

from tinycats_core.generator import drawing
from tinycats_core.release import web

CASES = [(0, 0), (1, 0), (1, 12), (7, 3), (2**31 - 1, 831), (123_456_789, 2**20)]
NODE = """
const out = [];
for (const [seed, index] of JSON.parse(process.argv[1])) out.push(Buffer.from(noise(seed, index, 128).buffer));
process.stdout.write(Buffer.concat(out));
"""


@pytest.mark.skipif(shutil.which("node") is None, reason="there is no Node.js on this machine: apt-get install nodejs")
def test_javascript_draws_the_noise_of_numpy():
    """Over 295,000 numbers, about 50 of which come from the tail, where the last bit of a logarithm may differ."""
    command = ["node", "-e", web.read("noise.js") + NODE, str([[*case] for case in CASES]).replace("(", "[").replace(")", "]")]
    done = subprocess.run(command, capture_output=True, check=True, timeout=120)
    found = np.frombuffer(done.stdout, np.float32).reshape(len(CASES), 3, 128, 128)
    wanted = np.concatenate([drawing.noise([index], 128, seed) for seed, index in CASES])
    assert (found != wanted).mean() < 1e-5
    assert np.abs(found - wanted).max() < 1e-6
