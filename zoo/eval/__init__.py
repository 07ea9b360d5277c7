"""What a cache costs in quality, bytes and time, measured on the code that people run."""
