"""Use a graph as somebody without tinycats would: python -I stranger.py CASE MODEL SCRIPT ARGUMENT...

Only numpy, onnxruntime and the standard library can be imported. Draws what CASE asks for, compares it with the pixels that CASE
holds, executes SCRIPT, the sample.py of a release, with the ARGUMENTs, and prints a JSON object. It imports nothing of tinycats.
"""

import json
import platform
import runpy
import sys
from typing import Any

ALLOWED = {"numpy", "onnxruntime", *sys.stdlib_module_names}


class Nothing:
    """A finder of modules that finds none but the allowed ones."""

    def find_spec(self, name: str, path: Any = None, target: Any = None) -> None:
        if name.partition(".")[0] not in ALLOWED:
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)


def main(case: str, model: str, script: str, *arguments: str) -> None:
    """Draw, compare and execute."""
    import numpy as np
    import onnxruntime

    session = onnxruntime.InferenceSession(model)
    with np.load(case) as stored:
        feeds = {name: stored[name] for name in ("noise", "labels", "guidance")}
        [images] = session.run(["images"], feeds)
        difference = np.abs(np.asarray(images).astype(int) - stored["images"]).max()
    sys.argv = [script, *arguments]
    runpy.run_path(script, run_name="__main__")
    versions = {"python": platform.python_version(), "numpy": np.__version__, "onnxruntime": onnxruntime.__version__}
    print(json.dumps({"max_abs_diff": int(difference), **versions}))


if __name__ == "__main__":
    sys.meta_path.insert(0, Nothing())  # pyright: ignore[reportArgumentType]
    main(*sys.argv[1:])
