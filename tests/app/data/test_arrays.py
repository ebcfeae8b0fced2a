from pathlib import Path

import numpy as np
import pytest

from torchrec_mpe.app.data.arrays import array_reader, array_writer, map_array


@pytest.mark.parametrize("row_shape", [(), (3,), (0,)])
@pytest.mark.parametrize("rows", [0, 1, 1000])
def test_what_is_appended_is_read_back(tmp_path: Path, row_shape: tuple[int, ...], rows: int) -> None:
    data = np.arange(rows * int(np.prod(row_shape)), dtype=np.int32).reshape(rows, *row_shape)
    path = tmp_path / "a.npy"
    with array_writer(path, np.int32, row_shape) as writer:
        for begin in range(0, rows, 300):
            writer.append(data[begin : begin + 300])
    for array in (np.load(path), map_array(path)):
        np.testing.assert_array_equal(array, data)
        assert array.dtype == np.int32
    with array_reader(path) as reader:
        assert reader.rows == rows
        blocks = [reader.read(min(128, rows - begin)) for begin in range(0, rows, 128)]
    if blocks:
        np.testing.assert_array_equal(np.concatenate(blocks), data)


def test_strided_rows_of_another_type_are_converted(tmp_path: Path) -> None:
    path = tmp_path / "a.npy"
    with array_writer(path, np.float32) as writer:
        writer.append(np.arange(10)[::2] > 4)
    assert np.load(path).tolist() == [0.0, 0.0, 0.0, 1.0, 1.0]


def test_rows_of_the_wrong_shape_are_refused(tmp_path: Path) -> None:
    with array_writer(tmp_path / "a.npy", np.int32, (2,)) as writer, pytest.raises(ValueError, match="cannot follow"):
        writer.append(np.zeros((1, 3), np.int32))


def test_truncated_file_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "a.npy"
    np.save(path, np.arange(100))
    path.write_bytes(path.read_bytes()[:-8])
    with pytest.raises(ValueError):
        map_array(path)
