"""HOIDiffusion: object meshes in, annotated pictures of hands grasping them out."""

import os
import sys

# Read by OpenMP when torch is imported, so before it: threads that wait for work sleep.  Spinning, as by default,
# they keep the cores from whoever else has work: four pictures took 206 s beside other programs, and 50 s like this.
os.environ.setdefault("OMP_WAIT_POLICY", "passive")
# Read by tqdm when it is imported: by the clock, not by steps; in a log file, where lines stay, twice a minute.
os.environ.setdefault("TQDM_MINITERS", "0")
os.environ.setdefault("TQDM_MININTERVAL", "0.1" if sys.stderr.isatty() else "30")
