"""What runs share: progress lines, several processes of one job, energy."""
