"""The microVM level on real machines."""
