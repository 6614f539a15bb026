"""Images and their order."""

__all__ = ["datasets", "images"]
