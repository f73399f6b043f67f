"""Training: labelled radiographs → a network → weights with an honest card."""
