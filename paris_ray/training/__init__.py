"""Training of experts, router and the small image encoder."""
