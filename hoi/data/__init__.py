"""The dataset folder that every script reads and writes, and the scenes that fill it."""
