"""The paper's numbers and others, each with its interval."""
