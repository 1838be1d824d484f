"""What a run says of itself: one HTML page that needs nothing else, the regression gate, samples, and the
sections of the model card.
"""
