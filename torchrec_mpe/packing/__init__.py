"""Rows packed to exactly their bits: the byte layout, its size, and packing itself."""

from torchrec_mpe.ops.directory import Directory
from torchrec_mpe.ops.reference.bitpack import pack_codes, unpack_codes
from torchrec_mpe.packing.choose_directory import DIRECTORY_CHOICES, directory_by_table
from torchrec_mpe.packing.pack import TableToPack, pack_tables
from torchrec_mpe.packing.packed_tables import PackedTables, TableShape
from torchrec_mpe.packing.size import SizeReport, TableSize, packed_bytes, size_report
from torchrec_mpe.packing.update import UpdatedRows, update_packed_tables_
from torchrec_mpe.packing.validate import validate_packed_tables

__all__ = [
    "DIRECTORY_CHOICES",
    "Directory",
    "PackedTables",
    "SizeReport",
    "TableShape",
    "TableSize",
    "TableToPack",
    "UpdatedRows",
    "directory_by_table",
    "pack_codes",
    "pack_tables",
    "packed_bytes",
    "size_report",
    "unpack_codes",
    "update_packed_tables_",
    "validate_packed_tables",
]
