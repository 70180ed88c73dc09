"""What the stages share that give linear layers new weights, calibrated on text."""
