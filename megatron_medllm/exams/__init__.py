"""Exams without a model: questions, the two prompts, answer parsing, scoring, and the statistics of a comparison."""
