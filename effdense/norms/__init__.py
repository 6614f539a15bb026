"""Batch norms: their buffers, and statistics over several processes."""
