"""The reports of a run: one HTML page that needs no other file, the regression gate, samples, and the
sections of the model card.
"""
