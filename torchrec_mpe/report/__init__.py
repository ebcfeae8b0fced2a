"""One self-contained HTML page about a benchmark: quality, size, bit-widths and training curves."""

from torchrec_mpe.report.data import ReportData
from torchrec_mpe.report.write import write_report

__all__ = ["ReportData", "write_report"]
