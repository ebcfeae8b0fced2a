"""A report on disk."""

from pathlib import Path

from torchrec_mpe.app.report.data import ReportData
from torchrec_mpe.files.atomic import atomic_file


def write_report(directory: Path, report: ReportData) -> Path:
    """Write ``report.html``, which needs no other file, and its pictures as PNG files beside it.

    Everything is rendered before anything is written. Files of an earlier report are replaced one by one, each in one
    step; if writing fails, the new ones are removed again.

    Args:
        directory (Path): made if it does not exist.
        report (ReportData): what to show.

    Returns:
        Path: the page.

    Raises:
        OSError: if a file cannot be written.
    """
    # Matplotlib takes half a second to import, which users without reports need not wait for.
    from torchrec_mpe.app.report.page import html_page
    from torchrec_mpe.app.report.pictures import report_pictures

    directory = Path(directory)
    pictures = report_pictures(report)
    files = {picture.file: picture.png for picture in pictures}
    files["report.html"] = html_page(report, pictures).encode("utf-8", "replace")
    made_directory = not directory.exists()
    written: list[Path] = []
    try:
        for name, content in files.items():
            path = directory / name
            is_new = not path.exists()
            with atomic_file(path) as temporary:
                temporary.write_bytes(content)
            if is_new:
                written.append(path)
    except BaseException:
        for path in written:
            path.unlink(missing_ok=True)
        if made_directory and directory.is_dir() and not any(directory.iterdir()):
            directory.rmdir()
        raise
    return directory / "report.html"
