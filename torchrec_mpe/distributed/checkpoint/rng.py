"""The state of random number generators, as tensors."""

import hashlib
import random
import warnings
from collections.abc import Mapping

import numpy as np
import torch
from torch import Tensor


def rng_state(device: torch.device) -> dict[str, Tensor]:
    """The generators of this process: torch's of CPU and device, Python's and NumPy's global ones."""
    _, words, gauss = random.getstate()
    _, numpy_words, position, has_gauss, numpy_gauss = np.random.get_state(legacy=True)
    state = {
        "torch": torch.get_rng_state(),
        "python": torch.tensor(words, dtype=torch.int64),
        "python_gauss": torch.tensor([gauss is not None, gauss or 0.0], dtype=torch.float64),
        "numpy": torch.from_numpy(np.asarray(numpy_words).astype(np.int64)),
        "numpy_gauss": torch.tensor([position, has_gauss, numpy_gauss], dtype=torch.float64),
    }
    if device.type == "cuda":
        state["cuda"] = torch.cuda.get_rng_state(device)
    return state


def set_rng_state(state: Mapping[str, Tensor], device: torch.device) -> None:
    """Set this process's generators to what :func:`rng_state` returned."""
    random.setstate((3, tuple(state["python"].tolist()), _gauss(state["python_gauss"])))
    position, has_gauss, gauss = state["numpy_gauss"].tolist()
    words = state["numpy"].numpy().astype(np.uint32)
    np.random.set_state(("MT19937", words, int(position), int(has_gauss), gauss))
    torch.set_rng_state(state["torch"])
    if device.type == "cuda":
        if "cuda" in state:
            torch.cuda.set_rng_state(state["cuda"], device)
        else:
            torch.cuda.manual_seed(_seed(state["torch"], "cuda"))


def derive_rng_state(of_rank_0: Tensor, saved_world_size: int, rank: int, world_size: int) -> None:
    """Seed this process's generators anew from rank 0's saved torch state: for another number of ranks."""
    if rank == 0:
        warnings.warn(
            f"the checkpoint was saved by {saved_world_size} ranks and is loaded by {world_size}: random number "
            "generators are seeded anew from it, so dropout and shuffling do not go on as they were",
            RuntimeWarning,
            stacklevel=2,
        )
    seed = _seed(of_rank_0, f"{rank}/{world_size}")
    torch.manual_seed(seed)
    random.seed(seed)
    np.random.seed(seed % 2**32)


def _gauss(pair: Tensor) -> float | None:
    return float(pair[1]) if pair[0] else None


def _seed(state: Tensor, name: str) -> int:
    digest = hashlib.sha256(state.numpy().tobytes() + name.encode()).digest()
    return int.from_bytes(digest[:7], "little")
