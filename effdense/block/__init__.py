"""The dense block in linear memory, and the forwards of modules that run it."""
