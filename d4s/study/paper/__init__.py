"""The D4S paper's tables and figures (arXiv 2410.23843) on any model.

`protocols` is the paper's table of contents, `reproduce` runs one of its lines.
"""
