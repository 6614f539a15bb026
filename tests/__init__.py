"""The tests, by subject. A package, because installed ones call theirs `tests` too."""
