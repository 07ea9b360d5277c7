"""Speed: python -m zoo.bench."""
