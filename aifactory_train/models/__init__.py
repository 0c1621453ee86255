"""Models as parts that the parallel axes and engines work on."""
