import bz2
import gzip
import os
from pathlib import Path

import polars as pl
import pyarrow as pa
import pytest

from torchrec_mpe.app.data import reader
from torchrec_mpe.app.data.log import Log, criteo_log, csv_log
from torchrec_mpe.app.data.reader import read_text
from torchrec_mpe.errors import UserError

GOOD = b"y,a,b\n1,x,p\n0,,q\n"


def csv_of(path: Path, *fields: str) -> Log:
    return csv_log(path, label="y", fields=fields or ("a",), positive=None, numbers=(), separators={}, time=None)


def read(log: Log) -> pl.DataFrame:
    return pl.concat(read_text(log, progress=False))


def error_of(path: Path, data: bytes, *fields: str) -> str:
    path.write_bytes(data)
    with pytest.raises(UserError) as caught:
        read(csv_of(path, *fields))
    message = str(caught.value)
    assert str(path) in message
    assert "\n" not in message
    return message


def test_reads_only_the_used_columns_as_text(tmp_path: Path) -> None:
    path = tmp_path / "log.csv"
    path.write_bytes(GOOD)
    assert read(csv_of(path, "b")).to_dict(as_series=False) == {"y": ["1", "0"], "b": ["p", "q"]}
    assert read(csv_of(path, "a"))["a"].to_list() == ["x", ""]


@pytest.mark.parametrize(
    "data",
    [
        GOOD.replace(b"\n", b"\r\n"),
        b"\xef\xbb\xbf" + GOOD,
        GOOD[:-1],
        GOOD.replace(b"\n", b"\n\n"),
        gzip.compress(GOOD),
        gzip.compress(GOOD[:9]) + gzip.compress(GOOD[9:]),
        bz2.compress(GOOD),
        pa.compress(GOOD, "zstd", asbytes=True),
        pa.compress(GOOD, "zstd", asbytes=True) + pa.compress(b"", "zstd", asbytes=True),
        pa.compress(GOOD, "lz4", asbytes=True),
    ],
    ids=[
        "windows line ends",
        "byte order mark",
        "no last line end",
        "empty lines",
        "gzip",
        "two gzip members",
        "bz2",
        "zstd",
        "two zstd frames",
        "lz4",
    ],
)
def test_reads_variants_of_the_same_log(tmp_path: Path, data: bytes) -> None:
    path = tmp_path / "log.csv"
    path.write_bytes(data)
    assert read(csv_of(path, "a", "b")).rows() == [("1", "x", "p"), ("0", "", "q")]


def test_quotes_protect_commas_and_line_ends(tmp_path: Path) -> None:
    path = tmp_path / "log.csv"
    path.write_bytes(b'y,a\n1,"p,q"\n0,"r\ns"\n1,NULL\n')
    assert read(csv_of(path))["a"].to_list() == ["p,q", "r\ns", "NULL"]


def test_criteo_has_forty_columns_and_no_quotes(tmp_path: Path) -> None:
    path = tmp_path / "log.tsv"
    path.write_text("1\t" + "\t".join(str(i) for i in range(13)) + "\t" + '"\t' * 25 + "z\n")
    frame = read(criteo_log(path))
    assert frame.columns == ["label", *(f"I{i}" for i in range(1, 14)), *(f"C{i}" for i in range(1, 27))]
    assert frame.row(0) == ("1", *(str(i) for i in range(13)), *['"'] * 25, "z")


def test_streams_in_blocks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(reader, "BLOCK_BYTES", 100)
    path = tmp_path / "log.csv"
    rows = [(str(i % 2), f"value{i}") for i in range(200)]
    path.write_text("y,a\n" + "".join(f"{y},{a}\n" for y, a in rows))
    frames = list(read_text(csv_of(path), progress=False))
    assert len(frames) > 10
    assert pl.concat(frames).rows() == rows


def test_missing_file_and_folder(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"gone\.csv does not exist"):
        read(csv_of(tmp_path / "gone.csv"))
    with pytest.raises(UserError, match="is a folder"):
        read(csv_of(tmp_path))


@pytest.mark.parametrize("data", [b"", b"\n\n", gzip.compress(b"", mtime=0)])
def test_empty_file(tmp_path: Path, data: bytes) -> None:
    assert "is empty" in error_of(tmp_path / "log.csv", data)


@pytest.mark.parametrize("data", [b"y,a\n", b"y,a", b"y,a\n\n"])
def test_header_only(tmp_path: Path, data: bytes) -> None:
    assert "a header line but no rows" in error_of(tmp_path / "log.csv", data)


def test_missing_column_lists_those_that_exist(tmp_path: Path) -> None:
    assert "no column 'c': its columns are 'y', 'a', 'b'" in error_of(tmp_path / "log.csv", GOOD, "a", "c")


def test_column_named_twice(tmp_path: Path) -> None:
    assert "column 'a' appears more than once" in error_of(tmp_path / "log.csv", b"y,a,a\n1,2,3\n")


# Enough rows for several blocks, so that the bad line is in none of the first.
MANY = b"y,a,b\n" + b"1,x,p\n" * 1000


@pytest.mark.parametrize(("bad", "found"), [(b"1,x", 2), (b"1,x,p,q", 4)])
def test_wrong_number_of_columns_has_its_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, bad: bytes, found: int
) -> None:
    monkeypatch.setattr(reader, "BLOCK_BYTES", 1000)
    message = error_of(tmp_path / "log.csv", MANY + bad + b"\n" + b"1,x,p\n" * 5)
    assert f"line 1002: {found} columns found where 3 are expected" in message


def test_line_numbers_count_empty_and_quoted_lines(tmp_path: Path) -> None:
    message = error_of(tmp_path / "log.csv", b'y,a,b\n\n1,"x\ny",p\n\n0,x\n')
    assert "line 6: 2 columns" in message


def test_line_number_in_gzip_and_criteo(tmp_path: Path) -> None:
    path = tmp_path / "log.tsv"
    good = "\t" * 39 + "\n"
    path.write_bytes(gzip.compress(f"{good}{good}1\t2\n".encode()))
    with pytest.raises(UserError, match=r"line 3: 2 columns found where 40 \(label, 13 numbers, 26 categories\)"):
        read(criteo_log(path))


def test_bad_utf8_has_its_line_and_column(tmp_path: Path) -> None:
    data = MANY + b"1,\xe9t\xe9,p\n"
    assert "line 1002, column 'a': the text is not UTF-8" in error_of(tmp_path / "log.csv", data)


def test_bad_utf8_in_an_unused_column_does_not_matter(tmp_path: Path) -> None:
    path = tmp_path / "log.csv"
    path.write_bytes(GOOD + b"1,x,\xff\n")
    assert read(csv_of(path)).height == 3


def test_truncated_gzip_has_a_line(tmp_path: Path) -> None:
    data = gzip.compress(b"y,a,b\n" + b"".join(f"1,{i * 7919},p\n".encode() for i in range(1000)))
    message = error_of(tmp_path / "log.csv.gz", data[: len(data) // 2])
    line = int(message.split("line ")[1].split(":")[0])
    assert "ends here too early" in message
    assert 300 < line < 700


def test_damaged_gzip_has_a_line(tmp_path: Path) -> None:
    data = bytearray(gzip.compress(MANY))
    data[-8] ^= 0xFF  # the checksum
    assert "line 1002: the gzip file is damaged here" in error_of(tmp_path / "log.csv.gz", bytes(data))


def test_unclosed_quote(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(reader, "BLOCK_BYTES", 1000)
    message = error_of(tmp_path / "log.csv", GOOD + b'1,x,"p\n' + b"1,x,p\n" * 1000)
    assert "line 4" in message and "quotes" in message


def test_truncated_zstd_has_a_line(tmp_path: Path) -> None:
    rows = b"y,a,b\n" + b"".join(f"1,{i * 7919},p\n".encode() for i in range(1000))
    message = error_of(tmp_path / "log.csv.zst", pa.compress(rows, "zstd", asbytes=True)[:-20])
    assert "line " in message and "the zstd file ends here too early" in message


def test_long_cells(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "log.csv"
    long = b"1," + b"z" * 200_000 + b",p\n"
    path.write_bytes(GOOD + long)
    assert read(csv_of(path)).height == 3
    # The line that is wrong is found behind them, not they.
    assert "line 5: 2 columns" in error_of(path, GOOD + long + b"1,x\n")
    monkeypatch.setattr(reader, "BLOCK_BYTES", 10_000)
    message = error_of(path, GOOD + long)
    assert "line 4: the line has 200,002 characters, and 10,000 can be read" in message


@pytest.mark.parametrize(
    ("data", "name"),
    [
        (GOOD.decode().encode("utf-16"), "UTF-16 text"),
        (GOOD.decode().encode("utf-16-le"), "UTF-16 text"),
        (b"PK\x03\x04" + bytes(range(200)), "a zip file"),
        (gzip.compress(bytes(257) + b"ustar  " + bytes(100), mtime=0), "a tar file"),
        (b"\xfd7zXZ\0" + bytes(9), "an xz file"),
        (b'{"y": 1, "a": "x"}\n', "JSON"),
        (b"<!DOCTYPE html><html>", "a web page"),
        (b"version https://git-lfs.github.com/spec/v1\n", "a git-lfs pointer"),
        (b"\x80\x04\x95abc", "a pickle"),
        (bytes(range(256)), "binary data of a format that is not known"),
    ],
)
def test_what_is_not_read_is_named(tmp_path: Path, data: bytes, name: str) -> None:
    message = error_of(tmp_path / "log.csv", data)
    assert f"is {name}" in message and message.isprintable() and len(message) < 300


@pytest.mark.parametrize("name", ["ORCID", "PAR1", "Objective", "BZh9"])
def test_a_text_that_begins_like_another_format(tmp_path: Path, name: str) -> None:
    (tmp_path / "log.csv").write_text(f"{name},y\nx,1\n")
    assert read(csv_of(tmp_path / "log.csv", name))[name].to_list() == ["x"]


def test_a_pipe_is_named(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(UserError, match="is a pipe or a device"):
        read(csv_of(tmp_path / "pipe"))


def test_names_of_a_file_without_a_header_line_are_cut(tmp_path: Path) -> None:
    message = error_of(tmp_path / "log.csv", b",".join([b"z" * 5000, *(b"%d" % i for i in range(99))]) + b"\n1\n")
    assert "and 80 more: if the first line is a row already, name all columns with --columns" in message
    assert len(message) < 600


@pytest.mark.parametrize(
    ("line", "advice"),
    [
        ("\t" * 38, "39 columns found .* Criteo's test files have no labels"),
        ("1," + "," * 38, "1 columns found .*: use --format csv with --delimiter comma"),
        ("label" + "\t" * 39, "line 1: this is a header line, .*: use --format csv with --delimiter tab"),
    ],
)
def test_what_is_not_quite_criteo(tmp_path: Path, line: str, advice: str) -> None:
    path = tmp_path / "log.txt"
    path.write_text(f"{line}\n")
    with pytest.raises(UserError, match=advice):
        read(criteo_log(path))


def test_paths_that_name_no_file(tmp_path: Path) -> None:
    (tmp_path / "prepared" / "vocabulary").mkdir(parents=True)
    (tmp_path / "prepared" / "manifest.json").touch()
    for path, message in (
        (tmp_path / "*.tsv", "does not exist"),
        (tmp_path / "prepared", "is prepared data: give it with --format prepared"),
        (tmp_path, "holds the folder prepared: name the files"),
    ):
        with pytest.raises(UserError, match=message):
            read(csv_of(path))
