"""Better text: cleaning, personal data, languages, duplicates and evaluation items; each rule is counted."""
