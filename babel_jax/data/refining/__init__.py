"""Better text: cleaning, personal data, languages, duplicates and evaluation items, by rules that are
counted.
"""
