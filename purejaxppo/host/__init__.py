"""The host side of a run: training loop, devices, checkpoints, files, progress and plots."""
