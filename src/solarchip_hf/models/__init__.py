"""What a checkpoint needs, and all that the Hub carries with it: flat modules that import their siblings only."""
