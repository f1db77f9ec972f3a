"""What a bundle is made of over time: who may join it, and who leaves."""
