"""Measures of experts, routers and drawn pictures: arrays in, a small result out."""
