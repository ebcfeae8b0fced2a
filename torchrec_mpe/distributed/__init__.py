"""The collections sharded over ranks by TorchRec, and the phases of their training."""
