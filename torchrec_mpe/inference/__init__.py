"""From a retrained model to packed rows, and to a folder that can be served."""

from torchrec_mpe.inference.artifact import load, save
from torchrec_mpe.inference.delta import load_delta, save_delta
from torchrec_mpe.inference.emit import emit_inference_model
from torchrec_mpe.inference.export_model import export
from torchrec_mpe.inference.exported_model import load_exported
from torchrec_mpe.inference.hot_swap import ServedModel

__all__ = [
    "ServedModel",
    "emit_inference_model",
    "export",
    "load",
    "load_delta",
    "load_exported",
    "save",
    "save_delta",
]
