"""What a bundle is made of over time, and by whom: who may join it, is replaced or leaves."""
