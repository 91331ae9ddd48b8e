"""Sec. 3.1, 3.3 and 4.4 of the paper: text, conditions and noise -> picture, in torch."""
