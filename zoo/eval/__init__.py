"""What a cache costs in quality, bytes and time."""
