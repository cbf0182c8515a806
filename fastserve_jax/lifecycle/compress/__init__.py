"""Models made smaller: quantised, pruned, and measured before and after."""
