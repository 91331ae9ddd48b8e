"""Eq. 3 of the paper: what a step sees, its loss, leaving and coming back."""
