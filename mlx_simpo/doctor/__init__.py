"""What `mlx-simpo doctor` reports: the machine, and whether everything is right and fast on it."""
