"""Sec. 3.2 of the paper: object mesh -> grasp -> trajectory -> render, in numpy and metres."""
