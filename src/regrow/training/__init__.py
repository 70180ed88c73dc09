"""What training stages share: the chunked head, the losses, the teacher, the trainer."""
