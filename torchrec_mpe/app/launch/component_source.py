"""How torchx finds `torchrec_mpe.app.launch:search`: it takes a path before the colon, and asks this entry point."""

from pathlib import Path

from torchrec_mpe.upstream.torchx import file_contents

_COMPONENTS = "torchrec_mpe.app.launch"


def get_file_contents(name: str) -> str | None:
    """The text of a file that torchx asks for: our components by the package's name, all others as torchx finds them.

    Registered as ``get_file_contents`` of the entry point group ``torchx.file``. The group ``torchx.components`` would
    serve as well, but whoever registers there takes torchx's own components, such as ``dist.ddp``, away.
    """
    if name == _COMPONENTS:
        return (Path(__file__).parent / "components.py").read_text(encoding="utf-8")
    return file_contents(name)
