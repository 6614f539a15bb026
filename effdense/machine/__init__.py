"""What this computer has and takes, and what of it fresh processes need."""

__all__ = ["environment", "measurement", "memory", "sizes", "tables"]
