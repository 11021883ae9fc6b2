"""Methods that read text, and fit every layer to the original's."""
