"""Run an exam on a model, twice: answering only, and explaining; report whether it stays right."""
