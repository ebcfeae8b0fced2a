"""What the interpreter cannot show: that Triton's compiler takes the kernels, here for an H200."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[3]


@pytest.mark.parametrize("part", ["lookup", "cache", "rest"])
def test_every_kernel_compiles_for_an_h200(part, tmp_path):
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    done = subprocess.run(
        [sys.executable, "-m", "tests.ops.triton.compile_kernels", part],
        cwd=ROOT,
        env={**environment, "TRITON_CACHE_DIR": str(tmp_path)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.count(" bytes\n") == {"lookup": 10, "cache": 24, "rest": 7}[part]
