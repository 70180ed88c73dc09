"""Training with a teacher: the chunked output head, the losses, the teachers, and the trainer."""
