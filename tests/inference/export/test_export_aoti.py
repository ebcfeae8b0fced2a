"""Models compiled by AOTInductor, in a Python process that lacks the package and in a C++ process without Python."""

import json
import os
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import fbgemm_gpu
import numpy as np
import pytest
import torch
from torch import Tensor, nn

import torchrec_mpe as mpe
from tests.inference.export.export_models import SIZES, arguments, batch, dlrm, on_fbgemm
from torchrec_mpe.ops import library

HOST = Path(__file__).with_name("fresh_host.py")
SERVE = Path(__file__).parents[3] / "examples" / "serve_cpp"
ROWS = 60_000  # of a table: weights of some pages
FBGEMM = [
    str(Path(fbgemm_gpu.__file__).parent / name)
    for name in ("asmjit.so", "fbgemm.so", "fbgemm_gpu_config.so", "fbgemm_gpu_tbe_inference.so")
]


@dataclass
class Compiled:
    """A package, and what a host has to load for it."""

    package: Path
    model: nn.Module
    weighted: bool
    dtype: torch.dtype
    libraries: list[str]

    def inputs(self, size: int, most: int) -> tuple[Tensor, ...]:
        return batch(size, self.dtype, self.weighted, most, ROWS)

    def expected(self, flat: tuple[Tensor, ...]) -> Tensor:
        with torch.no_grad():
            return self.model(*arguments(flat))


@pytest.fixture(scope="module")
def packed(tmp_path_factory: pytest.TempPathFactory) -> Compiled:
    """Weights beside, int64, a table with MEAN pooling."""
    package, model = tmp_path_factory.mktemp("packed") / "m.pt2", dlrm(rows=ROWS)
    mpe.export(model, arguments(batch(4)), package, weights="beside")
    return Compiled(package, model, False, torch.int64, [str(library.LIBRARY)])


@pytest.fixture(scope="module")
def coded(tmp_path_factory: pytest.TempPathFactory) -> Compiled:
    """Transform-coded tables, weights inside, int32."""
    package, model = tmp_path_factory.mktemp("coded") / "m.pt2", dlrm(rows=ROWS, coded=True)
    mpe.export(model, arguments(batch(4, torch.int32)), package)
    return Compiled(package, model, False, torch.int32, [str(library.LIBRARY)])


@pytest.fixture(scope="module")
def fbgemm(tmp_path_factory: pytest.TempPathFactory) -> Compiled:
    """Weights inside, int32, weighted."""
    package, model = tmp_path_factory.mktemp("fbgemm") / "m.pt2", dlrm(weighted=True, rows=ROWS)
    mpe.export(model, arguments(batch(4, torch.int32, True)), package, backend="fbgemm")
    return Compiled(package, on_fbgemm(model), True, torch.int32, FBGEMM)


@pytest.fixture(scope="module")
def serve(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The C++ host."""
    folder = tmp_path_factory.mktemp("serve")
    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])
    cmake = shutil.which("cmake", path=path)
    assert cmake is not None, "cmake is missing: pip install cmake"
    for command in (
        [cmake, "-S", str(SERVE), "-B", str(folder), f"-DCMAKE_PREFIX_PATH={torch.utils.cmake_prefix_path}"],
        [cmake, "--build", str(folder)],
    ):
        built = subprocess.run(command, capture_output=True, text=True, timeout=200)
        if torch.version.cuda is not None and "Could NOT find CUDA" in built.stdout + built.stderr:
            pytest.skip("find_package(Torch) of a CUDA build of torch needs the CUDA toolkit, which is not here")
        assert built.returncode == 0, built.stdout + built.stderr
    return folder / "serve"


@pytest.fixture(params=["packed", "coded", "fbgemm"])
def compiled(request: pytest.FixtureRequest) -> Compiled:
    result: Compiled = request.getfixturevalue(request.param)
    return result


@pytest.mark.supports('export(form="aoti"), packed and fbgemm', "CPU")
def test_in_a_fresh_python_process(compiled: Compiled, tmp_path: Path) -> None:
    inputs = [compiled.inputs(size, most) for size, most in SIZES]
    torch.save([(flat, compiled.expected(flat)) for flat in inputs], tmp_path / "expected")
    cases = json.dumps([(str(compiled.package), "aoti", str(tmp_path / "expected"))])
    operators = "fbgemm" if compiled.libraries == FBGEMM else compiled.libraries[0]
    host = subprocess.run(
        [sys.executable, str(HOST), operators, cases], capture_output=True, text=True, timeout=120, cwd=tmp_path
    )
    assert host.returncode == 0, host.stderr


def test_loaded_here(compiled: Compiled) -> None:
    loaded = mpe.load_exported(compiled.package, verify=True)
    for size, most in SIZES:
        flat = compiled.inputs(size, most)
        torch.testing.assert_close(loaded(*flat), compiled.expected(flat), rtol=1e-6, atol=1e-6)
        torch.testing.assert_close(loaded(*arguments(flat)), compiled.expected(flat), rtol=1e-6, atol=1e-6)
    flat = compiled.inputs(4, 4)
    flat[1][0] = ROWS + 7
    with pytest.raises(RuntimeError, match=r"is not in|not a row of its table"):
        loaded(*flat)


@pytest.mark.supports('export(form="aoti"), packed and fbgemm', "C++ process")
def test_without_python(compiled: Compiled, serve: Path, tmp_path: Path) -> None:
    names = ["dense_features", "sparse_features.values", "sparse_features.offsets", "sparse_features.weights"]

    def run(flat: tuple[Tensor, ...], trace: str = "") -> subprocess.CompletedProcess[str]:
        for name, tensor in zip(names, flat, strict=False):
            tensor.numpy().tofile(tmp_path / f"{name}.bin")
        return subprocess.run(
            [str(serve), str(compiled.package), str(tmp_path), str(tmp_path / "out"), *compiled.libraries],
            capture_output=True,
            text=True,
            timeout=60,
            env={**os.environ, **({"LD_DEBUG": "files", "LD_DEBUG_OUTPUT": trace} if trace else {})},
        )

    for size, most in SIZES:
        flat = compiled.inputs(size, most)
        served = run(flat, trace=str(tmp_path / "loaded") if size == 7 else "")
        assert served.returncode == 0, served.stderr
        assert served.stdout == f"output [{size}, 1]\n"
        got = np.fromfile(tmp_path / "out" / "output.bin", np.float32).reshape(size, 1)
        np.testing.assert_allclose(got, compiled.expected(flat).numpy(), rtol=1e-6, atol=1e-6)
    (trace,) = tmp_path.glob("loaded.*")
    files = trace.read_text()
    assert Path(compiled.libraries[0]).name in files and "libpython" not in files and "torch_python" not in files

    flat = compiled.inputs(4, 4)
    flat[1][0] = ROWS + 7
    served = run(flat)
    assert served.returncode == 1
    assert "error: " in served.stderr and ("is not in [0, " in served.stderr or "not a row" in served.stderr)
    served = run((flat[0][:, :2].contiguous(), *flat[1:]))
    assert served.returncode == 1 and "which is no tensor dense_features float32 batch,3" in served.stderr


MAPPED = """
import sys
from torchrec_mpe import load_exported
import torch
model, inputs = load_exported(sys.argv[1]), torch.load(sys.argv[2])
model(*inputs)
print("ready", flush=True)
sys.stdin.readline()
kilobytes, inside = {}, False
for line in open("/proc/self/smaps"):
    first, *rest = line.split()
    if not first.endswith(":"):
        inside = line.rstrip().endswith(".weights")
    elif inside and rest[-1] == "kB":
        kilobytes[first[:-1]] = kilobytes.get(first[:-1], 0) + int(rest[0])
print(kilobytes["Rss"], kilobytes["Shared_Clean"], kilobytes["Private_Dirty"])
"""


@pytest.mark.supports('export(weights="beside"): processes share the weights', "CPU")
@pytest.mark.skipif(not Path("/proc/self/smaps").exists(), reason="needs Linux")
def test_processes_share_the_weights(packed: Compiled, tmp_path: Path) -> None:
    torch.save(packed.inputs(4096, 8), tmp_path / "inputs")
    command = [sys.executable, "-c", MAPPED, str(packed.package), str(tmp_path / "inputs")]
    hosts = [
        subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, cwd=Path(__file__).parents[3]
        )
        for _ in range(2)
    ]
    try:
        for host in hosts:
            assert host.stdout is not None and host.stdout.readline() == "ready\n"
        (weights,) = packed.package.parent.glob("*.weights")
        for host in hosts:
            rss, shared, dirty = (int(n) for n in host.communicate("\n", timeout=60)[0].split())
            assert dirty == 0
            if host is hosts[0]:  # while the other is there
                assert shared == rss > 0.5 * weights.stat().st_size / 1024
    finally:
        for host in hosts:
            host.kill()
            host.wait()
