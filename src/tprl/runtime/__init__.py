"""What every run has: directories, checkpoints, signals, files, progress, tracking, ranks."""
