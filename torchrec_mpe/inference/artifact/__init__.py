"""A packed model as a folder: safetensors and JSON, verified when it is opened."""
