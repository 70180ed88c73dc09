"""Stores a teacher's outputs on disk, so that a student can learn from them without the teacher."""
