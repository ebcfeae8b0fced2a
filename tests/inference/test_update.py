"""Rows updated under lookups: each row old or new, whoever reads it."""

from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext
from pathlib import Path

import pytest
import torch
from torchrec.modules.embedding_configs import EmbeddingBagConfig
from torchrec.sparse.jagged_tensor import KeyedJaggedTensor

import torchrec_mpe as mpe
from tests.threads import repeat_in_threads
from torchrec_mpe.inference.artifact.save_load import load, save
from torchrec_mpe.inference.packed_table_batched_embedding_bags import PackedTableBatchedEmbeddingBags
from torchrec_mpe.ops import library
from torchrec_mpe.ops.backends import use_backend
from torchrec_mpe.packing.bit_widths import TableBitWidths
from torchrec_mpe.packing.pack import TableToPack, pack_tables
from torchrec_mpe.packing.packed_tables import PackedTables
from torchrec_mpe.packing.update import UpdatedRows

ROWS, DIM = 3000, 320
NAMES = ("t1", "t2")


def constant_tables() -> PackedTables:
    """8 bits, step size 1, offset 0: a row of a whole number from -128 to 127 is stored exactly, in 5 cache lines."""
    alpha = torch.tensor([0.0, *[1.0] * 8])
    widths = TableBitWidths(ROWS, DIM, (0, ROWS - 10, ROWS), (8, 0))
    return pack_tables(
        [
            TableToPack(name, widths, lambda start, stop: torch.zeros(stop - start, DIM), alpha, torch.zeros(DIM))
            for name in NAMES
        ]
    )


def collection(backend: str = "packed") -> mpe.PackedEmbeddingBagCollection:
    configs = [
        EmbeddingBagConfig(name=name, num_embeddings=ROWS, embedding_dim=DIM, feature_names=[f"f{name}"])
        for name in NAMES
    ]
    return mpe.PackedEmbeddingBagCollection(configs, constant_tables(), backend=backend).eval()


def one_row_bags(ids: torch.Tensor) -> KeyedJaggedTensor:
    return KeyedJaggedTensor.from_lengths_sync(["ft1", "ft2"], ids, torch.ones_like(ids))


@pytest.mark.supports("apply_update", "CPU")
def test_lookups_read_the_new_rows() -> None:
    ebc = collection()
    ids = torch.tensor([5, 6, ROWS - 1])
    values = torch.tensor([[1.0], [2.0], [3.0]]).expand(3, DIM)
    assert ebc.apply_update({"t2": (ids, values)}) == {"t2": UpdatedRows(written=2, zero_bits=1)}
    read = ebc(one_row_bags(torch.tensor([5, 6, 5, 6])))
    assert read["ft1"].eq(0).all() and torch.equal(read["ft2"], values[:2])
    assert ebc.apply_update({"t1": (ids, values.requires_grad_())})["t1"].written == 2
    with pytest.raises(IndexError, match=rf"table t1: id {ROWS} is not in"):
        ebc.apply_update({"t2": (ids, -values), "t1": (torch.tensor([ROWS]), values[:1])})
    read = ebc(one_row_bags(torch.tensor([5, 6, 5, 6])))
    assert torch.equal(read["ft1"], values[:2]) and torch.equal(read["ft2"], values[:2])


def test_fbgemms_rows_are_refused() -> None:
    with pytest.raises(TypeError, match=r"tables t1, t2 stores FBGEMM's .* cannot be updated: update the packed"):
        collection("fbgemm").apply_update({"t1": (torch.tensor([5]), torch.ones(1, DIM))})


@pytest.mark.supports("apply_update of a memory-mapped artifact, the file unchanged", "CPU")
def test_a_mapped_artifact_keeps_its_file(tmp_path: Path) -> None:
    save(collection(), tmp_path / "artifact")
    before = {file: file.read_bytes() for file in (tmp_path / "artifact").iterdir()}
    updated, other = (load(tmp_path / "artifact", mmap=True) for _ in range(2))
    updated.apply_update({"t1": (torch.arange(ROWS), torch.full((ROWS, DIM), 9.0))})
    ids = torch.tensor([0, 1, 0, 1])
    assert updated(one_row_bags(ids))["ft1"].eq(9).all() and other(one_row_bags(ids))["ft1"].eq(0).all()
    assert {file: file.read_bytes() for file in (tmp_path / "artifact").iterdir()} == before


@pytest.mark.supports("apply_update under lookups, no torn row", "CPU")
@pytest.mark.parametrize(
    "reader",
    ["chosen", pytest.param("float64", marks=pytest.mark.skipif(not library.is_loaded(), reason="no library"))],
)
@pytest.mark.parametrize("writer", ["chosen", "reference"])
def test_no_row_is_half_old(reader: str, writer: str) -> None:
    """The operators' lookup and update, and all that the reference can meet: its own, and the compiled update."""
    if writer == "reference" and reader == "chosen":
        reader = "reference"
    dtype = torch.float64 if reader == "float64" else torch.float32  # which the C++ operators do not have
    tbe = PackedTableBatchedEmbeddingBags(constant_tables(), output_dtype=dtype)
    ids, offsets = torch.randint(ROWS - 10, (2 * 200,)), torch.arange(2 * 200 + 1)
    begun, complete, read = [0], [0], [0]

    def write() -> None:
        begun[0] += 1
        values = torch.full((ROWS, DIM), float(begun[0] % 256 - 128))
        with use_backend("reference") if writer == "reference" else nullcontext():
            tbe.apply_update({name: (torch.randperm(ROWS), values) for name in NAMES})
        complete[0] += 1

    def look_up() -> None:
        oldest = complete[0]
        with use_backend("reference") if reader == "reference" else nullcontext():
            rows = tbe(ids, offsets).unflatten(1, (2, DIM))
        newest = begun[0]
        assert rows.amin(2).equal(rows.amax(2)), "a row is half of one update and half of another"
        allowed = [update % 256 - 128 if update else 0 for update in range(oldest, newest + 1)]
        found = torch.isin(rows[:, :, 0].long(), torch.tensor(allowed))
        assert found.all(), "a row is older than the last update, or of none"
        read[0] += 1

    repeat_in_threads([write, look_up, look_up, look_up], 1.5)
    assert complete[0] > 1 and read[0] > 1


def test_threads_count_every_bad_id() -> None:
    tbe = PackedTableBatchedEmbeddingBags(constant_tables(), bounds_check_mode=1)
    ids, offsets = torch.full((2,), ROWS), torch.arange(3)

    def look_up(_: int) -> None:
        for _ in range(300):
            tbe(ids, offsets)

    with ThreadPoolExecutor(8) as pool:
        list(pool.map(look_up, range(8)))
    assert tbe.bounds_check_warning is not None and int(tbe.bounds_check_warning) == 8 * 300 * 2
