"""What surrounds the learner: the run loop, devices, checkpoints, files, progress and plots."""
