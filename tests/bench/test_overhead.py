from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]


def test_the_overhead_benchmark_prints_its_figure_with_configuration_and_split():
    command = [sys.executable, "bench/overhead.py", "--clients", "4", "--tokens", "16"]
    ran = subprocess.run(
        [*command, "--seconds", "0.3", "--steps", "20"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert ran.returncode in (0, 1), ran.stderr  # 1: below the floor, which no test may judge
    assert "4 clients" in ran.stdout
    assert re.search(r"over HTTP: [\d,]+ tokens/s", ran.stdout)
    assert re.search(r"adaptive +pressed +10000 +\d+ +1000", ran.stdout)
    assert re.search(r"scheduler and engine [\d.]+ \+ text -?[\d.]+ \+ HTTP -?[\d.]+", ran.stdout)
