"""A packed model as a program of torch.export or AOTInductor."""
