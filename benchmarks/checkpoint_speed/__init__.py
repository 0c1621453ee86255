"""Is a checkpoint written and read as fast as the disk goes? `make bench-checkpoint`."""
