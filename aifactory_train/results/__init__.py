"""What happened: the result record and the report."""
