"""What torch's eager-mode quantization, which TorchRec's quantize_inference_model goes by, does to modules."""

from typing import Any


class MayRefuseQuantization:
    """Of a module that is told when torch.ao.quantization notes on it how it is to be quantized.

    torch notes a ``qconfig`` on every module of a model that is quantized: None on those which it passes by.
    """

    __jit_unused_properties__ = ("qconfig",)

    def about_to_be_quantized(self, *, passed_by: bool) -> None:
        """Raise, warn, or do nothing.

        Args:
            passed_by (bool): the module stays as it is.
        """
        raise NotImplementedError

    @property
    def qconfig(self) -> Any:
        """How it is to be quantized, while it is."""
        try:
            return vars(self)["_noted_qconfig"]
        except KeyError:
            raise AttributeError("qconfig") from None

    @qconfig.setter
    def qconfig(self, qconfig: Any) -> None:
        self.about_to_be_quantized(passed_by=qconfig is None)
        vars(self)["_noted_qconfig"] = qconfig

    @qconfig.deleter
    def qconfig(self) -> None:
        vars(self).pop("_noted_qconfig", None)
