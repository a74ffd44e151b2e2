"""From the disk to an array. No torch."""
