"""From a retrained model to packed rows, and to a folder that can be served."""

from torchrec_mpe.inference.artifact import load, save
from torchrec_mpe.inference.emit import emit_inference_model

__all__ = ["emit_inference_model", "load", "save"]
