"""What a bundle is made of, and by whom: the experts of a federation's sites."""
