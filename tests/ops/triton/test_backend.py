"""The thin functions between the ops and the kernels."""

import importlib
import subprocess
import sys

import pytest
import torch

from torchrec_mpe.ops import backends, library, triton_backend
from torchrec_mpe.ops.bags import SUM, Bags
from torchrec_mpe.ops.cache_slots import assign_cache_slots_
from torchrec_mpe.ops.cache_tensors import empty_directory
from torchrec_mpe.ops.quantize_and_pack import quantize_and_pack
from torchrec_mpe.ops.quantized_embedding_bag import quantized_embedding_bag

OPS = [
    "packed_embedding_bag",
    "quantize_and_pack",
    "assign_cache_slots_",
    "write_stored_rows_",
    "read_stored_rows_",
]


@pytest.mark.parametrize("op", OPS)
def test_is_registered(op):
    assert backends.implementation(op, "triton") is getattr(triton_backend, op)


@pytest.mark.skipif(not library.is_loaded(), reason="the compiled library is not built")
@pytest.mark.parametrize("op", list(triton_backend.CUDA_CACHE))
def test_the_dispatcher_takes_it_for_cuda_tensors(op: str) -> None:
    importlib.import_module(f"torchrec_mpe.ops.{'cache_slots' if op == 'assign_cache_slots_' else 'stored_rows'}")
    assert torch._C._dispatch_has_kernel_for_dispatch_key(f"torchrec_mpe::{op}", "CUDA")


def test_importing_the_ops_imports_no_triton():
    code = "import sys, torchrec_mpe.ops, torchrec_mpe.ops.triton_backend; sys.exit('triton' in sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)


def test_an_op_runs_on_triton_by_name(device):
    rows = torch.tensor([[0.3], [-0.2]], device=device)
    bags = Bags(*(torch.arange(n, device=device) for n in (2, 3)), [2], [0], [2], [0], [SUM])
    row_map, alpha = torch.tensor([0, 0], device=device), torch.tensor([0.25], device=device)
    beta, scale = torch.zeros(1, device=device), torch.ones(1, device=device)
    out = quantized_embedding_bag(rows, bags, row_map, None, alpha, beta, None, (4,), scale, backend="triton")
    assert out.tolist() == [[0.25], [-0.25]]
    packed = quantize_and_pack(rows, 4, torch.tensor(0.25, device=device), beta, backend="triton")
    assert packed.tolist() == [[9, 0, 0, 0], [7, 0, 0, 0]]
    directory = empty_directory(9, 1, 0, lfu=False, device=device)
    ids = torch.tensor([8, 3, 8], device=device)
    slots, moves, _ = assign_cache_slots_([directory], ids, [3], [9], [1], [0], [0], 1, 1, True, backend="triton")
    assert slots.tolist() == [0, 1, 0]
    assert moves[0].fetched_rows.tolist() == [8, 3]


def test_without_triton_one_sentence_says_what_to_install(monkeypatch):
    triton_backend._kernel.cache_clear()
    monkeypatch.setitem(sys.modules, "triton", None)
    with pytest.raises(ImportError, match="backend triton of op quantize_and_pack needs Triton: install"):
        triton_backend.quantize_and_pack(torch.zeros(1, 1), 4, torch.tensor(1.0), torch.zeros(1))
    triton_backend._kernel.cache_clear()


def test_cpu_tensors_outside_the_interpreter_are_refused():
    code = """
import torch
from torchrec_mpe.ops.triton_backend import quantize_and_pack
try:
    quantize_and_pack(torch.zeros(1, 1), 4, torch.tensor(1.0), torch.zeros(1))
except ValueError as error:
    assert "set TRITON_INTERPRET=1" in str(error), error
else:
    raise SystemExit("no error")
"""
    subprocess.run([sys.executable, "-c", code], check=True, env={"PATH": "/usr/bin:/bin"})
