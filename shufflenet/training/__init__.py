"""What stands around the loop of train.py."""
