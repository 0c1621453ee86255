"""Save, commit, load, export. The manager knows folders, the engine knows tensors."""
