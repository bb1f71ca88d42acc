"""What happens: the model, the data, the step, the run and its monitoring. The only folder that imports torch."""
