"""The recipe: its stages as data, what they depend on, and their run on this machine."""
