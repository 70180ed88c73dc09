"""What a teacher said about a text, kept on disk, so that a student can be taught without it."""
