"""Batch norms: their buffers, and statistics over several processes."""

__all__ = ["buffers", "sync_batch_norm", "synchronization"]
