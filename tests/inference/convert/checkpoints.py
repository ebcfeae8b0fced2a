"""Checkpoints as users have them, written in every format."""

from pathlib import Path

import torch
import torch.distributed.checkpoint as dcp
from safetensors.torch import save_file
from torch import Tensor
from torchrec.modules.embedding_configs import EmbeddingBagConfig
from torchrec.modules.embedding_modules import EmbeddingBagCollection

FORMATS = ("safetensors", "safetensors_folder", "torch", "torch_nested", "dcp")
SHAPES = {"t_user": (400, 8), "t_item": (300, 8), "t_tag": (20, 4)}


def configs() -> list[EmbeddingBagConfig]:
    return [
        EmbeddingBagConfig(name=n, num_embeddings=r, embedding_dim=d, feature_names=[f"f_{n}"])
        for n, (r, d) in SHAPES.items()
    ]


def model(dtype: torch.dtype = torch.float32) -> torch.nn.Module:
    """A TorchRec model with rows of falling spread, and a dense layer."""
    torch.manual_seed(0)
    collection = EmbeddingBagCollection(tables=configs())
    with torch.no_grad():
        for bag in collection.embedding_bags.values():
            rows = bag.weight
            rows.copy_(torch.randn(rows.shape) / (1 + torch.arange(len(rows))).sqrt().unsqueeze(1))
    return torch.nn.ModuleDict({"sparse": collection, "over": torch.nn.Linear(8, 1)}).to(dtype)


def counts() -> dict[str, Tensor]:
    return {name: (1000 / torch.arange(1, rows + 1)).long() for name, (rows, _) in SHAPES.items()}


def write(state: dict[str, Tensor], kind: str, folder: Path) -> Path:
    """Write a state dict in one of :data:`FORMATS`; its path."""
    if kind == "safetensors":
        save_file(state, folder / "model.safetensors")
        return folder / "model.safetensors"
    if kind == "safetensors_folder":
        (folder / "parts").mkdir()
        for k, (key, tensor) in enumerate(state.items()):
            save_file({key: tensor}, folder / "parts" / f"model-{k}.safetensors")
        return folder / "parts"
    if kind == "dcp":
        dcp.save({"model": state}, checkpoint_id=folder / "dcp", no_dist=True)
        return folder / "dcp"
    content = state if kind == "torch" else {"epoch": 3, "state_dict": state, "hyper": {"lr": 0.1}}
    torch.save(content, folder / "model.pt")
    return folder / "model.pt"
