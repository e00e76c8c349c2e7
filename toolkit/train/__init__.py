"""Training: the loop, the meter, and several runs with their scores."""
