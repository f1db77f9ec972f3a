"""What a bundle is made of over time: experts that join, are replaced or leave.

None of it trains an expert, and no other expert's files change.
"""
