"""Safetensors files of our own kinds, read whole."""

import os
from pathlib import Path

from safetensors import SafetensorError, safe_open
from torch import Tensor

from torchrec_mpe.files.document import DocumentFormat


def read_tensors(path: str | os.PathLike[str], kind: DocumentFormat) -> dict[str, Tensor]:
    """The tensors of a safetensors file whose metadata is the header of a kind of document, in memory, on the CPU.

    Raises:
        FileNotFoundError: if there is no such file.
        ValueError: in one sentence, if it is damaged, of another kind or of another version.
    """
    try:
        with safe_open(path, framework="pt") as file:
            kind.check(Path(path), file.metadata(), text=True)
            return {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118  (it is no mapping)
    # Beside a dimension of 0 the others may be larger than torch can have, for which it raises one of the latter three.
    except (SafetensorError, TypeError, RuntimeError, OverflowError) as error:
        raise ValueError(f"{path} is not {kind.called}, or damaged: {str(error).splitlines()[0]:.200}") from error
