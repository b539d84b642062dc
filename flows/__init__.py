"""The flows. Each reads as the story of what it does, a line a stage, and runs by `python -m flows.<name>`."""
