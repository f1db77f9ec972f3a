"""Encoders: pictures to latents and features, captions to text conditioning."""
