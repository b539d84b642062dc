"""Progress bars: on a terminal after a while, and nowhere else."""

import os
import struct
import subprocess
import sys
import time

import pytest

CODE = """
import time
from tinycats_core import progress
progress.PATIENCE = 0.2
for part in progress.steps(range(5), "counting"):
    time.sleep(0.1)
move = progress.fractions("decoding")
for fraction in (0.2, 0.5, 0.9, 1.0):
    time.sleep(0.15)
    move(fraction, "of 10 photos")
with progress.waiting("exporting"):
    time.sleep(1.3)
for part in progress.steps(range(5), "quick"):
    pass
with progress.waiting("short"):
    pass
print("end")
"""


def test_a_pipe_gets_no_bar():
    done = subprocess.run([sys.executable, "-c", CODE], capture_output=True, text=True, check=True)
    assert (done.stdout, done.stderr) == ("end\n", "")


@pytest.mark.skipif(sys.platform == "win32", reason="no pseudo-terminals")
def test_a_terminal_gets_a_bar_for_what_takes_long():
    import fcntl
    import termios

    ours, theirs = os.openpty()
    fcntl.ioctl(theirs, termios.TIOCSWINSZ, struct.pack("HHHH", 24, 100, 0, 0))
    with subprocess.Popen([sys.executable, "-c", CODE], stdout=theirs, stderr=theirs) as process:
        os.close(theirs)
        shown, deadline = b"", time.monotonic() + 60
        while time.monotonic() < deadline:
            try:
                shown += os.read(ours, 65_536)
            except OSError:  # how Linux says that the other side has closed
                break
    os.close(ours)
    text = shown.decode()
    assert process.returncode == 0
    for what in ("counting", "decoding", "of 10 photos", "exporting: 00:0"):
        assert what in text
    assert "quick" not in text
    assert "short" not in text
    assert text.rstrip().endswith("end")
