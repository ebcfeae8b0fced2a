"""Mixed-precision embedding tables for TorchRec: learned bit-widths from 0 to 8 bits per group of rows.

Sources: Mixed-Precision Embeddings for Large-Scale Recommendation Models (arXiv 2409.20305); Mixed-Precision Embedding
Using a Cache (arXiv 2010.11305).

The public names are those of ``__init__.pyi``, imported when they are first used, so that `torchrec-mpe doctor`
can run where torch, fbgemm or torchrec is missing; using a name there raises an ImportError that says what to install.
"""

from typing import Any

import lazy_loader

from torchrec_mpe.upstream.versions import __version__ as __version__
from torchrec_mpe.upstream.versions import warn_or_raise_at_import

_import_public_name, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)


def __getattr__(name: str) -> Any:
    if name in __all__:
        warn_or_raise_at_import()
    return _import_public_name(name)
