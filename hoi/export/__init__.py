"""Dataset folder -> the layouts that other tools read."""
