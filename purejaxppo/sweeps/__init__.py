"""Hyperparameter sweeps: train many trials and select the best."""
