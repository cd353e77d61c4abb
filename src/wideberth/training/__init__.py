"""Training: the loop (`module`), its policies, and `train`, which leaves a run directory."""
