"""Images and their order."""
