"""Training by a teacher: the chunked head, the losses, teachers, and the trainer."""
