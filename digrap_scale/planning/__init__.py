"""What a run will need, told from its config alone: memory of each rank, communication of a step. Nothing is trained."""
