"""Stands in for the Python that runs `-m pip download`; told by environment what to do.

FAKE_PIP_WHEELS: folder of wheels to give. FAKE_PIP_LOG: file that hears of every call.
FAKE_PIP_FAIL: text for stderr, with exit status 1. FAKE_PIP_HANG: write a piece, then wait.
"""

import os
import shutil
import sys
import tempfile
import time
from pathlib import Path

arguments = sys.argv[1:]
with open(os.environ["FAKE_PIP_LOG"], "a") as log:
    log.write(f"{os.getpid()} {' '.join(arguments)}\n")
if os.environ.get("FAKE_PIP_FAIL"):
    sys.exit(os.environ["FAKE_PIP_FAIL"])
package, _, version = arguments[-1].partition("==")
target = Path(arguments[arguments.index("--dest") + 1])
wheel = f"{package.replace('-', '_')}-{version}-py3-none-any.whl"
if os.environ.get("FAKE_PIP_HANG"):
    with tempfile.NamedTemporaryFile(delete=False) as piece:  # where pip would keep a piece
        piece.write(bytes(100))
    time.sleep(600)
shutil.copy(Path(os.environ["FAKE_PIP_WHEELS"]) / wheel, target)
