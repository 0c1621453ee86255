"""One GPU: are the numbers right, and how fast, how large and how often waited for is a step? `make gpu-check`."""
