"""HOIDiffusion: object meshes in, annotated pictures of hands grasping them out."""

import os

# Read by OpenMP when torch is imported, so before it: threads that wait for work sleep.  Spinning, as by default,
# they keep the cores from whoever else has work: four pictures took 206 s beside other programs, and 50 s like this.
os.environ.setdefault("OMP_WAIT_POLICY", "passive")
