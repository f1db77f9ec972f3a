"""Ray Data and Ray tasks around the floors below; the only part of the package that imports ray."""
