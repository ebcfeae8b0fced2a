"""A serving host that knows torch and operator libraries, and nothing of torchrec_mpe. Run as a script."""

import json
import sys
from pathlib import Path

import torch


def weights_beside(package: Path, metadata: dict[str, str]) -> dict[str, torch.Tensor]:
    """The weights by name, mapped."""
    content = torch.from_file(
        str(package.with_name(metadata["weights_file"])), size=int(metadata["weights_bytes"]), dtype=torch.uint8
    )
    weights = {}
    for line in metadata["weights"].splitlines():
        offset, name_of_dtype, dims, name = line.split(" ", 3)
        dtype, shape = getattr(torch, name_of_dtype), [int(d) for d in dims.split(",") if d != "-"]
        size = torch.Size(shape).numel() * dtype.itemsize
        weights[name] = content[int(offset) : int(offset) + size].view(dtype).view(shape)
    return weights


def load(package: Path, form: str):
    """The model, a function of flat tensors."""
    if form == "aoti":
        model = torch._inductor.aoti_load_package(str(package))
        if "weights_file" in (metadata := model.get_metadata()):
            weights = weights_beside(package, metadata)
            constants = {name: weights[name] for name in model.get_constant_fqns()}
            model.load_constants(constants, check_full_update=True, user_managed=True)
            model.constants = constants  # they live as long as the model, which only points to them
        return model
    extra = {"torchrec_mpe.json": ""}
    model = torch.export.load(package, extra_files=extra).module()
    if "weights_file" in (metadata := json.loads(extra["torchrec_mpe.json"])):
        weights = weights_beside(package, metadata)
        model.load_state_dict({k: weights[k] for k in model.state_dict()}, assign=True)
    return model


def main(operators: str, cases: str) -> None:
    if operators == "fbgemm":
        import fbgemm_gpu  # noqa: F401
    else:
        torch.ops.load_library(operators)
    for package, form, expected in json.loads(cases):
        model = load(Path(package), form)
        for inputs, want in torch.load(expected, weights_only=True):
            (got,) = model(*inputs)
            torch.testing.assert_close(got, want, rtol=1e-6, atol=1e-6)
        print("equal", package)
    if operators == "fbgemm":
        assert not hasattr(torch.ops.torchrec_mpe, "packed_embedding_bag")
    assert not {"torchrec_mpe", "torchrec"} & set(sys.modules), "the host must not need the package"


if __name__ == "__main__":
    main(*sys.argv[1:])
