"""One file per parallel axis, what else changes a built model (remat, precision), and apply.py with their order."""
