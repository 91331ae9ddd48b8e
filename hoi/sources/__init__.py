"""Photographs of real datasets -> dataset folder."""
