"""Which backend runs what, and why the others don't: asked of the model itself."""
