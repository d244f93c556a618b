"""Many trainings with different settings, and which of them was best."""
