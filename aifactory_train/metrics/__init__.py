"""Names, meter and sinks of what is measured while training."""
