"""What conversion and training both read: texts from files and data sets, and their tokens."""
