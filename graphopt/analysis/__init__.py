"""Static facts about a graph."""
