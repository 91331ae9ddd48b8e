"""Files, machine, formulas, contact sheets, weight files as tensors: knows nothing of hands or networks."""
