"""Measures of how well pictures fit their captions."""
