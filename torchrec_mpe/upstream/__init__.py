"""Whatever TorchRec, FBGEMM, torch and others do not promise to keep, wrapped and named for what it is needed for."""
