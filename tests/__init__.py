"""A package, so that one of the same name among the installed ones is not found in its place."""
