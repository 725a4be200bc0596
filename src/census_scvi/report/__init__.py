"""The evaluation report: slices of the Census, figures, HTML."""
