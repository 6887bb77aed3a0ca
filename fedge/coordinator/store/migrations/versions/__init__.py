"""One file a step; named by the step's number."""
