"""From a trained model to packed rows, and to what serves them."""
