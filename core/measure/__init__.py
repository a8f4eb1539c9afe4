"""What is written down and made of a run: metrics, files, tables."""
