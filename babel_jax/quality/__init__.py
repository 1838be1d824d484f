"""Quality of text: a judge's scores of a sample, and a small model that learns these scores and scores the
rest.
"""
