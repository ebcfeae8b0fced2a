"""Data prepared by one rank for all."""

import argparse
import signal
from datetime import timedelta
from pathlib import Path

import torch.distributed as dist

from torchrec_mpe.app.data.dataset import PreparedDataset
from torchrec_mpe.app.data.formats import open_prepared, prepare_data, print_notes
from torchrec_mpe.errors import UserError
from torchrec_mpe.upstream.process_group import store_of_all_ranks

# Text of a few terabytes: the other ranks have nothing to do meanwhile.
_LONGEST = timedelta(hours=24)


def prepare_once(options: argparse.Namespace, folder: Path) -> PreparedDataset:
    """Prepare the log of the data options into a folder, on rank 0, or open it if that was done before.

    All ranks call this and get the same data; the folder has to be one that they all can read.

    Raises:
        UserError: for a mistake in the log or in the options, the same on all ranks.
    """
    prepared = open_prepared(options)
    if prepared is not None:
        return prepared
    store = store_of_all_ranks()
    key = f"torchrec_mpe/prepared/{folder}"
    if dist.get_rank() == 0:
        if not (folder / "manifest.json").exists():  # the folder appears complete or not at all
            # A job that is told to stop leaves nothing half-written. Not in collectives, which no signal interrupts.
            before = signal.signal(signal.SIGTERM, signal.default_int_handler)
            try:
                print_notes(prepare_data(options, folder, progress=options.progress))
            except UserError as error:
                store.set(key, str(error))
                raise
            finally:
                signal.signal(signal.SIGTERM, before)
        store.set(key, "")
    else:
        # Not a collective, whose timeout is for steps. If rank 0 fails, torchelastic ends this rank.
        store.wait([key], _LONGEST)
        if mistake := store.get(key).decode():
            raise UserError(mistake)
    return PreparedDataset.open(folder)
