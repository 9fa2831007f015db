"""What measures the figures of the README, and their records. Not part of the library."""
