"""How torchx finds files of components."""

from torchx.util import io


def file_contents(name: str) -> str | None:
    """The text of a file as torchx itself finds it, None if it does not."""
    text: str | None = io._get_file_contents(name)
    return text
