"""A trained model with its tables transform-coded, and its dense network trained on by distillation."""
