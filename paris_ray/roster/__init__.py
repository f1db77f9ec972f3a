"""What a bundle is made of over time: who may join it, is replaced or leaves.

None of it trains an expert, and no other expert's files change.
"""
