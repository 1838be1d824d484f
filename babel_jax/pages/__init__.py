"""HTML pages of figures without scripts and without network: charts, their style, and the frame of a page."""
